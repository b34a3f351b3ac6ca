// Runs the built command the way people do, and says what it did.

import Foundation
import Testing

/// How a program ended.
struct Outcome {
    let status: Int32
    let output: String
    let error: String

    /// A failure as people and scripts rely on it: status 1, one line, from this program.
    var isFailure: Bool {
        status == 1 && error.hasPrefix("wafer: ") && error.hasSuffix("\n")
            && error.filter { $0 == "\n" }.count == 1
    }
}

enum Program {
    /// Beside the program that runs these tests, or in the checkout.
    static let wafer: String = {
        let own = URL(filePath: "/proc/self/exe").resolvingSymlinksInPath()
            .deletingLastPathComponent().appending(path: "wafer").path
        if FileManager.default.isExecutableFile(atPath: own) { return own }
        var checkout = URL(filePath: #filePath)
        for _ in 0..<3 { checkout.deleteLastPathComponent() }
        return checkout.appending(path: ".build/debug/wafer").path
    }()

    static func find(_ name: String) -> String? {
        (["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map { "\($0)/\(name)" })
            .first { FileManager.default.isExecutableFile(atPath: $0) }
    }

    /// A program that was started and has not been waited for.
    final class Running {
        let process = Process()
        private let output: URL
        private let error: URL

        init(_ program: String, _ arguments: [String], in folder: URL) throws {
            let name = UUID().uuidString
            output = folder.appending(path: "\(name).out")
            error = folder.appending(path: "\(name).err")
            for file in [output, error] { try Data().write(to: file) }
            process.executableURL = URL(filePath: program)
            process.arguments = arguments
            process.standardInput = FileHandle.nullDevice
            process.standardOutput = try FileHandle(forWritingTo: output)
            process.standardError = try FileHandle(forWritingTo: error)
            try process.run()
        }

        var outputSoFar: String { (try? String(contentsOf: output, encoding: .utf8)) ?? "" }
        var errorSoFar: String { (try? String(contentsOf: error, encoding: .utf8)) ?? "" }

        func wait() -> Outcome {
            process.waitUntilExit()
            let status =
                process.terminationReason == .exit
                ? process.terminationStatus : 128 + process.terminationStatus
            return Outcome(status: status, output: outputSoFar, error: errorSoFar)
        }

        func kill(_ signal: Int32) { Foundation.kill(process.processIdentifier, signal) }
    }
}

/// Tries until it is true, or the seconds are over.
func until(_ seconds: Double, _ condition: () throws -> Bool) rethrows -> Bool {
    let end = Date(timeIntervalSinceNow: seconds)
    while true {
        if try condition() { return true }
        if Date() > end { return false }
        usleep(20_000)
    }
}

/// A folder of one test, gone with it.
final class Scratch {
    let folder: URL

    init() throws {
        folder = FileManager.default.temporaryDirectory
            .appending(path: "wafer-command-\(UUID().uuidString.prefix(8))")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(at: folder) }

    func path(_ name: String) -> String { folder.appending(path: name).path }
    var pool: String { path("pool") }

    func run(_ arguments: String...) throws -> Outcome { try run(arguments) }
    func run(_ arguments: [String]) throws -> Outcome {
        try Program.Running(Program.wafer, arguments, in: folder).wait()
    }

    /// Runs something that has to work.
    @discardableResult
    func must(_ arguments: String..., sourceLocation: SourceLocation = #_sourceLocation) throws
        -> String
    {
        let outcome = try run(arguments)
        try #require(
            outcome.status == 0, "\(arguments): \(outcome)", sourceLocation: sourceLocation)
        return outcome.output
    }

    func tool(_ name: String, _ arguments: String...) throws -> Outcome {
        let program = try #require(Program.find(name), "\(name) is missing: run Scripts/setup")
        return try Program.Running(program, arguments, in: folder).wait()
    }

    /// A pool with the volume "vol".
    func makePool(dataSize: String = "64MiB") throws {
        try must("pool", "create", pool, "--data-size", dataSize, "--metadata-size", "4MiB")
        try must("volume", "create", pool, "vol", "32MiB")
    }

    func file(_ name: String, size: UInt64, bytes: [UInt8] = []) throws -> String {
        let path = path(name)
        try Data(bytes).write(to: URL(filePath: path))
        let file = try FileHandle(forUpdating: URL(filePath: path))
        try file.truncate(atOffset: size)
        try file.close()
        return path
    }

    func overwrite(_ path: String, at offset: UInt64, _ bytes: [UInt8]) throws {
        let file = try FileHandle(forUpdating: URL(filePath: path))
        try file.seek(toOffset: offset)
        try file.write(contentsOf: Data(bytes))
        try file.close()
    }

    func contents(_ path: String) throws -> Data { try Data(contentsOf: URL(filePath: path)) }
    func exists(_ path: String) -> Bool {
        var status = stat()
        return lstat(path, &status) == 0
    }

    /// The pool as it is meant to be: clean by the check, and with these volumes.
    func expectIntact(
        _ volumes: [String] = ["vol"], sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let check = try run("pool", "check", pool)
        #expect(check.status == 0, "\(check)", sourceLocation: sourceLocation)
        #expect(try names() == volumes, sourceLocation: sourceLocation)
    }

    func names() throws -> [String?] {
        struct Volume: Decodable { var name: String? }
        let list = try must("volume", "list", pool, "--json")
        return try JSONDecoder().decode([Volume].self, from: Data(list.utf8)).map(\.name)
    }
}

/// A server on a pool.
final class TestServer {
    let running: Program.Running
    let uri: String
    private let scratch: Scratch

    init(
        _ scratch: Scratch, _ options: [String] = [],
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        self.scratch = scratch
        let running = try Program.Running(
            Program.wafer, ["serve", scratch.pool] + options, in: scratch.folder)
        self.running = running
        let began = until(20) {
            running.outputSoFar.hasPrefix("listening on ") || !running.process.isRunning
        }
        guard began, running.process.isRunning else {
            running.kill(SIGKILL)
            let outcome = running.wait()
            try #require(Bool(false), "no server: \(outcome)", sourceLocation: sourceLocation)
            fatalError()
        }
        let line = running.outputSoFar.split(separator: "\n")[0]
        uri = String(line.dropFirst("listening on ".count))
    }

    deinit { if running.process.isRunning { running.kill(SIGKILL) } }

    /// The URI of an export.
    func export(_ name: String) -> String {
        uri.replacingOccurrences(of: "nbd+unix:///", with: "nbd+unix:///\(name)")
    }

    /// Commands of qemu-io, one after the other on one connection.
    func client(_ export: String, _ commands: String...) throws -> Outcome {
        let arguments = ["-f", "raw", self.export(export)] + commands.flatMap { ["-c", $0] }
        let program = try #require(Program.find("qemu-io"), "qemu-io is missing: run Scripts/setup")
        return try Program.Running(program, arguments, in: scratch.folder).wait()
    }

    func stop() -> Outcome {
        running.kill(SIGTERM)
        return running.wait()
    }
}
