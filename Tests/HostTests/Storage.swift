// Storage that fails in the ways that a test needs: file systems that are full, disks with large
// sectors. Takes root.

import Foundation
import Testing

/// A file system in memory with so much room; unmounted with the value.
final class SmallFileSystem {
    let path: String
    private let scratch: Scratch

    init(size: UInt64) throws {
        scratch = try Scratch()
        path = scratch.file("mount")
        try FileManager.default.createDirectory(
            atPath: path, withIntermediateDirectories: false)
        let outcome = try Program.run(
            "mount", ["-t", "tmpfs", "-o", "size=\(size)", "tmpfs", path], in: scratch)
        guard outcome.status == 0 else { throw Failure("mount: \(outcome)") }
    }

    deinit { _ = try? Program.run("umount", ["--lazy", path], in: scratch) }

    func file(_ name: String) -> String { "\(path)/\(name)" }

    /// Leaves room for nothing.
    func fill() throws {
        let descriptor = open(file("filling"), O_CREAT | O_WRONLY | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw Failure("open: \(errno)") }
        defer { close(descriptor) }
        let bytes = [UInt8](repeating: 1, count: 4096)
        while write(descriptor, bytes, bytes.count) > 0 {}
        guard errno == ENOSPC else { throw Failure("write: \(errno)") }
    }
}

/// A loop device over a new file, detached with the value.
final class LoopDevice {
    let path: String
    let file: String
    private let scratch: Scratch

    init(over file: String, size: UInt64, sector: Int) throws {
        scratch = try Scratch()
        self.file = file
        guard FileManager.default.createFile(atPath: file, contents: nil),
            truncate(file, off_t(size)) == 0
        else { throw Failure("\(file): \(errno)") }
        let outcome = try Program.run(
            "losetup", ["--find", "--show", "--sector-size", "\(sector)", file], in: scratch)
        guard outcome.status == 0 else { throw Failure("losetup: \(outcome)") }
        path = outcome.output.trimmingCharacters(in: .whitespacesAndNewlines)
    }

    deinit { _ = try? Program.run("losetup", ["--detach", path], in: scratch) }

    /// Has the kernel write what it holds for the device.
    /// - Returns: the errno.
    func writeBack() -> Int32 {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return errno }
        defer { close(descriptor) }
        return fdatasync(descriptor) == 0 ? 0 : errno
    }
}
