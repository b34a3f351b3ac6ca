// A light NBD client that measures servers: what it costs itself is a small part of what a server
// does for a request, so that the server is what is measured.

import ArgumentParser
import Foundation
import NBDProtocol
import Sockets
import Synchronization

@main
struct NBDLoad: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "nbdload",
        abstract: "Load an NBD server and print what it did as JSON.",
        discussion: "Writes over what is in the volume.")

    @Option(help: ArgumentHelp("Connect to this Unix socket.", valueName: "path"))
    var unix: String?
    @Option(help: ArgumentHelp("Connect to this IPv4 address.", valueName: "host:port"))
    var connect: String?
    @Option(help: "Name of the export.") var export = ""
    @Option(help: "randread, randwrite, read, write or write+flush.")
    var operation = Operation.randomRead
    @Option(help: ArgumentHelp("Length of a request.", valueName: "bytes"))
    var blockSize = 4096
    @Option(help: ArgumentHelp("Requests under way on a connection.", valueName: "n"))
    var depth = 32
    @Option(help: ArgumentHelp("Connections, a thread each.", valueName: "n"))
    var connections = 1
    @Option(help: ArgumentHelp("End after this long.", valueName: "s"))
    var seconds: Double?
    @Option(help: ArgumentHelp("End after this many, all connections together.", valueName: "n"))
    var requests: UInt64?
    @Option(help: ArgumentHelp("Use only so much of the volume.", valueName: "bytes"))
    var size: UInt64?
    @Option(help: "For the offsets.") var seed: UInt64 = 1

    private static let maxDepth = 4096
    /// Bytes that all requests of a connection may write together.
    private static let maxUnderWay = 1 << 30
    private static let maxSeconds = 86_400.0

    func validate() throws {
        if (unix == nil) == (connect == nil) {
            throw ValidationError("give either --unix or --connect")
        }
        if seconds == nil && requests == nil {
            throw ValidationError("give --seconds or --requests, or both")
        }
        if !(1...Int(Limits.maximumPayload)).contains(blockSize) {
            throw ValidationError("--block-size is from 1 to \(Limits.maximumPayload)")
        }
        if !(1...Self.maxDepth).contains(depth) || connections < 1 {
            throw ValidationError("--depth is from 1 to \(Self.maxDepth), --connections at least 1")
        }
        if operation.command == .write && blockSize * depth > Self.maxUnderWay {
            throw ValidationError("--block-size times --depth is at most \(Self.maxUnderWay)")
        }
        if !(0...Self.maxSeconds).contains(seconds ?? 0) {
            throw ValidationError("--seconds is from 0 to \(Int(Self.maxSeconds))")
        }
    }

    func run() throws {
        print(try measure())
    }

    private func address() throws -> Address {
        if let unix { return .unix(path: unix) }
        guard let address = Address(hostAndPort: connect!) else {
            throw LoadFailure("\(connect!) is not host:port")
        }
        return address
    }

    private func measure() throws -> String {
        let address = try address()
        var sockets: [Int32] = []
        var available = UInt64.max
        for _ in 0..<connections {
            let socket = try address.connect()
            let opened = try OpenedExport(export, on: socket)
            if operation.command == .write && opened.flags.contains(.readOnly) {
                throw LoadFailure("the export is read-only")
            }
            available = min(available, opened.size)
            sockets.append(socket)
        }
        let load = Load(
            operation: operation, blockSize: blockSize, depth: depth, connections: connections,
            size: min(size ?? .max, available), seed: seed)
        guard load.size >= UInt64(blockSize) * UInt64(connections) else {
            throw LoadFailure("the volume is smaller than one request for each connection")
        }

        let began = nanoseconds()
        let processorBefore = processorSeconds()
        let deadline = seconds.map { began + UInt64($0 * 1e9) } ?? .max
        let total = Mutex(Histogram())
        let group = DispatchGroup()
        for (connection, socket) in sockets.enumerated() {
            let share = requests.map { own(share: connection, of: $0) } ?? .max
            group.enter()
            let thread = Thread {
                do {
                    let worker = Worker(
                        load, connection: connection, socket: socket, requests: share)
                    let histogram = try worker.run(until: deadline)
                    total.withLock { $0.merge(histogram) }
                } catch {
                    // The others may wait for what does not come any more.
                    FileHandle.standardError.write(Data("nbdload: \(error)\n".utf8))
                    Foundation.exit(EXIT_FAILURE)
                }
                group.leave()
            }
            thread.start()
        }
        group.wait()
        let elapsed = Double(nanoseconds() - began) / 1e9
        let processor = processorSeconds() - processorBefore
        for socket in sockets { close(socket) }
        return try Results(
            load, total.withLock { $0 }, elapsed: elapsed, processor: processor
        ).json()
    }

    /// What is left over by the division goes to the first connections.
    private func own(share connection: Int, of requests: UInt64) -> UInt64 {
        let (each, rest) = requests.quotientAndRemainder(dividingBy: UInt64(connections))
        return each + (UInt64(connection) < rest ? 1 : 0)
    }
}

private func processorSeconds() -> Double {
    var usage = rusage()
    getrusage(RUSAGE_SELF.rawValue, &usage)
    return [usage.ru_utime, usage.ru_stime].reduce(0) {
        $0 + Double($1.tv_sec) + Double($1.tv_usec) / 1e6
    }
}
