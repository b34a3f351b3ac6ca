// The space behind a file device: giving it back, zeroing it, taking it beforehand, making files and
// making them longer.

import CLinux
import Glibc
import Synchronization

/// Modes for `IOQueue.allocate`, and what `FileDevice` itself uses.
public enum AllocateMode {
    /// Gives the space back; reads as zeroes afterwards.
    public static let punchHole = Int32(CLINUX_PUNCH_HOLE) | Int32(CLINUX_KEEP_SIZE)
    /// Keeps the space; reads as zeroes afterwards. -EOPNOTSUPP on file systems without it: then
    /// zeroes must be written.
    public static let zeroRange = Int32(CLINUX_ZERO_RANGE) | Int32(CLINUX_KEEP_SIZE)
    /// Gives space to holes; what there is stays.
    static let reserve = Int32(CLINUX_KEEP_SIZE)
}

extension FileDevice {
    /// The most zeroes that are written at once where the device cannot zero by itself.
    private static let zeroPiece = 1 << 20

    /// Gives the space of a range back. A hint: partial sectors at the ends stay, and what a later
    /// read gives is defined for files only (zeroes).
    ///
    /// An error with the code EOPNOTSUPP means that the device will never do it: stop asking.
    public func discard(at offset: UInt64, length: UInt64) throws(DeviceError) {
        guard length > 0 else { return }
        try checkWritable("discard")
        try checkRange("discard", offset, length)
        guard !lacksDiscard.load(ordering: .relaxed) else {
            throw failure("discard", offset, EOPNOTSUPP)
        }
        let code = isBlockDevice ? discardSectors(offset, length) : punchHole(offset, length)
        guard code != 0 else { return }
        if code == EOPNOTSUPP || code == ENOTTY || code == ENOSYS {
            lacksDiscard.store(true, ordering: .relaxed)
            throw failure("discard", offset, EOPNOTSUPP)
        }
        throw failure("discard", offset, code)
    }

    /// Makes a range read as zeroes and keeps its space, so that later writes there find it.
    public func zero(at offset: UInt64, length: UInt64) throws(DeviceError) {
        guard length > 0 else { return }
        try checkWritable("zero")
        try checkRange("zero", offset, length)
        if !lacksZeroRange.load(ordering: .relaxed) {
            let code = isBlockDevice ? zeroSectors(offset, length) : zeroRange(offset, length)
            switch code {
            case 0:
                return
            case EOPNOTSUPP, ENOTTY, ENOSYS:
                lacksZeroRange.store(true, ordering: .relaxed)
            case EINVAL:
                break  // not whole sectors: only writing takes that
            default:
                throw failure("zero", offset, code)
            }
        }
        try writeZeroes(offset, length)
    }

    /// Takes the space of a regular file's holes now, so that no write into them finds the file system
    /// full. Where the file system cannot do that, nothing happens.
    public func reserve() throws(DeviceError) {
        guard !isBlockDevice else { return }
        try checkWritable("reserve the space of")
        let size = self.size
        let code = Self.reserve(fileDescriptor, size)
        guard code == 0 else {
            throw failure("reserve the space of", nil, code, Self.reason(code, size))
        }
    }

    /// Makes a regular file longer, durably; what is new is a hole, unless `reserving`: then the whole
    /// file has its space, or an error leaves it as long as it was.
    public func grow(to newSize: UInt64, reserving: Bool = false) throws(DeviceError) {
        try checkWritable("grow")
        guard !isBlockDevice else {
            throw failure(
                "grow", nil, EINVAL, "a block device is made larger by what provides it")
        }
        let size = self.size
        guard newSize >= size else {
            throw failure(
                "grow", nil, EINVAL,
                "it has \(size) bytes already, and a device does not shrink")
        }
        guard newSize % UInt64(sectorSize) == 0 || !isDirect else {
            throw failure(
                "grow", nil, EINVAL, "\(newSize) bytes are not a multiple of \(sectorSize)")
        }
        guard let length = off_t(exactly: newSize) else { throw failure("grow", nil, EFBIG) }
        guard ftruncate(fileDescriptor, length) == 0 else { throw failure("grow", nil, errno) }
        let code = reserving ? Self.reserve(fileDescriptor, newSize) : 0
        guard code == 0 else {
            _ = ftruncate(fileDescriptor, off_t(size))
            throw failure("grow", nil, code, Self.reason(code, newSize))
        }
        guard fsync(fileDescriptor) == 0 else { throw failure("grow", nil, errno) }
        knownSize.store(newSize, ordering: .relaxed)
    }

    /// Makes a new file of `size` bytes that survives a power cut once this returns: sparse, unless
    /// `reserving`, then it has its space where the file system can give it beforehand.
    /// Only its owner may read it. A failure leaves nothing behind; that the path is taken is one.
    public static func create(
        path: String, size: UInt64, reserving: Bool = false
    ) throws(DeviceError) {
        guard let length = off_t(exactly: size) else {
            throw SystemError.opening(path, EFBIG, for: "create")
        }
        let raw = open(path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR)
        guard raw >= 0 else {
            let code = errno
            throw SystemError.opening(path, code, for: "create")
        }
        let descriptor = OwnedDescriptor(raw)
        do throws(DeviceError) {
            guard ftruncate(descriptor.raw, length) == 0 else {
                throw SystemError.opening(path, errno, for: "create")
            }
            let code = reserving ? reserve(descriptor.raw, size) : 0
            guard code == 0 else {
                throw DeviceError(
                    operation: "create", path: path, code: code, reason: reason(code, size))
            }
            guard fsync(descriptor.raw) == 0 else {
                throw SystemError.opening(path, errno, for: "create")
            }
            try Directory.flush(Directory.holding(path))
        } catch {
            unlink(path)
            throw error
        }
    }

    /// Why there is no space for a file.
    private static func reason(_ code: Int32, _ size: UInt64) -> String {
        code == ENOSPC || code == EDQUOT
            ? "its file system has no room for all of its \(size) bytes; make room there"
            : SystemError.words(code)
    }

    // MARK: - Parts; each gives an errno, or 0

    /// Bytes, of `st_blocks`, whatever the file system's blocks are.
    private static let statUnit: UInt64 = 512

    private static func reserve(_ descriptor: Int32, _ size: UInt64) -> Int32 {
        // An attempt that must fail would take all there is from everybody else for a while.
        var file = stat()
        var system = statvfs()
        // A file system without a limit has no blocks.
        if fstat(descriptor, &file) == 0, fstatvfs(descriptor, &system) == 0, system.f_blocks > 0 {
            let taken = UInt64(file.st_blocks) * statUnit
            let (free, isHuge) = UInt64(system.f_bfree)
                .multipliedReportingOverflow(by: UInt64(system.f_frsize))
            if !isHuge, size > taken, size - taken > free { return ENOSPC }
        }
        let code = -clinux_allocate(descriptor, AllocateMode.reserve, 0, size)
        return code == EOPNOTSUPP || code == ENOSYS ? 0 : code
    }

    private func discardSectors(_ offset: UInt64, _ length: UInt64) -> Int32 {
        let sector = UInt64(sectorSize)
        let first = (offset + sector - 1) / sector * sector
        let end = (offset + length) / sector * sector
        guard first < end else { return 0 }
        return -clinux_block_discard(fileDescriptor, first, end - first)
    }

    private func zeroSectors(_ offset: UInt64, _ length: UInt64) -> Int32 {
        let sector = UInt64(sectorSize)
        guard offset % sector == 0, length % sector == 0 else { return EINVAL }
        return -clinux_block_zero(fileDescriptor, offset, length)
    }

    private func punchHole(_ offset: UInt64, _ length: UInt64) -> Int32 {
        -clinux_allocate(fileDescriptor, AllocateMode.punchHole, offset, length)
    }

    private func zeroRange(_ offset: UInt64, _ length: UInt64) -> Int32 {
        -clinux_allocate(fileDescriptor, AllocateMode.zeroRange, offset, length)
    }

    private func writeZeroes(_ offset: UInt64, _ length: UInt64) throws(DeviceError) {
        let zeroes = AlignedBuffer(count: Int(min(length, UInt64(Self.zeroPiece))))
        var done: UInt64 = 0
        while done < length {
            let piece = Int(min(length - done, UInt64(zeroes.count)))
            try write(
                at: offset + done,
                from: UnsafeRawBufferPointer(start: zeroes.pointer, count: piece))
            done += UInt64(piece)
        }
    }
}
