// A pool on files in a directory of its own, the command, and a server on the pool.

import Foundation
import Testing

let kibibyte: UInt64 = 1 << 10
let mebibyte: UInt64 = 1 << 20
let gibibyte: UInt64 = 1 << 30

/// Both ways in which the server does its I/O.
enum Engine: String, CaseIterable, Sendable, CustomTestStringConvertible {
    case ring, poll

    var environment: [String: String] { self == .poll ? ["WAFER_IO": "poll"] : [:] }
    var testDescription: String { rawValue }
}

/// What `wafer volume list --json` says of a volume.
struct ListedVolume: Decodable {
    var name: String?
    var id: UInt32
    var size: UInt64?
    var mappedBytes: UInt64
    var connections: Int
    var state: String
}

/// What `wafer pool status --json` says.
struct ListedPool: Decodable {
    var mode: String
    var blockSize: UInt64
    var dataBlocks: UInt64
    var dataBlocksUsed: UInt64
    var deleting: Int
    var needsCheck: Bool
    var problems: [String]
}

final class TestPool: Sendable {
    let scratch: Scratch
    let path: String
    let blockSize: UInt64

    /// `path`: where it is to be, if not in its own directory. `device`: what its data is to be on.
    init(
        at path: String? = nil, on device: String? = nil,
        data: UInt64 = 256 * mebibyte, metadata: UInt64 = 4 * mebibyte,
        blockSize: UInt64 = 64 * kibibyte, inMemory: Bool = false,
        volumes: [(String, UInt64)] = []
    ) throws {
        scratch = try inMemory ? Scratch(in: "/dev/shm") : Scratch()
        self.path = path ?? scratch.file("pool")
        self.blockSize = blockSize
        try must(
            "pool", "create", self.path, device == nil ? "--data-size" : "--data",
            device ?? "\(data)", "--metadata-size", "\(metadata)", "--block-size", "\(blockSize)")
        for (name, size) in volumes { try create(name, size) }
    }

    // MARK: - The command

    func wafer(_ arguments: [String]) throws -> Outcome {
        try Program(Program.wafer, arguments, in: scratch).wait()
    }

    /// Runs what has to work.
    @discardableResult
    func must(_ arguments: String...) throws -> String {
        let outcome = try wafer(arguments)
        guard outcome.status == 0 else {
            throw Failure("wafer \(arguments.joined(separator: " ")): \(outcome)")
        }
        return outcome.output
    }

    func create(_ name: String, _ size: UInt64) throws {
        try must("volume", "create", path, name, "\(size)")
    }

    func snapshot(_ origin: String, _ name: String) throws {
        try must("volume", "snapshot", path, origin, name)
    }

    /// Deletes a volume whose clients are gone; the server may not have noticed that yet.
    func delete(_ name: String) throws {
        var outcome = Outcome(status: 0, output: "", error: "")
        _ = try eventually {
            outcome = try wafer(["volume", "delete", path, name])
            return outcome.status == 0 || !outcome.error.contains("in use")
        }
        guard outcome.status == 0 else { throw Failure("wafer volume delete: \(outcome)") }
    }

    func volumes() throws -> [ListedVolume] {
        let text = try must("volume", "list", path, "--json")
        return try JSONDecoder().decode([ListedVolume].self, from: Data(text.utf8))
    }

    func status() throws -> ListedPool {
        let text = try must("pool", "status", path, "--json")
        return try JSONDecoder().decode(ListedPool.self, from: Data(text.utf8))
    }
}

/// `wafer serve` at work; killed with the value, if it still runs then.
final class Server: Sendable {
    let pool: TestPool
    let program: Program
    let unixPath: String
    /// On 127.0.0.1.
    let port: UInt16

    private static let startSeconds = 30.0

    /// - Parameter files: how many it may have open; nil: as many as this process.
    init(
        _ pool: TestPool, engine: Engine = .ring, options: [String] = [], files: Int? = nil
    ) throws {
        self.pool = pool
        unixPath = pool.scratch.newFile("sock")
        let limit = files.map { ["/usr/bin/prlimit", "--nofile=\($0):\($0)"] } ?? []
        let command =
            limit + [Program.wafer, "serve", pool.path, "--unix", unixPath]
            + ["--listen", "127.0.0.1:0"] + options
        program = try Program(
            command[0], Array(command.dropFirst()),
            in: pool.scratch, environment: engine.environment)
        let program = program
        let began = eventually(within: Self.startSeconds) {
            program.output.split(separator: "\n").count == 2 || !program.isRunning
        }
        let marker = "://127.0.0.1:"
        guard began, program.isRunning,
            let line = program.output.split(separator: "\n").first(where: { $0.contains(marker) }),
            let port = UInt16(line.split(separator: ":").last ?? "")
        else {
            program.signal(SIGKILL)
            throw Failure("no server: \(program.wait())")
        }
        self.port = port
    }

    func uri(_ export: String) -> String { "nbd+unix:///\(export)?socket=\(unixPath)" }
    func tcpURI(_ export: String) -> String { "nbd://127.0.0.1:\(port)/\(export)" }

    /// SIGTERM, and a clean end.
    func stop() throws {
        program.signal(SIGTERM)
        let outcome = program.wait(seconds: 60)
        guard outcome.status == 0 else { throw Failure("the server ended badly: \(outcome)") }
    }

    /// As by a power cut, but for what the kernel has.
    func kill() {
        program.signal(SIGKILL)
        _ = program.wait()
    }
}
