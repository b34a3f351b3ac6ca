// File I/O done at once by the calling thread. Results as an `IOQueue` delivers them: bytes, or
// -errno; what a signal interrupted goes on.

import CLinux
import Glibc

public enum FileIO {
    /// Bytes: fewer than `length` at the end of the file, or if an error came after some.
    public static func read(
        _ fd: Int32, at offset: UInt64, into memory: UnsafeMutableRawPointer, length: Int
    ) -> Int32 {
        let start = off_t(truncatingIfNeeded: offset)
        var done = 0
        while done < length {
            let result = pread(fd, memory + done, length - done, start &+ off_t(done))
            if result > 0 {
                done += result
            } else if result == 0 {
                break
            } else if errno != EINTR {
                return done > 0 ? Int32(clamping: done) : -errno
            }
        }
        return Int32(clamping: done)
    }

    /// In one call if the kernel takes everything, then vector by vector.
    public static func write(
        _ fd: Int32, at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int
    ) -> Int32 {
        var done = clinux_write_vectors(fd, vectors, Int32(count), offset)
        if done < 0 { return Int32(done) }
        var before = 0
        for index in 0..<count {
            let end = before + vectors[index].iov_len
            while done < end {
                var rest = iovec(
                    iov_base: vectors[index].iov_base + (done - before), iov_len: end - done)
                let result = clinux_write_vectors(fd, &rest, 1, offset &+ UInt64(done))
                if result <= 0 { return done > 0 ? Int32(clamping: done) : Int32(result) }
                done += result
            }
            before = end
        }
        return Int32(clamping: done)
    }

    /// Whether the range of a regular file reads as zeroes because it was never written, or punched.
    /// False where the file system does not say.
    public static func isHole(_ fd: Int32, at offset: UInt64, length: UInt64) -> Bool {
        let data = lseek(fd, off_t(offset), Int32(CLINUX_SEEK_DATA))
        return data < 0 ? errno == ENXIO : UInt64(data) >= offset + length
    }

    /// fdatasync: 0 or -errno.
    public static func flush(_ fd: Int32) -> Int32 {
        while fdatasync(fd) != 0 {
            if errno != EINTR { return -errno }
        }
        return 0
    }
}
