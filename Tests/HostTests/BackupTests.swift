// Block status with other people's programs, and the recipes of Docs/operations.md that rest on it:
// incremental backup into a chain of qcow2 files, and restoring from it.

import Foundation
import Testing

@Suite struct BackupTests {
    private func run(_ pool: TestPool, _ tool: String, _ arguments: [String]) throws -> String {
        let outcome = try Program.run(tool, arguments, in: pool.scratch)
        try #require(outcome.status == 0, "\(tool) \(arguments): \(outcome)")
        return outcome.output
    }

    /// Writes `length` bytes of `value`.
    private func write(
        _ server: Server, _ volume: String, _ value: Int, at offset: UInt64, _ length: UInt64
    ) throws {
        _ = try run(
            server.pool, "qemu-io",
            ["-f", "raw", "-c", "write -P \(value) \(offset) \(length)", server.uri(volume)])
    }

    /// Offset, length and type of each extent.
    private func map(_ server: Server, _ volume: String, _ context: String) throws -> [[UInt64]] {
        let text = try run(server.pool, "nbdinfo", ["--map=\(context)", server.uri(volume)])
        return text.split(separator: "\n").map { line in
            line.split(separator: " ").prefix(3).compactMap { UInt64($0) }
        }
    }

    @Test(arguments: Engine.allCases) func nbdinfoShowsTheMap(engine: Engine) throws {
        let size: UInt64 = 8 << 40
        let pool = try TestPool(volumes: [("vol", size)])
        let server = try Server(pool, engine: engine)
        let block = pool.blockSize
        try write(server, "vol", 1, at: mebibyte, 2 * block)
        try write(server, "vol", 1, at: 5 << 40, 4096)
        #expect(
            try map(server, "vol", "base:allocation") == [
                [0, mebibyte, 3], [mebibyte, 2 * block, 0],
                [mebibyte + 2 * block, (5 << 40) - mebibyte - 2 * block, 3],
                [5 << 40, block, 0], [5 << 40 + block, size - 5 << 40 - block, 3],
            ])
        try pool.snapshot("vol", "monday")
        try write(server, "vol", 2, at: mebibyte, 512)
        #expect(
            try map(server, "vol", "wafer:changed-since:monday") == [
                [0, mebibyte, 0], [mebibyte, block, 1],
                [mebibyte + block, size - mebibyte - block, 0],
            ])
        #expect(
            try map(server, "vol", "wafer:shared") == [
                [0, mebibyte + block, 0], [mebibyte + block, block, 1],
                [mebibyte + 2 * block, (5 << 40) - mebibyte - 2 * block, 0],
                [5 << 40, block, 1], [5 << 40 + block, size - 5 << 40 - block, 0],
            ])
        let contexts = try run(pool, "nbdinfo", [server.uri("vol")])
        for context in ["base:allocation", "wafer:shared", "wafer:changed-since:monday"] {
            #expect(contexts.contains(context))
        }
    }

    /// A terabyte with some megabytes in it: a tool that reads holes would be at it for hours.
    @Test func copiesCostWhatIsMapped() throws {
        let size: UInt64 = 4 << 40
        let pool = try TestPool(volumes: [("vol", size), ("copy", size)])
        let server = try Server(pool)
        for index in 0..<16 as Range<UInt64> {
            try write(server, "vol", Int(index) + 1, at: index * size / 16, 4096)
        }
        _ = try run(
            pool, "nbdcopy",
            ["--destination-is-zero", server.uri("vol"), server.uri("copy")])
        let copied = try pool.volumes().first { $0.name == "copy" }
        #expect(copied?.mappedBytes == 16 * pool.blockSize)
        _ = try run(
            pool, "qemu-img",
            ["compare", "-f", "raw", "-F", "raw", server.uri("vol"), server.uri("copy")])
    }

    @Test func incrementalBackupAndRestore() throws {
        let size = 64 * mebibyte
        let pool = try TestPool(volumes: [("home", size), ("restored", size)])
        let server = try Server(pool)
        let script = pool.scratch.file("recipe")
        try """
            set -eu
            socket=\(server.unixPath)
            # Writes to \(pool.path)/BACKUP.qcow2 what differs between two snapshots.
            incremental() { # BEFORE AFTER
                export=nbd+unix:///$2?socket=$socket
                qemu-img create -q -f qcow2 -b "$export" -F raw $2.qcow2
                nbdinfo --map=wafer:changed-since:$1 "$export" |
                    awk '$3 == 1 { printf "read %s %s\\n", $1, $2 }' |
                    qemu-io -C -f qcow2 $2.qcow2 > /dev/null
                qemu-img rebase -q -u -f qcow2 -b $1.qcow2 -F qcow2 $2.qcow2
            }
            case $1 in
                full) qemu-img convert -q -O qcow2 nbd+unix:///$2?socket=$socket $2.qcow2 ;;
                incremental) incremental $2 $3 ;;
                restore)
                    qemu-img convert -q -n --target-is-zero -O raw $2.qcow2 \
            nbd+unix:///$3?socket=$socket ;;
            esac
            """.write(toFile: script, atomically: true, encoding: .utf8)
        func recipe(_ arguments: String...) throws {
            let words = arguments.joined(separator: " ")
            _ = try run(pool, "sh", ["-c", "cd \(pool.scratch.path) && sh \(script) \(words)"])
        }
        func snapshot(_ name: String) throws {
            try pool.must("volume", "snapshot", pool.path, "home", name, "--read-only")
        }
        for index in 0..<40 as Range<UInt64> {
            try write(server, "home", 1, at: index * mebibyte, 8192)
        }
        try snapshot("monday")
        try recipe("full", "monday")
        try write(server, "home", 2, at: 3 * mebibyte, 4096)
        try write(server, "home", 2, at: 60 * mebibyte, 100 * 1024)
        // Whole blocks that are given up have to become holes in the copy.
        _ = try run(
            pool, "qemu-io",
            ["-f", "raw", "-d", "unmap", "-c", "discard 5M 1M", server.uri("home")])
        try snapshot("tuesday")
        try recipe("incremental", "monday", "tuesday")
        try write(server, "home", 3, at: 10 * mebibyte, 512)
        try snapshot("wednesday")
        try recipe("incremental", "tuesday", "wednesday")

        // Only what had changed was read: a snapshot's worth of blocks each.
        let files = FileManager.default
        func bytes(_ name: String) throws -> Int {
            let attributes = try files.attributesOfItem(
                atPath: pool.scratch.file("\(name).qcow2"))
            return try #require(attributes[.size] as? Int)
        }
        #expect(try bytes("wednesday") < 1 << 20)
        #expect(try bytes("monday") > 2 << 20)

        for name in ["monday", "tuesday", "wednesday"] {
            let image = pool.scratch.file("\(name).qcow2")
            let compared = try Program.run(
                "qemu-img", ["compare", "-f", "qcow2", "-F", "raw", image, server.uri(name)],
                in: pool.scratch)
            #expect(compared.status == 0, "\(name): \(compared)")
        }
        try recipe("restore", "wednesday", "restored")
        _ = try run(
            pool, "qemu-img",
            ["compare", "-f", "raw", "-F", "raw", server.uri("wednesday"), server.uri("restored")])
        let restored = try pool.volumes().first { $0.name == "restored" }
        let original = try pool.volumes().first { $0.name == "wednesday" }
        #expect(restored?.mappedBytes == original?.mappedBytes)
    }

    /// The snapshots that backups compare with cannot change under them.
    @Test func readOnlySnapshotsAreReadOnlyExports() throws {
        let pool = try TestPool(volumes: [("home", 8 * mebibyte)])
        let server = try Server(pool)
        try pool.must(
            "volume", "snapshot", pool.path, "home", "monday", "--read-only", "--description",
            "before the move")
        let info = try run(pool, "nbdinfo", [server.uri("monday")])
        #expect(info.contains("is_read_only: true") && info.contains("before the move"))
        let refused = try Program.run(
            "qemu-io", ["-f", "raw", "-c", "write 0 4096", server.uri("monday")], in: pool.scratch)
        #expect(refused.status != 0)
        let list = try run(pool, "nbdinfo", ["--list", server.uri("")])
        #expect(list.contains("before the move"))
    }
}
