// The server restarts in place: SIGUSR2. Its clients go on as if nothing had happened.

import CLibNBD
import Foundation
import Synchronization
import Testing

@Suite struct RestartTests {
    /// Waits until the server has taken over from itself for the `count`-th time.
    private func restart(_ server: Server, _ count: Int) throws {
        server.program.signal(SIGUSR2)
        let happened = eventually(within: 30) {
            server.program.error.components(separatedBy: "took over").count > count
        }
        guard happened else { throw Failure("nobody took over: \(server.program.error)") }
    }

    @Test(arguments: Engine.allCases) func clientsGoOn(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 64 * mebibyte)])
        let server = try Server(pool, engine: engine)
        let unix = try Client(server, "vol")
        let tcp = try Client(server, "vol", via: .tcp)
        for round in 1...3 {
            let offset = UInt64(round) * mebibyte
            let data = pattern(UInt64(round), offset, 1 << 20)
            try unix.write(offset, data)
            try restart(server, round)
            #expect(try tcp.read(offset, 1 << 20) == data)
            try tcp.flush()
        }
        // New ones are let in, too; and the process is the same.
        #expect(try Client(server, "vol").read(0, 512).allSatisfy { $0 == 0 })
        #expect(server.program.isRunning)
        try server.stop()
        #expect(!FileManager.default.fileExists(atPath: server.unixPath))
    }

    /// The kernel's buffers, the server's, and a write that has half arrived.
    @Test(arguments: Engine.allCases) func halfARequestGoesAlong(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 64 * mebibyte)])
        let server = try Server(pool, engine: engine)
        for (round, cut) in [10, 28, 29, 4000, 70_000, 1 << 20].enumerated() {
            let client = try RawClient(server, "vol")
            let data = pattern(UInt64(round), 0, 2 << 20)
            let request =
                bigEndianBytes(RawClient.requestMagic) + bigEndianBytes(UInt16(0))
                + bigEndianBytes(RawClient.write) + bigEndianBytes(UInt64(7))
                + bigEndianBytes(UInt64(0)) + bigEndianBytes(UInt32(data.count)) + data
            try client.send(Array(request.prefix(cut)))
            try restart(server, round + 1)
            try client.send(Array(request.dropFirst(cut)))
            let reply = try client.receive(16)
            #expect(RawClient.word(reply[4..<8]) == 0 && RawClient.word(reply[8..<16]) == 7)
            #expect(try Client(server, "vol").read(0, 2 << 20) == data)
        }
        try server.stop()
    }

    /// Requests that have arrived whole, and were not taken before the restart: the answer needs no
    /// I/O, so nothing else wakes the next server's reactor.
    @Test(arguments: Engine.allCases) func wholeRequestsGoAlong(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 64 * mebibyte)])
        let server = try Server(pool, engine: engine, options: ["--reactors", "1"])
        // As much as one client may have in replies that it does not take.
        let large = 1 << 20
        let many = 16
        try Client(server, "vol").write(0, pattern(1, 0, many * large))
        let client = try RawClient(server, "vol")
        func read(_ offset: UInt64, _ length: Int, cookie: UInt64) -> [UInt8] {
            RawClient.header(
                .simple, RawClient.read, offset: offset, length: UInt64(length), cookie: cookie)
        }
        let blocking = (0..<many).map { read(UInt64($0 * large), large, cookie: 1) }
        let held = (0..<5).map { read(32 * mebibyte + UInt64($0 * 4096), 4096, cookie: 2) }
        try client.send((blocking + held).flatMap { $0 })
        // They have arrived, and the server has sent what the socket takes.
        usleep(300_000)
        server.program.signal(SIGUSR2)
        #expect(eventually(within: 30) { server.program.error.contains("restarting in place") })
        usleep(100_000)
        for _ in 0..<many { _ = try client.receive(16 + large) }
        #expect(eventually(within: 30) { server.program.error.contains("took over") })
        for _ in held {
            let reply = try client.receive(16 + 4096)
            #expect(RawClient.word(reply[8..<16]) == 2)
        }
        try server.stop()
    }

    /// What a server has open is the same after any number of restarts.
    @Test func descriptorsStayAsManyAsTheyWere() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let server = try Server(pool)
        let client = try Client(server, "vol")
        func descriptors() throws -> Int {
            try FileManager.default.contentsOfDirectory(
                atPath: "/proc/\(server.program.pid)/fd"
            ).count
        }
        try restart(server, 1)
        #expect(try client.read(0, 512).count == 512)
        let before = try descriptors()
        for round in 2...4 { try restart(server, round) }
        #expect(try client.read(0, 512).count == 512)
        #expect(eventually { (try? descriptors()) == before })
        try server.stop()
    }

    /// What has arrived takes memory once: neither server holds it twice.
    @Test(.enabled(if: AttackedServer.sanitizer == nil))
    func halfWritesTakeTheirMemoryOnce() throws {
        let attacked = try AttackedServer(
            ["--payload-memory", "128MiB"], volumes: [(AttackedServer.volume, 128 * mebibyte)])
        let server = attacked.server
        let length = 32 << 20
        let writers = try (0..<4).map { _ in try RawClient(server, AttackedServer.volume) }
        for (index, writer) in writers.enumerated() {
            try writer.request(
                RawClient.write, offset: UInt64(index * length), length: UInt32(length),
                cookie: UInt64(index))
            try writer.send([UInt8](repeating: UInt8(index + 1), count: length - 1))
        }
        let before = try attacked.residentBytes()
        #expect(before > writers.count * length)
        var peak = before
        server.program.signal(SIGUSR2)
        let happened = eventually(within: 30) {
            peak = max(peak, (try? attacked.residentBytes("VmHWM")) ?? 0)
            return server.program.error.contains("took over")
        }
        #expect(happened)
        for (index, writer) in writers.enumerated() {
            try writer.send([UInt8(index + 1)])
            let reply = try writer.receive(16)
            #expect(RawClient.word(reply[4..<8]) == 0)
        }
        peak = max(peak, try attacked.residentBytes("VmHWM"))
        // Each reactor has one more of them in its hands.
        #expect(peak < before + 3 * length, "\(peak >> 20) MiB, before \(before >> 20) MiB")
        let reader = try Client(server, AttackedServer.volume)
        for index in writers.indices {
            for offset in [0, length / 2, length - 4096] {
                let bytes = try reader.read(UInt64(index * length + offset), 4096)
                #expect(bytes.allSatisfy { $0 == UInt8(index + 1) })
            }
        }
        try attacked.finish()
    }

    /// Whoever connects while nobody accepts waits, and a handshake goes on where it was.
    @Test func nobodyIsTurnedAway() throws {
        let pool = try TestPool(volumes: [("vol", 8 * mebibyte)])
        let server = try Server(pool)
        let isOver = Mutex(false)
        let workers = Workers(3) { _ in
            while !isOver.withLock({ $0 }) { _ = try Client(server, "vol").read(0, 512) }
        }
        for round in 1...5 { try restart(server, round) }
        isOver.withLock { $0 = true }
        try workers.join()
        #expect(try Client(server, "vol").read(0, 512).count == 512)
        try server.stop()
    }

    @Test func aProgramThatDoesNotRunTakesNothingOver() throws {
        let pool = try TestPool(volumes: [("vol", 8 * mebibyte)])
        let copy = pool.scratch.file("wafer")
        // By another process: no child of this one inherits the file while it is being written.
        #expect(try Program.run("cp", [Program.wafer, copy], in: pool.scratch).status == 0)
        let path = pool.scratch.newFile("sock")
        let program = try Program(copy, ["serve", pool.path, "--unix", path], in: pool.scratch)
        try #require(eventually(within: 30) { program.output.contains("listening") })
        let client = try Client()
        try client.check(nbd_connect_uri(client.handle, "nbd+unix:///vol?socket=\(path)"))
        // As a package manager does it: another file under the same name.
        try FileManager.default.removeItem(atPath: copy)
        try "#!/bin/false\n".write(toFile: copy, atomically: true, encoding: .utf8)
        chmod(copy, 0o755)
        program.signal(SIGUSR2)
        #expect(eventually(within: 30) { program.error.contains("no restart") })
        #expect(try client.read(0, 512).count == 512)
        program.signal(SIGTERM)
        #expect(program.wait(seconds: 30).status == 0)
    }

    /// What the next server would not find: this one stays.
    @Test func nothingIsGivenUpForARestartThatWouldFail() throws {
        let pool = try TestPool(volumes: [("vol", 8 * mebibyte)])
        let credentials = try Credentials()
        let files = FileManager.default
        let directory = pool.scratch.file("run")
        try files.createDirectory(atPath: directory, withIntermediateDirectories: false)
        let server = try Server(
            pool,
            options: [
                "--tls=on", "--tls-certificates", credentials["server"], "--tls-psk",
                credentials.keys, "--pid-file", "\(directory)/pid",
            ])
        let client = try Client(server, "vol")
        let certificate = credentials["server/server-cert.pem"]
        let away = pool.scratch.file("away")
        for (index, (path, substitute)) in [
            (certificate, "/dev/null"), (certificate, credentials["expired/server-cert.pem"]),
            (credentials.keys, nil), (pool.path, nil),
        ].enumerated() {
            try files.moveItem(atPath: path, toPath: away)
            if let substitute {
                try files.createSymbolicLink(atPath: path, withDestinationPath: substitute)
            }
            server.program.signal(SIGUSR2)
            #expect(
                eventually(within: 30) {
                    server.program.error.components(separatedBy: "no restart: ").count > index + 1
                }, "without \(path): \(server.program.error)")
            #expect(try client.read(0, 512).count == 512)
            if substitute != nil { try files.removeItem(atPath: path) }
            try files.moveItem(atPath: away, toPath: path)
        }
        // It is nice to have.
        try files.removeItem(atPath: directory)
        try restart(server, 1)
        #expect(try client.read(0, 512).count == 512)
        let warnings = server.program.error.split(separator: "\n")
            .filter { $0.contains(" warning ") }
        #expect(warnings.contains { $0.contains("cannot write \(directory)/pid") })
        try server.stop()
    }
}
