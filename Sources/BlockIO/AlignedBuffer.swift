// Memory that direct I/O can use: aligned to a page, freed with its owner.

import Glibc

/// Zero-filled page-aligned memory of fixed size.
///
/// Whoever takes the view out of it must keep the buffer alive while the view is in use:
/// an operation of an `IOQueue` uses it until its completion has been delivered.
public struct AlignedBuffer: ~Copyable {
    /// The alignment of every buffer: at least what any direct I/O asks for in memory.
    public static let alignment = 4096

    public let bytes: UnsafeMutableRawBufferPointer

    public init(count: Int) {
        precondition(count > 0, "an empty buffer has no address")
        // Whole pages, so that no two buffers share one.
        let whole = (count + Self.alignment - 1) / Self.alignment * Self.alignment
        var memory: UnsafeMutableRawPointer?
        guard posix_memalign(&memory, Self.alignment, whole) == 0, let memory else {
            fatalError("out of memory for a buffer of \(count) bytes")
        }
        memset(memory, 0, whole)
        bytes = UnsafeMutableRawBufferPointer(start: memory, count: count)
    }

    deinit {
        free(bytes.baseAddress)
    }

    public var pointer: UnsafeMutableRawPointer {
        bytes.baseAddress!
    }

    public var count: Int {
        bytes.count
    }
}
