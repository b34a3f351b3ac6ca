// Everything at once: requests of several clients, snapshots and deletions, block status, handshakes
// that lead nowhere, restarts in place. The thread sanitizer is what this is for (Scripts/sanitize);
// that nothing is lost is checked on the way.

import Foundation
import Synchronization
import Testing

@Suite struct MixedLoadTests {
    /// WAFER_LOAD_SECONDS: how long.
    private static let seconds =
        ProcessInfo.processInfo.environment["WAFER_LOAD_SECONDS"].flatMap(Double.init) ?? 3
    private static let volume = "vol"
    private static let writers = 3
    /// Each writer's own, in turns, so that they meet in the same data blocks.
    private static let piece = 16 * kibibyte
    private static let pieces: UInt64 = 200

    private final class Clock: Sendable {
        private let end = Date(timeIntervalSinceNow: MixedLoadTests.seconds)
        private let hasFailed = Atomic<Bool>(false)

        var isRunning: Bool { Date() < end && !hasFailed.load(ordering: .relaxed) }
        /// The others need not go on.
        func fail() { hasFailed.store(true, ordering: .relaxed) }
    }

    /// A restart breaks off the handshakes that are under way: then another is begun.
    private static func retrying<Value>(_ body: () throws -> Value) throws -> Value {
        for _ in 0..<20 {
            if let value = try? body() { return value }
            usleep(50_000)
        }
        return try body()
    }

    /// Writes, zeroes and trims its own pieces, and reads what it has made of them.
    private static func write(_ server: Server, _ writer: Int, while clock: Clock) throws {
        var random = Generator(seed: UInt64(writer))
        var client = try retrying { try Client(server, volume) }
        var model = [UInt64](repeating: 0, count: Int(pieces))
        var stamp: UInt64 = 0
        while clock.isRunning {
            let index = random.below(pieces)
            let offset = (index * UInt64(writers) + UInt64(writer)) * piece
            let flags = random.chance(10) ? Client.fua : 0
            switch random.below(12) {
            case 0...4:
                stamp += 1
                try client.write(offset, pattern(stamp, offset, Int(piece)), flags: flags)
                model[Int(index)] = stamp
            case 5:
                try client.zero(offset, piece, flags: flags)
                model[Int(index)] = 0
            case 6:
                let hole = Client.noHole
                try client.zero(offset, piece, flags: flags | hole)
                model[Int(index)] = 0
            case 7: try client.flush()
            case 8: try client.cache(0, pieces * piece)
            case 9 where random.chance(10):
                try client.disconnect()
                client = try retrying { try Client(server, volume) }
            default:
                let found = Set(try stamps(client.read(offset, Int(piece)), offset))
                guard found == [model[Int(index)]] else {
                    throw Failure("\(found) where \(model[Int(index)]) was written, at \(offset)")
                }
            }
        }
    }

    /// A volume that only this writer uses, all of which is trimmed now and then.
    private static func trim(_ server: Server, while clock: Clock) throws {
        let client = try retrying { try Client(server, "own") }
        var round: UInt64 = 0
        while clock.isRunning {
            round += 1
            let batch = Batch(client)
            for index in 0..<16 as Range<UInt64> {
                let offset = index * 64 * kibibyte
                try batch.write(offset, pattern(round, offset, 4096))
            }
            guard try batch.wait().allSatisfy({ $0 == 0 }) else { throw Failure("a write failed") }
            try client.trim(0, 8 * mebibyte)
            guard isZero(try client.read(0, 1 << 20)) else { throw Failure("trimmed, but there") }
        }
    }

    /// Snapshots come, are read, and go.
    private static func manage(_ server: Server, while clock: Clock) throws {
        let pool = server.pool
        var number = 0
        while clock.isRunning {
            number += 1
            let name = "snapshot-\(number)"
            // While the server restarts nobody answers, and then it may have been done.
            _ = try? pool.snapshot(volume, name)
            guard try retrying({ try pool.volumes() }).contains(where: { $0.name == name }) else {
                continue
            }
            _ = try retrying { try Client(server, name).read(0, 1 << 20) }
            if let status = try? pool.status(), !status.problems.isEmpty {
                throw Failure("\(status.problems)")
            }
            _ = try? pool.delete(name)
        }
    }

    /// Asks what is mapped and shared, of everything, again and again.
    private static func ask(_ server: Server, while clock: Clock) throws {
        let client = try retrying {
            try RawClient(
                server, volume, .extended, contexts: ["base:allocation", "wafer:shared"])
        }
        let length = UInt64(writers) * pieces * piece
        while clock.isRunning {
            let answer = try client.answer(.extended, to: RawClient.blockStatus, length: length)
            guard answer.error == 0, !answer.extents.isEmpty else { throw Failure("\(answer)") }
        }
    }

    /// Comes, says something, goes.
    private static func stray(_ server: Server, while clock: Clock) throws {
        let words =
            RawClient.clientFlags + RawClient.option(RawClient.list)
            + RawClient.option(RawClient.structuredReply) + RawClient.go(volume)
            + RawClient.header(.structured, RawClient.read, length: 1 << 20)
        var number = 0
        while clock.isRunning {
            number += 1
            guard let client = try? RawClient(server) else { continue }
            client.stuff(Array(words.prefix(number * 13 % (words.count + 1))))
            client.leave(number % 2 == 0 ? .closed : .reset)
            usleep(2000)
        }
    }

    private static func restart(_ server: Server, while clock: Clock) throws {
        var count = 0
        while clock.isRunning {
            usleep(700_000)
            count += 1
            server.program.signal(SIGUSR2)
            let happened = eventually(within: 60) {
                server.program.error.components(separatedBy: "took over").count > count
            }
            guard happened else { throw Failure("nobody took over: \(server.program.error)") }
        }
    }

    @Test(arguments: Engine.allCases, [false, true])
    func everythingAtOnce(engine: Engine, restarts: Bool) throws {
        let attacked = try AttackedServer(
            volumes: [
                (Self.volume, UInt64(Self.writers) * Self.pieces * Self.piece), ("own", gibibyte),
            ], engine: engine)
        let server = attacked.server
        let clock = Clock()
        let others: [@Sendable (Server, Clock) throws -> Void] = [
            { try Self.trim($0, while: $1) }, { try Self.manage($0, while: $1) },
            { try Self.ask($0, while: $1) }, { try Self.stray($0, while: $1) },
        ]
        let workers = Workers(Self.writers + others.count + (restarts ? 1 : 0)) { index in
            do {
                if index < Self.writers {
                    try Self.write(server, index, while: clock)
                } else if index < Self.writers + others.count {
                    try others[index - Self.writers](server, clock)
                } else {
                    try Self.restart(server, while: clock)
                }
            } catch {
                clock.fail()
                throw Failure("\(error): \(server.program.error.suffix(4000))")
            }
        }
        try workers.join()
        try attacked.expectNobody()
        try attacked.finish()
    }
}
