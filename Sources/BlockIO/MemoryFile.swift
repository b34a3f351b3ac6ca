// The I/O of a file whose contents are memory anyway (tmpfs): copies, done at once, from and to the
// file's pages, which are mapped.
//
// 1. A page that cannot be had (the file was truncated, or there is no memory for it) ends the copy,
//    not the process: the kernel is asked to do the same by a system call, and says what is wrong.
// 2. What is written for the first time goes through the kernel: it would clear each page before the
//    copy fills it.

import CLinux
import Glibc

/// Results as an `IOQueue` delivers them: bytes, or -errno. Any thread may call at any time; there is
/// no order between concurrent calls to the same bytes.
public final class MemoryFile: @unchecked Sendable {
    /// The descriptor's owner.
    private let device: FileDevice
    private let fd: Int32
    /// The file's pages; nil: they cannot be mapped, and all I/O is system calls.
    private let pages: UnsafeMutableRawPointer?
    private let length: UInt64

    /// What is copied at once: some 15 µs. More is a short transfer.
    public static let longestCopy = 128 << 10

    /// nil: the file's contents are elsewhere. Maps what is there now; what the file grows by later is
    /// read and written all the same.
    public init?(_ device: FileDevice) {
        guard device.isInMemory else { return nil }
        self.device = device
        fd = device.fileDescriptor
        length = device.size
        pages = clinux_map_file(fd, Int(length), device.access == .readWrite)
    }

    deinit {
        if let pages { clinux_unmap_file(pages, Int(length)) }
    }

    public func read(
        at offset: UInt64, into memory: UnsafeMutableRawPointer, length: Int
    ) -> Int32 {
        let count = min(length, Self.longestCopy)
        if let source = contents(at: offset, length: count),
            clinux_copy_mapped(memory, source, count)
        {
            return Int32(count)
        }
        return FileIO.read(fd, at: offset, into: memory, length: count)
    }

    /// - Parameter isNew: the first write there, so that the file may have no pages yet.
    public func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool
    ) -> Int32 {
        var first = vectors[0]
        first.iov_len = min(first.iov_len, Self.longestCopy)
        if !isNew, let target = contents(at: offset, length: first.iov_len),
            clinux_copy_mapped(target, first.iov_base, first.iov_len)
        {
            return Int32(first.iov_len)
        }
        if vectors[0].iov_len > Self.longestCopy {
            return FileIO.write(fd, at: offset, vectors: &first, count: 1)
        }
        return FileIO.write(fd, at: offset, vectors: vectors, count: count)
    }

    public func flush() -> Int32 { FileIO.flush(fd) }

    public func isHole(at offset: UInt64, length: UInt64) -> Bool {
        FileIO.isHole(fd, at: offset, length: length)
    }

    /// Where the bytes are. Only `clinux_copy_mapped` and the kernel can be let loose on them: to touch
    /// a page that cannot be had ends the process.
    public func contents(at offset: UInt64, length: Int) -> UnsafeMutableRawPointer? {
        let (end, overflow) = offset.addingReportingOverflow(UInt64(length))
        guard let pages, !overflow, end <= self.length else { return nil }
        return pages + Int(offset)
    }
}
