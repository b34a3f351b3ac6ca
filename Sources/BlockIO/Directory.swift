// A new name survives a power cut only once the directory that holds it is flushed.

import Glibc

package enum Directory {
    /// The directory that the path's last name is in.
    package static func holding(_ path: String) -> String {
        var trimmed = path[...]
        while trimmed.count > 1, trimmed.hasSuffix("/") { trimmed.removeLast() }
        guard let slash = trimmed.lastIndex(of: "/") else { return "." }
        return slash == trimmed.startIndex ? "/" : String(trimmed[..<slash])
    }

    package static func flush(_ path: String) throws(DeviceError) {
        let raw = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard raw >= 0 else { throw SystemError.opening(path, errno) }
        let descriptor = OwnedDescriptor(raw)
        guard fsync(descriptor.raw) == 0 else {
            throw DeviceError(
                operation: "flush", path: path, code: errno, reason: SystemError.words(errno))
        }
    }
}
