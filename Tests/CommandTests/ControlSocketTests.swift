// The control socket and its clients that nobody wants: that send nonsense, are silent, do not read;
// and a server that has no thread for one more.

import Foundation
import Testing

@Suite struct ControlSocketTests {
    let scratch: Scratch
    init() throws {
        scratch = try Scratch()
        try scratch.makePool()
    }

    private static let status = Array("{\"status\":{}}\n".utf8)
    private static let check = Array("{\"check\":{}}\n".utf8)
    /// A server at work on nothing else does this in milliseconds.
    private static let soon = 5.0

    private func connection() throws -> Int32 {
        let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let path = scratch.pool + "/wafer.sock"
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let code = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        try #require(code == 0)
        return descriptor
    }

    private func say(_ bytes: [UInt8], on descriptor: Int32) {
        var sent = 0
        while sent < bytes.count {
            let count = bytes.withUnsafeBytes {
                send(descriptor, $0.baseAddress! + sent, $0.count - sent, Int32(MSG_NOSIGNAL))
            }
            guard count > 0 else { break }
            sent += count
        }
    }

    /// What comes until the end.
    private func rest(of descriptor: Int32) -> String {
        var received: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 65536)
        while true {
            let count = recv(descriptor, &buffer, buffer.count, 0)
            guard count > 0 else { return String(decoding: received, as: UTF8.self) }
            received += buffer[..<count]
        }
    }

    /// Sends bytes and returns what comes back until the end.
    private func talk(_ bytes: [UInt8]) throws -> String {
        let descriptor = try connection()
        defer { close(descriptor) }
        say(bytes, on: descriptor)
        shutdown(descriptor, Int32(SHUT_WR))
        return rest(of: descriptor)
    }

    // MARK: - Nonsense and silence

    @Test func nonsenseOnTheControlSocket() throws {
        let server = try TestServer(scratch)
        for line in [
            "hello", "{}", "[]", "null", "{\"status\":{},\"volumes\":{}}", "{\"change\":{}}",
            "{\"change\":{\"_0\":{\"create\":{\"name\":\"x\",\"size\":-1}}}}",
            "{\"change\":{\"_0\":{\"create\":{\"name\":\"x\",\"size\":1e30}}}}",
            "{\"change\":{\"_0\":{\"create\":{\"name\":\"x\",\"size\":7}}}}",
            "{\"change\":{\"_0\":{\"create\":{\"name\":\"../x\",\"size\":512}}}}",
            "{\"change\":{\"_0\":{\"forget\":{\"_0\":1}}}}",
            // What a newer command may add, to something that would be done without it.
            "{\"change\":{\"_0\":{\"delete\":{\"ifUnused\":true,\"name\":\"vol\"}}}}",
            "{\"status\":{\"deep\":true}}",
            String(repeating: "[", count: 60_000), "\u{0}\u{1}",
        ] {
            let answer = try talk(Array((line + "\n").utf8))
            #expect(
                answer.hasPrefix("{\"failed\":") && answer.hasSuffix("\n"),
                "\(line.prefix(80)): \(answer)")
        }
        // Too long for a request, without an end, nothing at all.
        #expect(try talk(Array(repeating: UInt8(ascii: "x"), count: 1 << 20)) == "")
        #expect(try talk(Array("{\"status\":{}}".utf8)) == "")
        #expect(try talk([]) == "")
        #expect(try talk([0xFF, 0xFE, 10]).hasPrefix("{\"failed\":"))
        let twice = try talk(Array("{\"status\":{}}\n{\"volumes\":{}}\n".utf8))
        #expect(twice.split(separator: "\n").count == 2)
        try scratch.expectIntact()
        #expect(server.stop().status == 0)
    }

    @Test func silentClientsKeepNobodyOut() throws {
        let server = try TestServer(scratch)
        // More than the server has room for.
        let silent = try (0..<40).map { _ in try connection() }
        defer { for each in silent { close(each) } }
        let began = Date()
        try scratch.must("volume", "create", scratch.pool, "new", "1M")
        #expect(Date().timeIntervalSince(began) < 5)
        // Nor do they keep the server from ending.
        #expect(server.stop().status == 0)
        try scratch.expectIntact(["new", "vol"])
    }

    // MARK: - Clients that do not read

    /// Bytes that wait to be read.
    private func unread(_ descriptor: Int32) -> Int32 {
        var count: Int32 = 0
        _ = ioctl(descriptor, UInt(FIONREAD), &count)
        return count
    }

    /// How many answers there is room for until the server has to wait for the client.
    private func capacity() throws -> Int {
        let descriptor = try connection()
        defer { close(descriptor) }
        var answers = 0
        while true {
            let before = unread(descriptor)
            say(Self.status, on: descriptor)
            guard until(0.5, { unread(descriptor) > before }) else { return answers }
            answers += 1
        }
    }

    /// A client whose check waits for it to read.
    private func stuckCheck() throws -> Int32 {
        let capacity = try capacity()
        let descriptor = try connection()
        for _ in 0..<capacity { say(Self.status, on: descriptor) }
        say(Self.check, on: descriptor)
        usleep(500_000)
        return descriptor
    }

    @Test func anUnreadCheckDoesNotKeepTheServer() throws {
        let server = try TestServer(scratch)
        let descriptor = try stuckCheck()
        defer { close(descriptor) }
        let began = Date()
        #expect(server.stop().status == 0)
        #expect(Date().timeIntervalSince(began) < Self.soon)
        #expect(!rest(of: descriptor).contains("{\"check\":"))
        try scratch.expectIntact()
    }

    @Test func aCheckEndsWithTheServer() throws {
        let server = try TestServer(scratch)
        let descriptor = try stuckCheck()
        defer { close(descriptor) }
        server.running.kill(SIGTERM)
        usleep(200_000)
        let answer = rest(of: descriptor)
        #expect(answer.contains("{\"progress\":") && answer.contains("the server stopped before"))
        #expect(server.running.wait().status == 0)
    }

    @Test func anUnreadCheckDoesNotKeepClientsWaiting() throws {
        let server = try TestServer(scratch)
        let descriptor = try stuckCheck()
        defer { close(descriptor) }
        let began = Date()
        server.running.kill(SIGUSR2)
        usleep(100_000)
        #expect(try server.client("vol", "read -P 0 0 64k").status == 0)
        #expect(until(Self.soon) { server.running.errorSoFar.contains("took over") })
        #expect(Date().timeIntervalSince(began) < Self.soon)
        #expect(try scratch.names() == ["vol"])
        #expect(server.stop().status == 0)
    }

    /// Ten seconds are a client's to read in.
    @Test func anUnreadCheckEnds() throws {
        let server = try TestServer(scratch)
        let before = try threads(server)
        let descriptor = try stuckCheck()
        defer { close(descriptor) }
        #expect(try threads(server) > before)
        #expect(try until(14) { try threads(server) == before })
        #expect(!rest(of: descriptor).contains("{\"check\":"))
        #expect(server.stop().status == 0)
    }

    private func threads(_ server: TestServer) throws -> Int {
        let pid = server.running.process.processIdentifier
        return try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/task").count
    }

    // MARK: - No thread

    /// Root has no limit, so the server is somebody else's then.
    @Test func withoutAThreadACommandIsRefused() throws {
        var program = Program.wafer
        var other: [String] = []
        if geteuid() == 0 {
            let user = "65534"
            other = ["--reuid", user, "--clear-groups"]
            #expect(try scratch.tool("chown", "-R", user, scratch.folder.path).status == 0)
            // Where it was built, that user may not go.
            #expect(try scratch.tool("cp", program, scratch.path("wafer")).status == 0)
            program = scratch.path("wafer")
        }
        func start(_ command: [String]) throws -> Program.Running {
            let setpriv = try #require(Program.find("setpriv"), "setpriv is missing")
            return try Program.Running(setpriv, other + command, in: scratch.folder)
        }
        let server = try start([program, "serve", scratch.pool])
        defer { server.kill(SIGKILL) }
        try #require(until(20) { server.outputSoFar.hasPrefix("listening") })
        let pid = "\(server.process.processIdentifier)"
        func limitProcesses(_ limit: String) throws {
            let outcome = try start(["prlimit", "--pid", pid, "--nproc=\(limit):"]).wait()
            #expect(outcome.status == 0, "\(outcome)")
        }
        try limitProcesses("1")
        let outcome = try scratch.run("volume", "list", scratch.pool)
        #expect(outcome.isFailure && outcome.error.contains("thread"), "\(outcome)")
        try limitProcesses("10000")
        #expect(try scratch.names() == ["vol"])
        server.kill(SIGTERM)
        #expect(server.wait().status == 0)
    }
}
