// wafer serve: its sockets, the other verbs through it, how it ends, and what is there afterwards.

import Foundation
import Testing
import ThinPool

@Suite struct ServeTests {
    let scratch: Scratch
    init() throws {
        scratch = try Scratch()
        try scratch.makePool()
    }

    private var controlSocket: String { scratch.pool + "/wafer.sock" }

    private func volumes() throws -> [VolumeInfo] {
        let list = try scratch.must("volume", "list", scratch.pool, "--json")
        return try JSONDecoder().decode([VolumeInfo].self, from: Data(list.utf8))
    }

    @Test func startsAndStops() throws {
        let server = try TestServer(scratch, ["--pid-file", scratch.path("pid")])
        #expect(server.uri == "nbd+unix:///?socket=\(scratch.pool)/nbd.sock")
        let pid = try String(contentsOfFile: scratch.path("pid"), encoding: .utf8)
        #expect(pid == "\(server.running.process.processIdentifier)\n")
        var status = stat()
        #expect(stat(controlSocket, &status) == 0 && status.st_mode & 0o777 == 0o600)
        let outcome = server.stop()
        #expect(outcome.status == 0, "\(outcome)")
        #expect(outcome.output == "listening on \(server.uri)\n")
        for name in ["pid", "pool/nbd.sock", "pool/wafer.sock"] {
            #expect(!scratch.exists(scratch.path(name)), "\(name) is left")
        }
        try scratch.expectIntact()
    }

    @Test func stopsOnInterrupt() throws {
        let server = try TestServer(scratch)
        server.running.kill(SIGINT)
        #expect(server.running.wait().status == 0)
        try scratch.expectIntact()
    }

    @Test func listensWhereItIsTold() throws {
        let server = try TestServer(
            scratch,
            [
                "--unix", scratch.path("a"), "--unix", scratch.path("b"), "--listen", "127.0.0.1:0",
                "--reactors", "1", "--io", "poll", "--cache-size", "8M", "--payload-memory", "64M",
            ])
        #expect(until(5) { server.running.outputSoFar.split(separator: "\n").count == 3 })
        let lines = server.running.outputSoFar.split(separator: "\n").map(String.init)
        #expect(lines[0].hasSuffix(scratch.path("a")) && lines[1].hasSuffix(scratch.path("b")))
        #expect(lines[2].hasPrefix("listening on nbd://127.0.0.1:"))
        #expect(!scratch.exists(scratch.pool + "/nbd.sock"))
        for line in lines {
            let info = try scratch.tool("nbdinfo", "--list", String(line.dropFirst(13)))
            #expect(info.status == 0 && info.output.contains("export=\"vol\""), "\(info)")
        }
        #expect(server.running.errorSoFar.contains("poll"))
        #expect(server.stop().status == 0)
    }

    @Test func refusesBadSockets() throws {
        _ = try scratch.file("file", size: 5)
        for (arguments, words) in [
            (["--unix", scratch.path("none/sock")], "directory does not exist"),
            (["--unix", scratch.path("file")], "not a socket"),
            (["--unix", "/tmp/" + String(repeating: "x", count: 120)], "shorter"),
            (["--listen", "192.0.2.1:0"], "192.0.2.1"),
            (["--pid-file", scratch.path("none/pid")], "none/pid"),
        ] {
            let outcome = try scratch.run(["serve", scratch.pool] + arguments)
            #expect(
                outcome.status == 1 && outcome.error.contains(words) && outcome.output.isEmpty,
                "\(outcome)")
            #expect(!scratch.exists(controlSocket))
        }
        #expect(try scratch.contents(scratch.path("file")).count == 5)
        try scratch.expectIntact()
    }

    @Test func verbsGoThroughTheServer() throws {
        let server = try TestServer(scratch)
        #expect(try scratch.must("pool", "status", scratch.pool).contains("served       yes"))
        try scratch.must("volume", "create", scratch.pool, "new", "8MiB")
        try scratch.must("volume", "snapshot", scratch.pool, "new", "snap")
        #expect(try scratch.names() == ["new", "snap", "vol"])
        let info = try scratch.tool("nbdinfo", "--size", server.export("snap"))
        #expect(info.output == "\(8 << 20)\n", "\(info)")
        try scratch.must("volume", "delete", scratch.pool, "new")
        #expect(try scratch.run("volume", "delete", scratch.pool, "new").isFailure)
        #expect(try scratch.run("volume", "create", scratch.pool, "snap", "1M").isFailure)
        #expect(try scratch.run("volume", "create", scratch.pool, "a/b", "1M").isFailure)
        #expect(try scratch.must("pool", "check", scratch.pool).hasPrefix("clean"))
        for verb in [
            ["serve", scratch.pool], ["pool", "grow", scratch.pool, "--data-size", "1G"],
            ["pool", "check", scratch.pool, "--clear-needs-check"],
        ] {
            let outcome = try scratch.run(verb)
            #expect(outcome.status == 1 && outcome.error.contains("is being served"), "\(outcome)")
        }
        #expect(server.stop().status == 0)
        try scratch.expectIntact(["snap", "vol"])
    }

    @Test func writtenDataIsThereAfterwards() throws {
        var server = try TestServer(scratch)
        let write = try server.client("vol", "write -P 0x5a 1M 3M", "write -P 7 31M 1M")
        #expect(write.status == 0, "\(write)")
        try scratch.must("volume", "snapshot", scratch.pool, "vol", "snap")
        #expect(try server.client("vol", "write -P 0x11 1M 1M").status == 0)
        // No flush was asked for: a clean end commits.
        #expect(server.stop().status == 0)
        let check = try scratch.tool("thin_check", scratch.pool + "/metadata")
        #expect(check.status == 0, "\(check)")
        try scratch.expectIntact(["snap", "vol"])

        server = try TestServer(scratch)
        for (export, command) in [
            ("vol", "read -P 0x11 1M 1M"), ("vol", "read -P 0x5a 2M 2M"),
            ("vol", "read -P 7 31M 1M"),
            ("vol", "read -P 0 0 1M"), ("snap", "read -P 0x5a 1M 3M"), ("snap", "read -P 0 4M 27M"),
        ] {
            let read = try server.client(export, command)
            #expect(
                read.status == 0 && !read.output.contains("fail"), "\(export) \(command): \(read)")
        }
        #expect(server.stop().status == 0)
    }

    @Test func killedAndOpenedAgain() throws {
        let server = try TestServer(scratch)
        #expect(try server.client("vol", "write -P 0x5a 0 4M", "flush").status == 0)
        try scratch.must("volume", "snapshot", scratch.pool, "vol", "snap")
        #expect(try server.client("vol", "write -f -P 0x22 0 64k").status == 0)
        server.running.kill(SIGKILL)
        #expect(server.running.wait().status == 128 + SIGKILL)
        // What is left of it is in nobody's way.
        #expect(scratch.exists(controlSocket))
        let check = try scratch.tool("thin_check", scratch.pool + "/metadata")
        #expect(check.status == 0, "\(check)")
        try scratch.expectIntact(["snap", "vol"])

        let next = try TestServer(scratch)
        for (export, command) in [
            ("vol", "read -P 0x22 0 64k"), ("vol", "read -P 0x5a 64k 4032k"),
            ("snap", "read -P 0x5a 0 4M"),
        ] {
            let read = try next.client(export, command)
            #expect(
                read.status == 0 && !read.output.contains("fail"), "\(export) \(command): \(read)")
        }
        #expect(next.stop().status == 0)
        try scratch.expectIntact(["snap", "vol"])
    }

    @Test func readOnly() throws {
        var server = try TestServer(scratch)
        #expect(try server.client("vol", "write -P 9 0 64k").status == 0)
        #expect(server.stop().status == 0)
        let before = try scratch.contents(scratch.pool + "/metadata")
        server = try TestServer(scratch, ["--read-only"])
        let outcome = try scratch.run("volume", "create", scratch.pool, "new", "1M")
        #expect(outcome.isFailure && outcome.error.contains("read-only"), "\(outcome)")
        let info = try scratch.tool("nbdinfo", server.export("vol"))
        #expect(info.output.contains("is_read_only: true"), "\(info)")
        #expect(server.stop().status == 0)
        #expect(try scratch.contents(scratch.pool + "/metadata") == before)
        try scratch.expectIntact()
    }

    @Test func deletesOnlyWhatIsNotInUse() throws {
        let server = try TestServer(scratch)
        let program = try #require(Program.find("qemu-io"), "qemu-io is missing")
        let client = try Program.Running(
            program, ["-f", "raw", server.export("vol"), "-c", "sleep 60000"], in: scratch.folder)
        defer { client.kill(SIGKILL) }
        #expect(try until(10) { try volumes().first?.connections == 1 })
        let outcome = try scratch.run("volume", "delete", scratch.pool, "vol")
        #expect(outcome.isFailure && outcome.error.contains("in use by 1 connection"), "\(outcome)")
        client.kill(SIGKILL)
        #expect(try until(10) { try volumes().first?.connections == 0 })
        try scratch.must("volume", "delete", scratch.pool, "vol")
        #expect(server.stop().status == 0)
        try scratch.expectIntact([])
    }

    /// More than is deleted in one go: blocks come back in the background, or at the next start.
    @Test func largeDeletion() throws {
        try scratch.must("pool", "create", scratch.path("big"), "--data-size", "1GiB")
        let big = scratch.path("big")
        try scratch.must("volume", "create", big, "vol", "512MiB")
        let server = try Program.Running(Program.wafer, ["serve", big], in: scratch.folder)
        defer { server.kill(SIGKILL) }
        #expect(until(20) { server.outputSoFar.hasPrefix("listening") })
        let program = try #require(Program.find("qemu-io"), "qemu-io is missing")
        let uri = "nbd+unix:///vol?socket=\(big)/nbd.sock"
        let writer = try Program.Running(
            program,
            ["-f", "raw", uri] + (0..<16).flatMap { ["-c", "write -P 1 \($0 * 20)M 20M"] },
            in: scratch.folder)
        let written = writer.wait()
        try #require(written.status == 0, "\(written)")
        #expect(
            try until(10) {
                try scratch.must("volume", "list", big).contains("ready") && usedBlocks(big) > 5000
            })
        try scratch.must("volume", "delete", big, "vol")
        #expect(try until(30) { try usedBlocks(big) == 1 })
        server.kill(SIGTERM)
        #expect(server.wait().status == 0)
        #expect(try scratch.must("pool", "check", big).hasPrefix("clean"))
    }

    private func usedBlocks(_ pool: String) throws -> UInt64 {
        let status = try scratch.must("pool", "status", pool, "--json")
        return try JSONDecoder().decode(PoolStatus.self, from: Data(status.utf8)).dataBlocksUsed
    }

    @Test func manyCommandsAtOnce() throws {
        let server = try TestServer(scratch)
        let running = try (0..<24).map {
            try Program.Running(
                Program.wafer, ["volume", "create", scratch.pool, "v\($0)", "1MiB"],
                in: scratch.folder)
        }
        var refused = 0
        for each in running {
            let outcome = each.wait()
            if outcome.status != 0 {
                #expect(outcome.isFailure && outcome.error.contains("try again"), "\(outcome)")
                refused += 1
            }
        }
        #expect(try scratch.names().count == 25 - refused)
        #expect(server.stop().status == 0)
    }

    @Test func manyCommandsWithoutAServer() throws {
        let running = try (0..<4).map {
            try Program.Running(
                Program.wafer, ["volume", "create", scratch.pool, "v\($0)", "1MiB"],
                in: scratch.folder)
        }
        for each in running {
            let outcome = each.wait()
            #expect(outcome.status == 0, "\(outcome)")
        }
        try scratch.expectIntact(["v0", "v1", "v2", "v3", "vol"])
    }
}
