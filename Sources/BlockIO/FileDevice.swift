// A regular file or block device as a BlockDevice: opening, owning, and what it is.
//
// 1. One owner: an exclusive lock is held from `init` to `deinit` (unless asked for none), on
//    block devices also the kernel's own exclusive claim, so that nothing mounted or stacked on
//    the device is opened either.
// 2. A write never makes a file longer: `size` is the bound, `grow` the only way to change it.
// 3. Direct I/O wherever requests aligned to 512 bytes allow it; memory and ranges that are not
//    aligned so go through a bounce buffer.

import CLinux
import Glibc
import Synchronization

/// A regular file or block device, opened exclusively.
///
/// Every method may be called from any thread at any time; there is no order between concurrent
/// calls to the same bytes. `fileDescriptor` may be given to an `IOQueue` for as long as the
/// device lives; what is said there about alignment then holds for the queue's requests.
public final class FileDevice: BlockDevice, Sendable {
    public enum Access: Sendable { case readOnly, readWrite }

    public enum Locking: Sendable {
        /// Fails if anybody else holds the file or device; nobody else gets it until deinit.
        case exclusive
        /// For looking at a device that somebody else has open. Says nothing to anybody.
        case none
    }

    public let path: String
    public let access: Access
    public let isBlockDevice: Bool
    /// The logical sector of a block device, 512 for a file. Direct I/O through
    /// `fileDescriptor` needs offsets and lengths that are multiples of this.
    public let sectorSize: Int
    /// Whether reads and writes bypass the page cache.
    public let isDirect: Bool
    /// Why not, if direct I/O was asked for and is not used; to be told to the operator.
    public let directRefusal: String?
    /// What direct I/O through `fileDescriptor` needs of the memory's address; 1 if not direct.
    public let memoryAlignment: Int

    /// A file whose contents are in memory only (tmpfs).
    public let isInMemory: Bool
    /// It turns, or the file is on one that does; false where that is not known.
    public let isRotational: Bool

    let descriptor: OwnedDescriptor
    /// The size when last asked for: spares a system call a transfer.
    let knownSize: Atomic<UInt64>
    /// Operations the device has refused once and is not asked for again.
    let lacksDiscard = Atomic<Bool>(false)
    let lacksZeroRange = Atomic<Bool>(false)
    /// Held while a part of a sector is read, changed and written back.
    let partialSector = Mutex<Void>(())

    public var fileDescriptor: Int32 { descriptor.raw }

    /// Bytes, asked from the system at each call.
    public var size: UInt64 {
        guard let now = try? Self.currentSize(descriptor.raw, path, isBlockDevice) else {
            return knownSize.load(ordering: .relaxed)
        }
        knownSize.store(now, ordering: .relaxed)
        return now
    }

    public init(
        path: String, access: Access, direct: Bool = true, locking: Locking = .exclusive
    ) throws(DeviceError) {
        let isBlockDevice = try Self.kindOf(path)
        let descriptor = try Self.openDescriptor(path, access, locking, isBlockDevice)
        let status = try Self.verify(descriptor.raw, path, isBlockDevice)
        if locking == .exclusive {
            try Self.lock(descriptor.raw, path, isBlockDevice)
        }
        let size = try Self.currentSize(descriptor.raw, path, isBlockDevice)
        guard size >= UInt64(DirectAccess.requestAlignment) else {
            throw DeviceError(
                operation: "open", path: path, code: 0,
                reason: "it is too short: \(size) bytes, and a device has at least one sector "
                    + "of \(DirectAccess.requestAlignment) bytes")
        }
        let sector = try Self.sectorOf(descriptor.raw, path, isBlockDevice)
        let direct =
            direct
            ? DirectAccess.turnOn(
                descriptor.raw, isBlockDevice: isBlockDevice, sector: sector, size: size) : nil
        self.path = path
        self.access = access
        self.isBlockDevice = isBlockDevice
        self.sectorSize = sector
        self.isDirect = direct?.isOn ?? false
        self.directRefusal = direct?.refusal
        self.memoryAlignment = direct?.memoryAlignment ?? 1
        self.isInMemory = !isBlockDevice && clinux_is_in_memory(descriptor.raw)
        self.isRotational = Rotation.isRotational(status, isBlockDevice: isBlockDevice)
        self.knownSize = Atomic(size)
        self.descriptor = descriptor
    }

    // MARK: - Opening

    /// Looks before opening, because opening a FIFO or a tape has effects. True: block device.
    private static func kindOf(_ path: String) throws(DeviceError) -> Bool {
        var status = stat()
        guard stat(path, &status) == 0 else { throw SystemError.opening(path, errno) }
        return try isBlockDevice(status, path)
    }

    private static func isBlockDevice(_ status: stat, _ path: String) throws(DeviceError) -> Bool {
        switch status.st_mode & S_IFMT {
        case S_IFREG: return false
        case S_IFBLK: return true
        case S_IFDIR: throw SystemError.opening(path, EISDIR)
        default:
            throw DeviceError(
                operation: "open", path: path, code: EINVAL,
                reason: "it is neither a regular file nor a block device")
        }
    }

    private static func openDescriptor(
        _ path: String, _ access: Access, _ locking: Locking, _ isBlockDevice: Bool
    ) throws(DeviceError) -> OwnedDescriptor {
        var flags = O_CLOEXEC | (access == .readOnly ? O_RDONLY : O_RDWR)
        if isBlockDevice && locking == .exclusive {
            flags |= O_EXCL
        }
        while true {
            let raw = open(path, flags)
            if raw >= 0 { return OwnedDescriptor(raw) }
            let code = errno
            if code != EINTR { throw SystemError.opening(path, code) }
        }
    }

    /// What was opened is what was looked at.
    private static func verify(
        _ descriptor: Int32, _ path: String, _ wasBlockDevice: Bool
    ) throws(DeviceError) -> stat {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw SystemError.opening(path, errno) }
        guard try isBlockDevice(status, path) == wasBlockDevice else {
            throw DeviceError(
                operation: "open", path: path, code: ESTALE,
                reason: "it was replaced while it was being opened")
        }
        return status
    }

    // udev holds a block device's lock for moments while it looks at what appeared there.
    private static let lockAttempts = 20
    private static let lockPause: UInt32 = 50_000  // microseconds

    private static func lock(
        _ descriptor: Int32, _ path: String, _ isBlockDevice: Bool
    ) throws(DeviceError) {
        var attempt = 0
        while flock(descriptor, LOCK_EX | LOCK_NB) != 0 {
            let code = errno
            switch code {
            case EINTR:
                continue
            case EWOULDBLOCK:
                attempt += 1
                guard isBlockDevice, attempt < lockAttempts else {
                    throw DeviceError(
                        operation: "lock", path: path, code: EBUSY, reason: SystemError.busyReason)
                }
                usleep(lockPause)
            default:
                throw DeviceError(
                    operation: "lock", path: path, code: code,
                    reason: "its file system gives no locks (\(SystemError.words(code)))")
            }
        }
    }

    // MARK: - Geometry

    static func currentSize(
        _ descriptor: Int32, _ path: String, _ isBlockDevice: Bool
    ) throws(DeviceError) -> UInt64 {
        if isBlockDevice {
            var bytes: UInt64 = 0
            let result = clinux_block_size(descriptor, &bytes)
            guard result == 0 else { throw SystemError.opening(path, -result, for: "measure") }
            return bytes
        }
        var status = stat()
        guard fstat(descriptor, &status) == 0 else {
            throw SystemError.opening(path, errno, for: "measure")
        }
        return UInt64(status.st_size)
    }

    private static func sectorOf(
        _ descriptor: Int32, _ path: String, _ isBlockDevice: Bool
    ) throws(DeviceError) -> Int {
        guard isBlockDevice else { return DirectAccess.requestAlignment }
        var bytes: UInt32 = 0
        let result = clinux_block_sector(descriptor, &bytes)
        guard result == 0 else { throw SystemError.opening(path, -result, for: "measure") }
        return Int(bytes)
    }

    // MARK: - Checks

    /// Refuses what reaches beyond the end. A regular file would grow by such a write.
    func checkRange(
        _ operation: String, _ offset: UInt64, _ length: UInt64
    ) throws(DeviceError) {
        let (end, overflow) = offset.addingReportingOverflow(length)
        if !overflow && end <= knownSize.load(ordering: .relaxed) { return }
        let size = self.size
        guard !overflow && end <= size else {
            throw failure(
                operation, offset, EINVAL,
                "\(length) bytes there reach beyond its end at byte \(size)")
        }
    }

    func checkWritable(_ operation: String) throws(DeviceError) {
        guard access == .readWrite else {
            throw failure(operation, nil, EROFS, "it was opened read-only")
        }
    }

    func failure(
        _ operation: String, _ offset: UInt64?, _ code: Int32, _ reason: String? = nil
    ) -> DeviceError {
        DeviceError(
            operation: operation, path: path, offset: offset, code: code,
            reason: reason ?? SystemError.words(code))
    }
}
