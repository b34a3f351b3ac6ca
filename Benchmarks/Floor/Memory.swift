// The bytes of the export. Pages that were never written are the kernel's page of zeroes and take
// no memory, as blocks do that a thin volume has not mapped.

import Foundation

struct FloorFailure: Error, CustomStringConvertible {
    var description: String
    init(_ description: String) { self.description = description }
}

/// Shared by all connections without a lock, as a disk is.
final class Memory: @unchecked Sendable {
    let bytes: UnsafeMutableRawPointer
    let size: Int

    init(size: Int) throws {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        let mapped = mmap(nil, size, PROT_READ | PROT_WRITE, flags, -1, 0)
        guard let mapped, mapped != MAP_FAILED else {
            throw FloorFailure("no \(size) bytes of memory: \(String(cString: strerror(errno)))")
        }
        bytes = mapped
        self.size = size
    }
}
