// The benchmark's own programs: that they do what they say. No time is judged here.

import Foundation
import Testing

/// What `nbdload` prints.
private struct Measured: Decodable {
    var operation: String
    var requests: Int
    var iops: Double
    var p50Us: Double
    var p99Us: Double
    var maxUs: Double
}

/// `floor` at work; killed with the value.
private final class FloorServer {
    let program: Program
    let unixPath: String

    init(size: UInt64, in scratch: Scratch) throws {
        unixPath = scratch.newFile("sock")
        program = try Program(
            Program.beside("floor"), ["--unix", unixPath, "--size", "\(size)"], in: scratch)
        let path = unixPath
        guard eventually({ access(path, F_OK) == 0 }) else {
            throw Failure("no floor: \(program.error)")
        }
    }

    var uri: String { "nbd+unix:///?socket=\(unixPath)" }
}

private let operations = ["randread", "randwrite", "read", "write", "write+flush"]

private func load(_ arguments: [String], in scratch: Scratch) throws -> Outcome {
    try Program(Program.beside("nbdload"), arguments, in: scratch).wait()
}

private func measure(_ arguments: [String], in scratch: Scratch) throws -> Measured {
    let outcome = try load(arguments, in: scratch)
    try #require(outcome.status == 0, "nbdload \(arguments): \(outcome)")
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return try decoder.decode(Measured.self, from: Data(outcome.output.utf8))
}

@Suite struct BenchmarkTests {
    /// The floor keeps what it is given, whatever the length of the requests.
    @Test func floorKeepsData() throws {
        let scratch = try Scratch()
        let size = 24 * mebibyte
        let floor = try FloorServer(size: size, in: scratch)
        let source = scratch.file("source")
        #expect(
            FileManager.default.createFile(
                atPath: source, contents: Data(pattern(1, 0, Int(size)))))
        for length in [4096, 65536, 4 << 20] {
            let copy = scratch.newFile("copy")
            let request = "--request-size=\(length)"
            for (from, to) in [(source, floor.uri), (floor.uri, copy)] {
                let outcome = try Program.run("nbdcopy", [request, from, to], in: scratch)
                #expect(outcome.status == 0, "\(outcome)")
            }
            #expect(try Program.run("cmp", [source, copy], in: scratch).status == 0)
        }
    }

    @Test(arguments: operations) func loadOnFloor(operation: String) throws {
        let scratch = try Scratch()
        let floor = try FloorServer(size: 64 * mebibyte, in: scratch)
        for (block, depth, connections, count) in [
            (4096, 32, 1, 5000), (4096, 1, 3, 100), (131_072, 8, 2, 301), (512, 3000, 1, 20_000),
            (8 << 20, 4, 1, 20),
        ] {
            let measured = try measure(
                [
                    "--unix", floor.unixPath, "--operation", operation, "--block-size", "\(block)",
                    "--depth", "\(depth)", "--connections", "\(connections)", "--requests",
                    "\(count)",
                ], in: scratch)
            #expect(measured.operation == operation && measured.requests == count)
            #expect(measured.iops > 0 && measured.p50Us > 0)
            #expect(measured.p50Us <= measured.p99Us && measured.p99Us <= measured.maxUs)
        }
    }

    @Test(arguments: operations) func loadOnWafer(operation: String) throws {
        let size = 16 * mebibyte
        let pool = try TestPool(volumes: [("vol", size)])
        let server = try Server(pool)
        for address in [["--unix", server.unixPath], ["--connect", "127.0.0.1:\(server.port)"]] {
            let measured = try measure(
                address + [
                    "--export", "vol", "--operation", operation, "--block-size", "65536",
                    "--depth", "8", "--requests", "\(size / 65536)",
                ], in: pool.scratch)
            #expect(measured.requests == size / 65536)
        }
        let mapped = try pool.volumes()[0].mappedBytes
        switch operation {
        case "write": #expect(mapped == size)
        case "randwrite", "write+flush": #expect(mapped > 0 && mapped < size)
        default: #expect(mapped == 0)
        }
        try server.stop()
        try pool.expectClean()
    }

    /// An error ends it with one line that names it.
    @Test func loadTellsErrors() throws {
        let pool = try TestPool(volumes: [("vol", mebibyte)])
        let server = try Server(pool)
        for (arguments, words) in [
            (["--export", "vol", "--block-size", "100"], "the server answers with error 22"),
            (["--export", "none"], "the server refuses export \"none\": no such export"),
            (["--export", "vol", "--block-size", "2097152"], "smaller than one request"),
        ] {
            let outcome = try load(
                ["--unix", server.unixPath, "--requests", "10"] + arguments, in: pool.scratch)
            #expect(outcome.status == 1 && outcome.output.isEmpty)
            #expect(outcome.error.contains(words), "\(outcome)")
            #expect(outcome.error.split(separator: "\n").count == 1, "\(outcome)")
        }
    }

    /// One row, once, for a moment: that the script works.
    @Test func script() throws {
        let scratch = try Scratch()
        let programs = URL(filePath: Program.wafer).deletingLastPathComponent().path
        let checkout = URL(filePath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().deletingLastPathComponent()
        let outcome = try Program.run(
            checkout.appending(path: "Scripts/bench").path,
            [
                "--short", "--programs", programs, "--dir", scratch.path, "--rounds", "1",
                "--seconds", "0.2", "--size", "16", "--rows", "write+flush-4k",
                "--servers", "file", "--json", scratch.file("json"),
            ], in: scratch)
        #expect(outcome.status == 0, "\(outcome)")
        #expect(outcome.output.contains("### Goals"), "\(outcome)")
        let json = try JSONSerialization.jsonObject(
            with: Data(contentsOf: URL(filePath: scratch.file("json"))))
        let samples = (json as? [String: Any])?["samples"] as? [[String: Any]] ?? []
        #expect(Set(samples.compactMap { $0["server"] as? String }) == ["wafer", "file"])
        #expect(samples.allSatisfy { $0["error"] == nil }, "\(samples)")
    }
}
