// How a server ends under load, and what is there when the pool is opened again.

import Foundation
import Synchronization
import Testing

/// One writer: a number at a time, in turn to the places that are its own. Which numbers were
/// begun, acknowledged and made durable is known at each moment.
final class Writer: Sendable {
    struct Progress {
        /// When each number, from 1 on, was begun and acknowledged, in nanoseconds.
        var begun: [UInt64] = []
        var acknowledged: [UInt64] = []
        /// Up to here everything is durable.
        var durable: UInt64 = 0
    }

    static let places: UInt64 = 16
    static let length = 4096
    /// Two writers have their places in each block.
    private static let distance = 32 * kibibyte
    private static let numbersBetweenFlushes: UInt64 = 8

    let index: Int
    private let count: Int
    let progress = Mutex(Progress())
    private let isStopped = Atomic<Bool>(false)

    init(_ index: Int, of count: Int) {
        self.index = index
        self.count = count
    }

    static func volumeSize(writers: Int) -> UInt64 { UInt64(writers) * places * distance }

    /// Where a number goes.
    func place(_ number: UInt64) -> UInt64 {
        (number % Self.places * UInt64(count) + UInt64(index)) * Self.distance
    }

    func stop() { isStopped.store(true, ordering: .relaxed) }

    private static var now: UInt64 { DispatchTime.now().uptimeNanoseconds }

    /// Writes until stopped, or until the server is gone.
    func run(_ client: Client, fua: Bool, endsWithServer: Bool) throws {
        do {
            var number: UInt64 = 0
            while !isStopped.load(ordering: .relaxed) {
                number += 1
                let place = place(number)
                let bytes = pattern(number, place, Self.length)
                progress.withLock { $0.begun.append(Self.now) }
                try client.write(place, bytes, flags: fua ? Client.fua : 0)
                progress.withLock {
                    $0.acknowledged.append(Self.now)
                    if fua { $0.durable = number }
                }
                if !fua, number % Self.numbersBetweenFlushes == 0 {
                    try client.flush()
                    progress.withLock { $0.durable = number }
                }
            }
        } catch let error as ClientError {
            guard endsWithServer else { throw error }
        }
    }

    /// The last number not above `number` that goes to the same place as `place` does; 0: none.
    static func last(_ remainder: UInt64, upTo number: UInt64) -> UInt64 {
        guard number >= remainder else { return 0 }
        return number - (number - remainder) % places
    }
}

@Suite struct EndTests {
    private static let writers = 4

    enum End: CaseIterable { case terminated, killed }

    @Test(arguments: Engine.allCases, End.allCases) func load(engine: Engine, end: End) throws {
        let pool = try TestPool(
            volumes: [("vol", Writer.volumeSize(writers: Self.writers))])
        for round in 0..<3 {
            // New blocks in the first round, shared ones in the second, then any.
            if round == 1 { try pool.snapshot("vol", "snap") }
            let server = try Server(pool, engine: engine, options: noCommits)
            let writers = (0..<Self.writers).map { Writer($0, of: Self.writers) }
            // So that nothing is left of the round before.
            try Client(server, "vol").zero(
                0, Writer.volumeSize(writers: Self.writers),
                flags: Client.fua | (round == 1 ? Client.noHole : 0))
            let threads = Workers(Self.writers) { index in
                let client = try Client(server, "vol", via: index < 2 ? .unix : .tcp)
                try writers[index].run(client, fua: index % 2 == 1, endsWithServer: true)
            }
            let isUnderWay = eventually(within: 30) {
                writers.allSatisfy { $0.progress.withLock { $0.durable } > 40 + UInt64(round * 7) }
            }
            #expect(isUnderWay)
            switch end {
            case .terminated: try server.stop()
            case .killed: server.kill()
            }
            try threads.join()

            let again = try Server(pool, engine: engine)
            let client = try Client(again, "vol")
            for writer in writers { try check(writer, client, after: end) }
            try again.stop()
            try pool.expectClean()
        }
    }

    /// After a clean end everything is there that was acknowledged, after any end what was made
    /// durable; and never what was not begun.
    private func check(_ writer: Writer, _ client: Client, after end: End) throws {
        let progress = writer.progress.withLock { $0 }
        let promised =
            end == .terminated ? UInt64(progress.acknowledged.count) : progress.durable
        for remainder in 0..<Writer.places {
            let place = writer.place(remainder)
            let least = Writer.last(remainder, upTo: promised)
            let most = Writer.last(remainder, upTo: UInt64(progress.begun.count))
            for found in try stamps(client.read(place, Writer.length), place) {
                #expect(found >= least && found <= most, "\(found) is not in \(least)...\(most)")
            }
        }
    }
}
