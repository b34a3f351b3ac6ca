// Who may connect to the built command: rules, limits, and modes of sockets.

import CLibNBD
import Foundation
import Synchronization
import Testing

@Suite struct AccessTests {
    private static let own = "\(getuid())"

    /// Whether a client gets as far as an export.
    private func isIn(_ client: () throws -> RawClient) throws -> Bool {
        let client = try client()
        guard let isIn = try? client.choose("vol") else {
            // Refused at the door: no greeting, nothing.
            return false
        }
        return isIn
    }

    @Test(arguments: Engine.allCases) func rules(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let group = "\(getgid())"
        for (options, unix, near, far) in [
            ([], true, true, true),
            (["--allow", "unix"], true, false, false),
            (["--deny", "unix"], false, true, true),
            (["--allow", "tcp"], false, true, true),
            (["--allow", "127.0.0.2"], false, true, false),
            (["--deny", "127.0.0.2"], true, false, true),
            (["--allow", "127.0.0.0/30"], false, true, false),
            (["--deny", "127.0.0.0/30", "--allow", "127.0.0.0/8"], false, false, true),
            (["--allow", "127.0.0.0/8", "--deny", "127.0.0.0/30"], false, true, true),
            (["--allow", "uid:\(Self.own)"], true, false, false),
            (["--deny", "uid:\(Self.own)", "--allow", "any"], false, true, true),
            (["--allow", "gid:\(group)"], true, false, false),
            (["--allow", "uid:54321"], false, false, false),
            (["--deny", "any"], false, false, false),
            (["--allow-read-only", "127.0.0.77", "--deny", "tcp"], false, false, true),
        ] {
            let server = try Server(pool, engine: engine, options: options)
            #expect(try isIn { try RawClient(server) } == unix, "\(options), Unix")
            #expect(
                try isIn { try RawClient(server, from: "127.0.0.2") } == near, "\(options), near")
            #expect(
                try isIn { try RawClient(server, from: "127.0.0.77") } == far, "\(options), far")
            try server.stop()
        }
    }

    @Test func refusedClientsSeeAnEndAndNothingElse() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let server = try Server(pool, options: ["--deny", "127.0.0.2"])
        for _ in 0..<500 {
            #expect(try RawClient(server, from: "127.0.0.2").isHungUpOn())
        }
        #expect(try RawClient(server, from: "127.0.0.3").choose("vol"))
        try server.stop()
        let log = server.program.error.split(separator: "\n")
        let lines = log.filter { $0.contains("client refused") && $0.contains("127.0.0.2") }
        #expect((1...60).contains(lines.count), "\(lines.count) lines")
        #expect(log.count < 200)
    }

    @Test func readOnlyClients() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let server = try Server(pool, options: ["--allow-read-only", "tcp", "--allow", "any"])
        let writer = try Client(server, "vol", via: .unix)
        let bytes = pattern(1, 0, 4096)
        try writer.write(0, bytes)
        let reader = try Client(server, "vol", via: .tcp)
        #expect(nbd_is_read_only(reader.handle) == 1 && nbd_is_read_only(writer.handle) == 0)
        #expect(try code { try reader.write(0, bytes) } == EPERM)
        #expect(try code { try reader.trim(0, mebibyte) } == EPERM)
        #expect(try code { try reader.zero(0, mebibyte) } == EPERM)
        #expect(same(try reader.read(0, 4096), bytes))
        try server.stop()
    }

    /// What a connection is allowed by the users and groups that the kernel knows it by.
    @Test(.enabled(if: geteuid() == 0, "to be somebody else takes root"))
    func otherUsers() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        chmod(pool.scratch.path, 0o755)
        for (options, isAllowed) in [
            (["--unix-mode", "0666"], true), (["--unix-mode", "0600"], false), ([], false),
            (["--unix-mode", "0660", "--unix-owner", ":4242"], true),
            (["--unix-mode", "0660", "--unix-owner", "1234:1"], true),
            (["--unix-mode", "0660", "--unix-owner", ":1"], false),
            (["--unix-mode", "0666", "--allow", "uid:1234"], true),
            (["--unix-mode", "0666", "--allow", "uid:0"], false),
            (["--unix-mode", "0666", "--allow", "gid:4321"], true),
            (["--unix-mode", "0666", "--allow", "gid:4242"], true),
            (["--unix-mode", "0666", "--deny", "gid:4242"], false),
            (["--unix-mode", "0666", "--allow", "gid:1234"], false),
        ] {
            let server = try Server(pool, options: options)
            let outcome = try Program.run(
                "setpriv",
                [
                    "--reuid=1234", "--regid=4321", "--groups=4242,4243", "nbdinfo", "--size",
                    server.uri("vol"),
                ], in: pool.scratch)
            #expect((outcome.status == 0) == isAllowed, "\(options): \(outcome)")
            // Root may always open the file; the rules are for everybody.
            try server.stop()
        }
    }

    @Test func modeAndOwner() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        // Whatever the creation mask is.
        for (mask, options, mode) in [
            ("000", [], 0o600), ("777", [], 0o600), ("077", ["--unix-mode", "666"], 0o666),
            ("000", ["--unix-mode", "0"], 0),
        ] {
            let path = pool.scratch.newFile("sock")
            let server = try Program(
                "/bin/sh",
                ["-c", "umask \(mask); exec \"$@\"", "sh", Program.wafer, "serve", pool.path]
                    + ["--unix", path] + options, in: pool.scratch)
            #expect(eventually { server.output.contains(path) }, "\(server.error)")
            var status = stat()
            #expect(stat(path, &status) == 0 && Int(status.st_mode & 0o777) == mode)
            server.signal(SIGTERM)
            #expect(server.wait().status == 0)
        }
    }

    @Test func limitOfOneClient() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let server = try Server(
            pool, options: ["--max-connections-per-client", "3", "--max-connections", "10"])
        let greedy = try (0..<8).map { _ in try RawClient(server, from: "127.0.0.2") }
        let chosen = greedy.map { (try? $0.choose("vol")) == true }
        #expect(chosen.count { $0 } == 3, "\(chosen)")
        // Others do not notice.
        for address in ["127.0.0.3", "127.0.0.4"] {
            for _ in 0..<3 { #expect(try RawClient(server, from: address).choose("vol")) }
        }
        #expect(try Client(server, "vol").read(0, 512).count == 512)
        try server.stop()
    }

    @Test func limitOfOneExport() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte), ("other", mebibyte)])
        let server = try Server(pool, options: ["--max-connections-per-export", "2"])
        let first = try Client(server, "vol")
        let second = try Client(server, "vol")
        let failure = #expect(throws: ClientError.self) { try Client(server, "vol") }
        // libnbd keeps the server's words to itself.
        #expect(failure?.text.contains("policy") == true, "\(failure as Any)")
        #expect(try Client(server, "other").size() == mebibyte)
        try first.disconnect()
        #expect(eventually { (try? Client(server, "vol")) != nil })
        #expect(try second.size() == mebibyte)
        try server.stop()
    }

    /// A thousand that connect and say nothing keep nobody out, from wherever they come.
    @Test func halfOpenFlood() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let server = try Server(pool, options: ["--max-connections", "50"])
        let old = try Client(server, "vol")
        var silent: [RawClient] = []
        for index in 0..<300 {
            silent.append(try RawClient(server, from: "127.0.0.\(2 + index % 100)"))
            if index % 30 == 0 {
                #expect(try RawClient(server, from: "127.1.0.1").choose("vol"))
            }
        }
        #expect(try old.read(0, 512).count == 512)
        try server.stop()
    }

    @Test func timeouts() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let server = try Server(
            pool, options: AttackedServer.shortHandshakes + ["--idle-timeout", "1.5"])
        let silent = try RawClient(server)
        let idle = try RawClient(server, "vol")
        let busy = try Client(server, "vol")
        let isOver = Mutex(false)
        let thread = Workers(1) { _ in
            while !isOver.withLock({ $0 }) {
                _ = try busy.read(0, 512)
                usleep(100_000)
            }
        }
        defer { isOver.withLock { $0 = true } }
        #expect(try silent.receive(18).count == 18)
        #expect(silent.isHungUpOn())
        #expect(idle.isHungUpOn())
        // The busy one has been there for longer than it might be idle.
        usleep(1_500_000)
        isOver.withLock { $0 = true }
        try thread.join()
        try server.stop()
        for words in ["the handshake took too long", "idle"] {
            #expect(server.program.error.contains(words), "\(words)")
        }
    }

    @Test func wrongUsage() throws {
        let pool = try TestPool()
        for (options, words) in [
            (["--allow", "10.0.0.1/8"], "more than 8 bits"), (["--deny", "x"], "ADDRESS/PREFIX"),
            (["--allow-read-only", "uid:nobody-like-this"], "no user"),
            (["--unix-mode", "8"], "mode"), (["--unix-mode", "1777"], "mode"),
            (["--unix-owner", ":"], "owner"), (["--max-connections", "0"], "--max-connections"),
            (["--max-connections-per-client", "-1"], "--max-connections-per-client"),
            (["--handshake-timeout", "0"], "--handshake-timeout"),
            (["--idle-timeout", "-1"], "--idle-timeout"),
            (["--keepalive", "40000"], "--keepalive"),
            (["--stdio", "--unix", "x"], "--stdio"),
            (["--stdio", "--listen", ":0"], "--stdio"),
        ] {
            let outcome = try pool.wafer(["serve", pool.path] + options)
            #expect(outcome.status == 64 && outcome.error.contains(words), "\(options) \(outcome)")
        }
    }
}
