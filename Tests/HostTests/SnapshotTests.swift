// A snapshot that is taken while clients write is one point in time for all of them.

import Foundation
import Testing

@Suite struct SnapshotTests {
    private static let writers = 4
    private static let snapshots = 8

    /// Before a snapshot was asked for, and after it was granted.
    private struct Taken {
        var name: String
        var asked: UInt64
        var granted: UInt64
    }

    @Test(arguments: Engine.allCases) func snapshotsUnderLoad(engine: Engine) throws {
        let pool = try TestPool(
            volumes: [("vol", Writer.volumeSize(writers: Self.writers))])
        let server = try Server(pool, engine: engine, options: ["--reactors", "2"])
        let writers = (0..<Self.writers).map { Writer($0, of: Self.writers) }
        let threads = Workers(Self.writers) { index in
            let client = try Client(server, "vol", via: index < 2 ? .unix : .tcp)
            try writers[index].run(client, fua: index == 3, endsWithServer: false)
        }
        var taken: [Taken] = []
        var failure: (any Error)?
        do {
            for index in 0..<Self.snapshots {
                let counts = writers.map { $0.progress.withLock { $0.acknowledged.count } }
                let isUnderWay = eventually(within: 30) {
                    zip(writers, counts).allSatisfy { writer, count in
                        writer.progress.withLock { $0.acknowledged.count } > count + 5 * (index + 1)
                    }
                }
                #expect(isUnderWay)
                let asked = DispatchTime.now().uptimeNanoseconds
                try pool.snapshot("vol", "snap\(index)")
                let granted = DispatchTime.now().uptimeNanoseconds
                taken.append(Taken(name: "snap\(index)", asked: asked, granted: granted))
            }
        } catch { failure = error }
        for writer in writers { writer.stop() }
        try threads.join()
        if let failure { throw failure }

        for snapshot in taken { try check(snapshot, writers, try Client(server, snapshot.name)) }
        try server.stop()
        try pool.expectClean()
        let again = try Server(pool, engine: engine)
        for snapshot in taken { try check(snapshot, writers, try Client(again, snapshot.name)) }
    }

    private func check(_ snapshot: Taken, _ writers: [Writer], _ client: Client) throws {
        let progress = writers.map { $0.progress.withLock { $0 } }
        var lasts: [UInt64] = []
        for (index, writer) in writers.enumerated() {
            // All of a writer's numbers up to some last one, and none beyond.
            var found: [UInt64] = []
            for remainder in 0..<Writer.places {
                let place = writer.place(remainder)
                let stamps = try stamps(client.read(place, Writer.length), place)
                #expect(Set(stamps).count == 1, "\(snapshot.name) has half of a write: \(stamps)")
                found.append(stamps[0])
            }
            let last = found.max()!
            let expected = (0..<Writer.places).map { Writer.last($0, upTo: last) }
            #expect(found == expected, "\(snapshot.name), writer \(index)")
            lasts.append(last)

            let begun = last == 0 ? 0 : progress[index].begun[Int(last) - 1]
            #expect(begun < snapshot.granted, "\(snapshot.name) has what began after it was there")
            if Int(last) < progress[index].acknowledged.count {
                #expect(
                    progress[index].acknowledged[Int(last)] > snapshot.asked,
                    "\(snapshot.name) lacks what was acknowledged before it was asked for")
            }
        }
        // One point in time: what one writer lacks was not acknowledged before another's last,
        // which is there, was begun.
        for (index, last) in lasts.enumerated()
        where Int(last) < progress[index].acknowledged.count {
            let missing = progress[index].acknowledged[Int(last)]
            for (other, present) in lasts.enumerated() where present > 0 {
                #expect(
                    missing > progress[other].begun[Int(present) - 1],
                    "\(snapshot.name) has writer \(other)'s, but not writer \(index)'s earlier one")
            }
        }
    }
}
