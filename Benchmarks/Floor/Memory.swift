// The bytes of the export, or a small region that stands for all of them: then what is answered does
// not depend on what was written, but nothing has to be allocated either.

import Foundation
import NBDProtocol

struct FloorFailure: Error, CustomStringConvertible {
    var description: String
    init(_ description: String) { self.description = description }
}

/// Shared by all connections without a lock, as a disk is.
final class Memory: @unchecked Sendable {
    let size: Int
    private let bytes: UnsafeMutableRawPointer
    private let mask: UInt64

    /// - Parameter region: bytes that the export repeats, a power of two; nil: it keeps all.
    init(size: Int, region: Int?) throws {
        // A request may begin anywhere in the region.
        let length = region.map { $0 + Int(Limits.maximumPayload) } ?? size
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        let mapped = mmap(nil, length, PROT_READ | PROT_WRITE, flags, -1, 0)
        guard let mapped, mapped != MAP_FAILED else {
            throw FloorFailure("no \(length) bytes of memory: \(String(cString: strerror(errno)))")
        }
        if let region { memset(mapped, 0, region) }  // pages of its own, before they are measured
        bytes = mapped
        mask = region.map { UInt64($0 - 1) } ?? .max
        self.size = size
    }

    @inline(__always)
    func place(of offset: UInt64) -> UnsafeMutableRawPointer { bytes + Int(offset & mask) }

    /// Of any length, unlike what has a payload.
    func zero(_ offset: UInt64, _ length: Int) {
        memset(place(of: offset), 0, mask == .max ? length : min(length, Int(mask) + 1))
    }
}
