// How clients reach the built command: addresses, sockets from a service manager, standard input.

import CLibNBD
import Foundation
import Testing

@Suite struct WaysInTests {
    /// A listening socket on 127.0.0.1, and its port.
    private func tcpListener() throws -> (descriptor: Int32, port: UInt16) {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        var name = sockaddr_in()
        name.sin_family = sa_family_t(AF_INET)
        inet_pton(AF_INET, "127.0.0.1", &name.sin_addr)
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let isBound = withUnsafeMutablePointer(to: &name) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(descriptor, $0, length) == 0 && getsockname(descriptor, $0, &length) == 0
            }
        }
        try #require(isBound && listen(descriptor, 16) == 0)
        return (descriptor, UInt16(bigEndian: name.sin_port))
    }

    private func unixSocket(
        _ path: String, _ type: __socket_type, abstract: Bool = false
    ) throws -> Int32 {
        let descriptor = socket(AF_UNIX, Int32(type.rawValue | SOCK_CLOEXEC.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) {
            $0.copyBytes(from: path.utf8)
            if abstract { $0[0] = 0 }
        }
        let length = MemoryLayout<sockaddr_un>.offset(of: \.sun_path)! + path.utf8.count
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(descriptor, $0, socklen_t(abstract ? length : length + 1))
            }
        }
        try #require(result == 0, "bind \(path): \(errno)")
        if type == SOCK_STREAM { try #require(listen(descriptor, 16) == 0) }
        return descriptor
    }

    /// What comes within some seconds; "": nothing does.
    private func message(_ descriptor: Int32, seconds: Int = 20) -> String {
        var time = timeval(tv_sec: seconds, tv_usec: 0)
        setsockopt(
            descriptor, SOL_SOCKET, SO_RCVTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
        var bytes = [UInt8](repeating: 0, count: 256)
        let count = recv(descriptor, &bytes, bytes.count, 0)
        return String(decoding: bytes.prefix(max(count, 0)), as: UTF8.self)
    }

    /// As a service manager starts it: in a process whose id is in LISTEN_PID.
    private func activated(
        _ pool: TestPool, _ sockets: [Int32], process: String = "$$", count: String? = nil,
        options: [String] = [], notify: String? = nil
    ) throws -> Program {
        var environment = ["LISTEN_FDS": count ?? "\(sockets.count)"]
        environment["LISTEN_FDNAMES"] = sockets.indices.map { "socket\($0)" }
            .joined(separator: ":")
        environment["NOTIFY_SOCKET"] = notify
        return try Program(
            "/bin/sh",
            ["-c", "LISTEN_PID=\(process) exec \"$@\"", "sh", Program.wafer, "serve", pool.path]
                + options,
            in: pool.scratch, environment: environment, inherited: sockets)
    }

    @Test(arguments: Engine.allCases) func activation(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let path = pool.scratch.file("activated.sock")
        let (tcp, port) = try tcpListener()
        let unix = try unixSocket(path, SOCK_STREAM)
        let notify = try unixSocket(pool.scratch.file("notify"), SOCK_DGRAM)
        defer { for descriptor in [tcp, unix, notify] { close(descriptor) } }
        let uris = ["nbd+unix:///vol?socket=\(path)", "nbd://127.0.0.1:\(port)/vol"]
        for sockets in [[unix, tcp], [unix], [tcp]] {
            let server = try activated(
                pool, sockets, options: engine == .poll ? ["--io", "poll"] : [],
                notify: pool.scratch.file("notify"))
            #expect(message(notify) == "READY=1", "\(server.error)")
            // Ready means that somebody accepts.
            for uri in sockets.map({ uris[$0 == unix ? 0 : 1] }) {
                let info = try Program.run("nbdinfo", ["--size", String(uri)], in: pool.scratch)
                #expect(info.output == "\(mebibyte)\n", "\(info)")
            }
            #expect(server.output.isEmpty)
            let lines = server.error.split(separator: "\n")
            #expect(lines.count { $0.contains("listening on nbd") } == sockets.count)
            #expect(access(pool.path + "/nbd.sock", F_OK) != 0)
            let names = try FileManager.default.contentsOfDirectory(
                atPath: "/proc/\(server.pid)/fd")
            #expect(names.contains("3"))
            server.signal(SIGTERM)
            #expect(message(notify) == "STOPPING=1")
            let outcome = server.wait()
            #expect(outcome.status == 0, "\(outcome)")
            #expect(access(path, F_OK) == 0)
        }
    }

    /// Who connects while no server runs is served by the next one.
    @Test func clientsWaitAcrossARestart() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let (tcp, port) = try tcpListener()
        defer { close(tcp) }
        for _ in 0..<3 {
            let first = try activated(pool, [tcp])
            #expect(eventually { first.error.contains("listening") })
            first.signal(SIGTERM)
            let scratch = pool.scratch
            let client = try Program(
                try #require(Program.find("nbdinfo")),
                ["--size", "nbd://127.0.0.1:\(port)/vol"], in: scratch)
            #expect(first.wait().status == 0)
            usleep(50_000)
            let second = try activated(pool, [tcp])
            // Either server may have had it; if it was the first, it was answered.
            let outcome = client.wait(seconds: 20)
            #expect(outcome.output == "\(mebibyte)\n" || outcome.status != 0, "\(outcome)")
            let late = try Program.run(
                "nbdinfo", ["--size", "nbd://127.0.0.1:\(port)/vol"], in: scratch)
            #expect(late.output == "\(mebibyte)\n", "\(late)")
            second.signal(SIGTERM)
            #expect(second.wait().status == 0)
        }
        // Nobody runs now; the connection is made, and waits.
        let early = try Program(
            try #require(Program.find("nbdinfo")), ["--size", "nbd://127.0.0.1:\(port)/vol"],
            in: pool.scratch)
        usleep(300_000)
        #expect(early.isRunning)
        let server = try activated(pool, [tcp])
        #expect(early.wait(seconds: 20).output == "\(mebibyte)\n")
        server.signal(SIGTERM)
        #expect(server.wait().status == 0)
    }

    @Test func activationThatIsNotMeant() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let (tcp, _) = try tcpListener()
        let file = open("/dev/null", O_RDWR | O_CLOEXEC)
        defer { for descriptor in [tcp, file] { close(descriptor) } }
        // For another process: as if there were none.
        for process in ["1", "", "x", "0$$"] {
            let server = try activated(pool, [tcp], process: process)
            #expect(eventually { server.output.contains("listening") })
            #expect(server.output.contains("\(pool.path)/nbd.sock"), "\(server.output)")
            server.signal(SIGTERM)
            #expect(server.wait().status == 0)
        }
        for (sockets, count, options, status, words) in [
            ([tcp], nil, ["--unix", "/tmp/x"], 64, "LISTEN_FDS"),
            ([tcp], nil, ["--listen", "127.0.0.1:0"], 64, "LISTEN_FDS"),
            ([tcp], nil, ["--stdio"], 64, "LISTEN_FDS"), ([tcp], "x", [], 1, "LISTEN_FDS"),
            ([tcp], "-1", [], 1, "LISTEN_FDS"), ([tcp], "900", [], 1, "not open"),
            ([file], nil, [], 1, "not a Unix or TCP socket"),
        ] as [([Int32], String?, [String], Int32, String)] {
            let server = try activated(pool, sockets, count: count, options: options)
            let outcome = server.wait(seconds: 20)
            #expect(
                outcome.status == status && outcome.error.contains(words),
                "\(options) \(count ?? ""): \(outcome)")
        }
    }

    @Test func notificationByAbstractSocket() throws {
        let pool = try TestPool()
        let name = "@wafer-\(getpid())-\(UInt32.random(in: 0...UInt32.max))"
        let notify = try unixSocket(name, SOCK_DGRAM, abstract: true)
        defer { close(notify) }
        let server = try Program(
            Program.wafer, ["serve", pool.path], in: pool.scratch,
            environment: ["NOTIFY_SOCKET": name])
        #expect(message(notify) == "READY=1")
        let uri = "nbd+unix:///?socket=\(pool.path)/nbd.sock"
        #expect(try Program.run("nbdinfo", ["--list", uri], in: pool.scratch).status == 0)
        server.signal(SIGTERM)
        #expect(message(notify) == "STOPPING=1")
        #expect(server.wait().status == 0)
        // Nobody listens there: it serves all the same.
        for address in ["/nonexistent/notify", "relative", "@"] {
            let server = try Program(
                Program.wafer, ["serve", pool.path], in: pool.scratch,
                environment: ["NOTIFY_SOCKET": address])
            #expect(eventually { server.output.contains("listening") })
            server.signal(SIGTERM)
            let outcome = server.wait()
            #expect(outcome.status == 0 && outcome.error.contains("READY=1"), "\(outcome)")
        }
    }

    /// libnbd plays systemd, too, and the server inherits the client's standard output.
    @Test func activationByLibnbd() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte), ("other", mebibyte)])
        func run(
            _ tool: String, _ options: String..., server: String..., end: String...
        ) throws -> Outcome {
            let command = [Program.wafer, "serve", "--exit-with-parent"] + server + [pool.path]
            return try Program.run(
                tool, options + ["--", "["] + command + ["]"] + end, in: pool.scratch)
        }
        let info = try run("nbdinfo", "--size", server: "--default-export", "vol")
        #expect(info.status == 0 && info.output == "\(mebibyte)\n", "\(info)")
        let copy = try run("nbdcopy", server: "--default-export", "vol", end: "-")
        #expect(copy.status == 0)
        #expect(copy.output.utf8.elementsEqual(repeatElement(0, count: Int(mebibyte))))
        // The client does not say which volume, fails, and leaves its server alone.
        #expect(try run("nbdinfo", "--size").status != 0)
        let hasEnded = try eventually {
            let status = try pool.wafer(["pool", "status", pool.path])
            return status.output.contains("served       no")
        }
        #expect(hasEnded)
        try pool.expectClean()
    }

    @Test(arguments: Engine.allCases) func standardInput(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        for ending in ["good-bye", "hang up"] {
            let ends = try socketPair()
            let server = try Program(
                Program.wafer, ["serve", pool.path, "--stdio", "--log-level", "trace"],
                in: pool.scratch, environment: engine.environment, input: ends[1])
            close(ends[1])
            do {
                let client = try client(on: ends[0])
                let bytes = pattern(3, 0, 65536)
                try client.write(0, bytes)
                #expect(same(try client.read(0, 65536), bytes))
                #expect(access(pool.path + "/nbd.sock", F_OK) != 0)
                if ending == "good-bye" { try client.disconnect() }
            }
            let outcome = server.wait(seconds: 20)
            #expect(outcome.status == 0, "\(ending): \(outcome)")
            #expect(outcome.error.contains("the client has gone"))
            #expect(outcome.error.contains("everything is committed"))
            try pool.expectClean()
        }
    }

    private func client(on socket: Int32) throws -> Client {
        let client = try Client()
        try client.check(nbd_set_export_name(client.handle, "vol"))
        try client.check(nbd_connect_socket(client.handle, socket))
        return client
    }

    private func socketPair() throws -> [Int32] {
        var ends: [Int32] = [-1, -1]
        try #require(
            socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends)
                == 0)
        return ends
    }

    /// inetd gives the socket as standard error, too.
    @Test func standardInputFromInetd() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let ends = try socketPair()
        let server = try Program(
            "/bin/sh",
            ["-c", "exec \"$@\" 2>&0", "sh", Program.wafer, "serve", pool.path, "--stdio"],
            in: pool.scratch, input: ends[1])
        close(ends[1])
        let client = try client(on: ends[0])
        let bytes = pattern(5, 0, 65536)
        try client.write(0, bytes)
        #expect(same(try client.read(0, 65536), bytes))
        try client.disconnect()
        #expect(server.wait(seconds: 20).status == 0)
        try pool.expectClean()
    }

    @Test func endsWithItsParent() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let file = pool.scratch.file("pid")
        let parent = try Program(
            "/bin/sh",
            [
                "-c", "\"$@\" & until [ -s \(file) ]; do sleep 0.05; done; kill -9 $$", "sh",
                Program.wafer, "serve", pool.path, "--exit-with-parent", "--pid-file", file,
            ], in: pool.scratch)
        #expect(parent.wait(seconds: 20).status == 128 + SIGKILL)
        let hasEnded = eventually { parent.error.contains("everything is committed") }
        #expect(hasEnded, "\(parent.error)")
        #expect(eventually { access(file, F_OK) != 0 })
        let text = try? String(contentsOfFile: file, encoding: .utf8)
        if !hasEnded, let pid = text.flatMap({ pid_t($0.dropLast()) }) {
            kill(pid, SIGKILL)
        }
    }

    /// As programs with libnbd start a server of their own.
    @Test func connectCommand() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let client = try Client()
        try client.check(nbd_set_export_name(client.handle, "vol"))
        var arguments = [Program.wafer, "serve", pool.path, "--stdio"].map {
            (argument: String) -> UnsafeMutablePointer<CChar>? in strdup(argument)
        }
        defer { for argument in arguments { free(argument) } }
        arguments.append(nil)
        try client.check(nbd_connect_command(client.handle, &arguments))
        #expect(try client.size() == mebibyte)
        try client.write(0, pattern(4, 0, 4096))
        #expect(same(try client.read(0, 4096), pattern(4, 0, 4096)))
        try client.disconnect()
    }

    @Test func standardInputThatIsNoClient() throws {
        let pool = try TestPool()
        let (listener, _) = try tcpListener()
        let null = open("/dev/null", O_RDWR | O_CLOEXEC)
        var pipe: [Int32] = [-1, -1]
        #expect(Glibc.pipe(&pipe) == 0)
        for end in pipe { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        defer { for descriptor in [listener, null] + pipe { close(descriptor) } }
        for (input, words) in [
            (null, "not a stream socket"), (pipe[0], "not a stream socket"),
            (listener, "not connected"),
        ] {
            let server = try Program(
                Program.wafer, ["serve", pool.path, "--stdio"], in: pool.scratch, input: input)
            let outcome = server.wait(seconds: 20)
            #expect(outcome.status == 1 && outcome.error.contains(words), "\(outcome)")
        }
    }

    @Test func whatIsPrintedIsAURI() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let path = "\(pool.scratch.path)/a b&c%41+#é?.sock"
        let server = try Program(
            Program.wafer, ["serve", pool.path, "--unix", path], in: pool.scratch)
        try #require(eventually { server.output.hasSuffix("\n") }, "\(server.error)")
        let uri = server.output.split(separator: " ").last!.dropLast()
            .replacing("nbd+unix:///?", with: "nbd+unix:///vol?")
        let info = try Program.run("nbdinfo", ["--size", String(uri)], in: pool.scratch)
        #expect(info.status == 0 && info.output == "\(mebibyte)\n", "\(uri): \(info)")
        server.signal(SIGTERM)
        #expect(server.wait().status == 0)
    }

    @Test func internetProtocolVersion6() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        for (options, isAllowed) in [
            ([], true), (["--allow", "::1"], true), (["--allow", "::/0"], true),
            (["--allow", "fe80::/10"], false), (["--deny", "::1"], false),
            (["--allow", "0.0.0.0/0"], false),
        ] {
            let server = try Program(
                Program.wafer, ["serve", pool.path, "--listen", "[::1]:0"] + options,
                in: pool.scratch)
            let marker = "listening on nbd://[::1]:"
            #expect(eventually { server.output.hasPrefix(marker) }, "\(server.error)")
            let port = server.output.dropFirst(marker.count).dropLast()
            #expect(UInt16(port).map { $0 != 0 } == true)
            let info = try Program.run(
                "nbdinfo", ["--size", "nbd://[::1]:\(port)/vol"], in: pool.scratch)
            #expect((info.status == 0) == isAllowed, "\(options): \(info)")
            server.signal(SIGTERM)
            #expect(server.wait().status == 0)
        }
    }
}
