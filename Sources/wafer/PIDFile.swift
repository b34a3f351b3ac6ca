// The file that says which process serves: `wafer serve --pid-file`.
//
// 1. Nothing is replaced but what a server left: a regular file that is empty, or has the number of a
//    process in it that is no server any more.
// 2. It is replaced in one step: nobody reads half a number.
// 3. Nothing is removed but a file with this process's own number.

import BlockIO
import Control
import Glibc

struct PIDFile {
    let path: String

    /// More than a process id and white space have.
    private static let tooLong = 32

    func write() throws(ControlError) {
        if let owner = try owner(), owner != getpid(), Self.isServer(owner) {
            throw ControlError(
                .busy, "\(path) is the pid file of process \(owner), which runs: give another path")
        }
        let draft = "\(path).\(getpid())"
        guard let file = fopen(draft, "wxe") else { throw cannot("write") }
        let isWritten = fputs("\(getpid())\n", file) >= 0
        guard fclose(file) == 0, isWritten, rename(draft, path) == 0 else {
            let error = cannot("write")
            unlink(draft)
            throw error
        }
    }

    func remove() {
        if let owner = try? owner(), owner == getpid() { unlink(path) }
    }

    /// Whose number is in the file; nil: there is no file, or nothing in it.
    private func owner() throws(ControlError) -> pid_t? {
        var status = stat()
        guard lstat(path, &status) == 0 else {
            if errno == ENOENT { return nil }
            throw cannot("write")
        }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw ControlError(.refused, "\(path) is not a regular file: give another --pid-file")
        }
        guard status.st_size > 0 else { return nil }
        guard let text = Self.contents(path) else { throw cannot("read") }
        let words = text.split(whereSeparator: \.isWhitespace)
        guard status.st_size < Self.tooLong, words.count == 1, let process = pid_t(words[0]),
            process > 0
        else {
            throw ControlError(
                .refused,
                "\(path) has something else in it than a process id: give another --pid-file")
        }
        return process
    }

    /// Whether a process is of this program; its number may have become another's.
    private static func isServer(_ process: pid_t) -> Bool {
        guard let name = contents("/proc/\(process)/comm") else { return false }
        return name == contents("/proc/self/comm")
    }

    /// The first bytes of a file; nil, with errno: it cannot be read.
    private static func contents(_ path: String) -> String? {
        let file = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC)
        guard file >= 0 else { return nil }
        defer { close(file) }
        var bytes = [UInt8](repeating: 0, count: tooLong)
        let count = read(file, &bytes, bytes.count)
        return count < 0 ? nil : String(decoding: bytes.prefix(count), as: UTF8.self)
    }

    private func cannot(_ operation: String) -> ControlError {
        ControlError(.device, "cannot \(operation) \(path): \(SystemError.words(errno))")
    }
}
