// A server that hostile clients are let loose on, and what has to hold whatever they do.
//
// 1. Meanwhile and afterwards a client that behaves is served at once.
// 2. The server crashes nowhere, ends with status 0 when it is told to, and leaves a clean pool.
// 3. The program may be built with a sanitizer (Scripts/sanitize): then it is slow, and memory is not
//    what is measured.

import Foundation
import Testing

final class AttackedServer: Sendable {
    let server: Server
    static let volume = "vol"
    static let size = 64 * mebibyte

    /// What the program was built with: address, thread or nothing.
    static let sanitizer = ProcessInfo.processInfo.environment["WAFER_SANITIZER"]
    /// How long something may take that is done at once, on a machine that does other things, too.
    static let soon = sanitizer == nil ? 5.0 : 15.0
    /// What a handshake may take where its end is waited for: little, but not so little that a client
    /// that behaves would be late.
    static let handshakeSeconds: UInt32 = sanitizer == nil ? 1 : 5
    static let shortHandshakes = ["--handshake-timeout", "\(handshakeSeconds)"]

    init(
        _ options: [String] = [], volumes: [(String, UInt64)] = [(volume, size)],
        engine: Engine = .ring, files: Int? = nil
    ) throws {
        let pool = try TestPool(volumes: volumes)
        server = try Server(
            pool, engine: engine, options: ["--reactors", "2"] + options, files: files)
    }

    var pool: TestPool { server.pool }

    /// A client that behaves connects, chooses, reads and leaves.
    func expectService(_ export: String = volume, within seconds: Double = soon) throws {
        let began = Date()
        for _ in 0..<2 {  // One for each reactor.
            let client = try RawClient(server, export)
            #expect(try client.error(RawClient.read, length: 4096) == 0)
            try client.request(RawClient.disconnect, cookie: 1)
        }
        let took = Date().timeIntervalSince(began)
        #expect(took < seconds, "a client was kept waiting for \(took) s")
    }

    /// The last word: served, ended, clean.
    func finish(_ export: String = volume) throws {
        try expectService(export)
        try server.stop()
        try expectNoCrash()
    }

    /// After the end, which was a clean one.
    func expectNoCrash() throws {
        let log = server.program.error
        for words in ["Fatal error", "Program crashed", "Sanitizer"] {
            #expect(!log.contains(words), "\(log)")
        }
        #expect(log.contains("everything is committed"), "\(log)")
        let check = try pool.wafer(["pool", "check", pool.path])
        #expect(check.status == 0 && check.output.hasPrefix("clean"), "\(check)")
    }

    // MARK: - What it takes

    private func file(_ name: String) throws -> String {
        try String(contentsOfFile: "/proc/\(server.program.pid)/\(name)", encoding: .utf8)
    }

    /// Memory that it holds, in bytes; since its program began, the most that it has held (VmHWM).
    func residentBytes(_ field: String = "VmRSS") throws -> Int {
        for line in try file("status").split(separator: "\n") where line.hasPrefix("\(field):") {
            return Int(line.split(separator: " ")[1])! << 10
        }
        throw Failure("the kernel does not tell what memory is held")
    }

    /// What its descriptors are of.
    private func openFiles() throws -> [String] {
        let directory = "/proc/\(server.program.pid)/fd"
        let files = FileManager.default
        return try files.contentsOfDirectory(atPath: directory).compactMap {
            try? files.destinationOfSymbolicLink(atPath: "\(directory)/\($0)")
        }
    }

    /// Its threads may still be opening other files when it says that it listens.
    func openSockets() throws -> Int { try openFiles().count { $0.hasPrefix("socket:") } }

    /// That it has, in a moment, no more sockets than it had.
    func expectSockets(_ before: Int) throws {
        let isBack = try eventually { try openSockets() <= before }
        let now = try openFiles()
        #expect(isBack, "not \(before): \(now)")
    }

    /// How many descriptors there are once nobody is connected any more.
    func descriptorsAtRest() throws -> Int {
        try expectNobody()
        return try openFiles().count
    }

    /// Processor time so far, in seconds.
    func processorSeconds() throws -> Double {
        // Behind the name, which may have spaces: state is field 3, utime 14, stime 15.
        let fields = try file("stat").split(separator: ")").last!.split(separator: " ")
        return (Double(fields[11])! + Double(fields[12])!) / Double(sysconf(Int32(_SC_CLK_TCK)))
    }

    /// That it holds no more than so much more memory than it did.
    func expectMemory(_ before: Int, grownByAtMost most: Int) throws {
        guard Self.sanitizer == nil else { return }
        let grown = try residentBytes() - before
        #expect(grown <= most, "\(grown >> 20) MiB more")
    }

    /// That it is idle for a moment.
    func expectRest() throws {
        let isIdle = try eventually(within: Self.soon) {
            let before = try processorSeconds()
            usleep(400_000)
            return try processorSeconds() - before < 0.1
        }
        #expect(isIdle, "the processor is kept busy")
    }

    /// That nobody is connected to a volume.
    func expectNobody() throws {
        #expect(
            try eventually(within: Self.soon) {
                try pool.volumes().allSatisfy { $0.connections == 0 }
            })
    }
}
