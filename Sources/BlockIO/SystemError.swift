// From errno to a DeviceError whose reason says what to do, for the cases an operator meets.

import Glibc

package enum SystemError {
    /// The system's words for an errno, beginning in lower case to follow "cannot … : ".
    package static func words(_ code: Int32) -> String {
        let text = String(cString: strerror(code))
        guard let first = text.first, text.dropFirst().first?.isUppercase != true else {
            return text
        }
        return first.lowercased() + text.dropFirst()
    }

    /// What opening a path failed with.
    static func opening(_ path: String, _ code: Int32, for operation: String = "open")
        -> DeviceError
    {
        let reason =
            switch code {
            case ENOENT: "there is no such file or device"
            case ENOTDIR: "part of the path is not a directory"
            case EISDIR: "it is a directory, not a file or a block device"
            case EACCES, EPERM: "permission denied; check its owner and mode, or run as root"
            case EROFS: "it is read-only, and it is to be written to"
            case EBUSY: busyReason
            case ENXIO, ENODEV: "there is no device behind it"
            case ENOMEDIUM: "there is no medium in it"
            case EEXIST: "it exists already"
            case EMFILE: "this process has too many files open; raise its limit (ulimit -n)"
            default: words(code)
            }
        return DeviceError(operation: operation, path: path, code: code, reason: reason)
    }

    static let busyReason =
        "another process has it open (another server, a mount, or a device built on it)"
}
