// Storage that fails in the ways that a test needs: file systems that are full. Takes root.

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
