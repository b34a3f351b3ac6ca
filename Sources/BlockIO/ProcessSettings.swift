// Settings of the whole process that a block server needs before it serves.

import CLinux
import Glibc

public enum ProcessSettings {
    /// Keeps every page in memory from when it is first touched, so that a server whose own swap
    /// or page cache lies on what it serves cannot wait for itself.
    public static func lockMemory() throws(DeviceError) {
        let result = clinux_lock_memory()
        guard result == 0 else {
            throw DeviceError(
                operation: "lock", path: "the process's memory", code: -result,
                reason: "\(SystemError.words(-result)); raise RLIMIT_MEMLOCK or give CAP_IPC_LOCK")
        }
    }

    /// Tells the kernel that this thread cleans pages for others: its allocations must not wait
    /// for write-back to the device it serves. Call it before starting threads: they inherit it.
    public static func setIOFlusher() throws(DeviceError) {
        let result = clinux_set_io_flusher()
        guard result == 0 else {
            throw DeviceError(
                operation: "mark", path: "the process as an I/O flusher", code: -result,
                reason: "\(SystemError.words(-result)); give CAP_SYS_RESOURCE")
        }
    }

    /// Raises the number of open files to what the system allows; returns what it is now.
    @discardableResult
    public static func raiseFileLimit() -> UInt64 {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return 0 }
        let before = limit.rlim_cur
        limit.rlim_cur = limit.rlim_max
        guard setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else {
            return UInt64(before)
        }
        return UInt64(limit.rlim_cur)
    }
}
