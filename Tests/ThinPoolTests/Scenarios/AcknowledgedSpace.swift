// btrfs, 2019: on a full file system a write was acknowledged because it needed no space; then a
// reflink made its extent shared, and when it was written back there was no space for the copy.
//
// T27 to T32: a promise made under a condition outlives the condition. What was answered stays,
// what does not fit is refused before it is answered, and a full pool can always be emptied.

import Glibc
import Simulation
import Testing
import ThinMetadata
import ThinPool

@Suite("btrfs 2019: acknowledged space") struct AcknowledgedSpace {
    private static let block = Bench.blockSize
    private static let a: UInt8 = 0xA1
    private static let b: UInt8 = 0xB2
    private static let c: UInt8 = 0xC3
    /// Data blocks that a pool keeps back for its catalogue.
    private static let keptBack: UInt64 = 2

    /// A bench whose volume "v" has all blocks that volumes can have, filled with `a`.
    private static func fullBench(
        reactors: Int = 1, dataBlocks: Int = 12, flushed: Bool = true
    ) throws -> (Bench, Volume, filled: Int) {
        let bench = try Bench(
            dataBlocks: dataBlocks, metadataBlocks: 128, reactors: reactors)
        try bench.change(.create(name: "v", size: UInt64(64 * block)))
        let volume = try bench.volume("v")
        var filled = 0
        while try bench.write(a, volume, at: filled * block, length: block) == 0 { filled += 1 }
        #expect(filled >= 8)
        if flushed {
            #expect(try bench.perform(.flush, volume) == 0)
            try bench.rest()
        }
        return (bench, volume, filled)
    }

    // MARK: - A snapshot takes away what was promised under another condition

    @Test("T27 snapshot of a full pool: what was answered before it is flushed after it")
    func t27SnapshotAgainstAcknowledged() throws {
        let (bench, v, filled) = try Self.fullBench()
        #expect(try bench.write(Self.b, v, at: 0, length: 2 * Self.block) == 0)
        try bench.change(.snapshot(origin: "v", name: "s"))
        #expect(try bench.perform(.flush, v) == 0)
        // Now every block is shared, and there is none for a copy.
        #expect(try bench.write(Self.c, v, at: 0, length: 512) == ENOSPC)
        #expect(try bench.write(Self.c, v, at: Self.block, length: Self.block) == ENOSPC)
        #expect(try bench.write(Self.c, v, at: filled * Self.block, length: 512) == ENOSPC)
        // Nothing else fails.
        #expect(try bench.perform(.flush, v) == 0)
        #expect(bench.pool.status().mode == .writable)
        func verify(_ aftermath: Aftermath) throws {
            for name in ["v", "s"] {
                for block in 0..<2 { try aftermath.require(name, block: block, [Self.b]) }
                for block in 2..<filled { try aftermath.require(name, block: block, [Self.a]) }
            }
        }
        try PowerCut(bench).forEachStateNow { try verify(Aftermath($0)) }
        // And it ends as soon as the snapshot does.
        try bench.change(.delete(name: "s"))
        try bench.rest()
        #expect(try bench.write(Self.c, v, at: 0, length: 512, fua: true) == 0)
    }

    @Test("T28 snapshot in the middle of writes: each is answered for what became of it")
    func t28SnapshotInTheMiddle() throws {
        var kept = 0
        var refused = 0
        for seed in UInt64(1)...12 {
            let result = try Self.snapshotAmongWrites(seed: seed)
            kept += result.kept
            refused += result.refused
        }
        #expect(kept > 100 && refused > 100)
    }

    private static let connections = 8
    private static let writes = 64

    private static func snapshotAmongWrites(
        seed: UInt64
    ) throws -> (kept: Int, refused: Int) {
        var random = SeededRandom(seed: seed)
        let (bench, v, _) = try fullBench(reactors: connections)
        bench.order = SeededRandom(seed: seed)
        let moment = random.below(writes)
        var snapshot: Bench.Change?
        var askedAt = Int.max
        var cookies: [(cookie: UInt64, sentAt: Int)] = []
        var answeredAt: [UInt64: Int] = [:]
        bench.onAnswer = { cookie, _, time in answeredAt[cookie] = time }
        // Each write has a unit of its own, so that what becomes of it can be told.
        for index in 0..<writes {
            if index == moment {
                askedAt = bench.recording.tick()
                snapshot = bench.ask(.snapshot(origin: "v", name: "s"))
            }
            let time = bench.recording.tick()
            let cookie = bench.sendWrite(
                b, v, at: index * Ledger.unit, length: Ledger.unit, on: index % connections)
            cookies.append((cookie, time))
            for _ in 0..<random.below(4) { bench.progress() }
        }
        try bench.settle { answeredAt.count == writes && snapshot!.isDone }
        #expect(snapshot!.error == nil)
        #expect(try bench.perform(.flush, v) == 0)
        var kept = 0
        try PowerCut(bench).forEachStateNow {
            let aftermath = try Aftermath($0)
            for (index, sent) in cookies.enumerated() {
                let error = bench.answer(sent.cookie)!
                try aftermath.require([0, ENOSPC].contains(error), "errno \(error)")
                // Without a free block a write is done in place, before the snapshot, or not.
                let expected = error == 0 ? b : a
                if answeredAt[sent.cookie]! < askedAt {
                    try aftermath.require(error == 0, "refused before there was a snapshot")
                }
                if sent.sentAt > snapshot!.toldAt! {
                    try aftermath.require(error == ENOSPC, "written after the snapshot")
                }
                let sectors = (index * 8)..<(index * 8 + 8)
                try aftermath.require("v", sectors: sectors, [expected])
                try aftermath.require("s", sectors: sectors, [expected])
            }
        }
        kept = cookies.count { bench.answer($0.cookie) == 0 }
        return (kept, writes - kept)
    }

    /// Wafer has no write-back buffer: a write is answered when the device has it. So there is no
    /// reservation to convert; a snapshot waits for what is in flight.
    @Test("T29 write-back buffer: nothing is answered before it is written, and a snapshot waits")
    func t29WriteBackBuffer() throws {
        let bench = try Bench(dataBlocks: 16, metadataBlocks: 128)
        try bench.change(.create(name: "v", size: UInt64(8 * Self.block)))
        let v = try bench.volume("v")
        #expect(try bench.write(Self.a, v, at: 0, length: 2 * Self.block, fua: true) == 0)
        try bench.change(.snapshot(origin: "v", name: "s0"))
        #expect(try bench.write(Self.a, v, at: 0, length: Self.block, fua: true) == 0)
        try bench.rest()
        // In place, a copy, a new block.
        bench.holds = { $0.device == .data && $0.kind == .write && $0.actor != .worker }
        let writes = [0, 1, 4].map {
            bench.sendWrite(Self.b, v, at: $0 * Self.block + 4096, length: 512)
        }
        let snapshot = bench.ask(.snapshot(origin: "v", name: "s"))
        try bench.settle()
        #expect(writes.allSatisfy { bench.answer($0) == nil })
        #expect(!snapshot.isDone, "the snapshot does not wait for the writes in flight")
        bench.holds = { _ in false }
        try bench.settle()
        #expect(writes.allSatisfy { bench.answer($0) == 0 })
        #expect(snapshot.isDone && snapshot.error == nil)
        try PowerCut(bench).forEachStateNow {
            let aftermath = try Aftermath($0)
            for (block, old) in [(0, Self.a), (1, Self.a), (4, UInt8(0))] {
                let first = block * sectorsPerBlock
                for name in ["v", "s"] {
                    try aftermath.require(name, sectors: first..<(first + 8), [old])
                    try aftermath.require(name, sectors: (first + 8)..<(first + 9), [Self.b])
                }
            }
            try aftermath.require("s0", block: 0, [Self.a])
        }
    }

    // MARK: - Metadata space

    @Test("T30 metadata space: what does not fit is refused at once; flush and delete always work")
    func t30MetadataSpace() throws {
        let bench = try Bench(dataBlocks: 400, metadataBlocks: 100)
        let ledger = Ledger(bench)
        ledger.create("v", blocks: 8)
        try ledger.settle()
        var snapshots = 0
        // Each snapshot makes the next writes copy their paths.
        while snapshots < 100, ledger.errors.isEmpty {
            let change = ledger.snapshot("v", "s\(snapshots)")
            try ledger.settle()
            if let error = change.error {
                #expect(error.kind == .outOfSpace)
                break
            }
            snapshots += 1
            for unit in [3, 40, 100] where ledger.errors.isEmpty {
                try ledger.write("v", units: unit..<(unit + 1))
                try ledger.settle()
            }
            // An answered write needs no more space.
            let errors = ledger.errors
            try ledger.flush("v")
            try ledger.settle()
            #expect(ledger.errors == errors, "a flush failed")
        }
        #expect(snapshots > 2 && snapshots < 100, "the metadata never ran out")
        let status = bench.pool.status()
        #expect(status.mode == .writable)
        #expect(status.dataBlocksUsed < 200, "it was the metadata that ran out")
        // Small writes until they do not fit either, each answered for what became of it.
        for unit in 0..<128 {
            try ledger.write("v", units: unit..<(unit + 1))
            try ledger.settle()
        }
        #expect(ledger.errors.keys.allSatisfy { $0 == ENOSPC })
        try ledger.flush("v")
        try ledger.settle()
        try ledger.verify()
        var cut = PowerCut(bench)
        cut.exhaustiveLimit = 4
        try cut.forEachStateNow { try ledger.verify(Aftermath($0)) }
        // Emptied, it takes writes again.
        for index in 0..<snapshots {
            let deletion = ledger.delete("s\(index)")
            try ledger.settle()
            #expect(deletion.error == nil)
        }
        try bench.rest()
        let refused = ledger.errors[ENOSPC]
        try ledger.write("v", units: 0..<128, fua: true)
        try ledger.settle()
        #expect(ledger.errors[ENOSPC] == refused)
        try ledger.verify()
        try requireCleanMetadata(bench, "emptied")
    }

    // MARK: - Full, and what helps

    enum Remedy: CaseIterable {
        case discard, deleteSnapshot, grow
    }

    /// A full pool refuses at once; it has no mode in which writes wait for somebody to make room.
    /// It takes up new space when it is opened.
    @Test(
        "T31 full and recover: reads and writes in place go on, and with room all goes on",
        arguments: Remedy.allCases)
    func t31FullAndRecover(_ remedy: Remedy) throws {
        var (bench, v, filled) = try Self.fullBench(dataBlocks: 14)
        if remedy == .deleteSnapshot {
            // Leave the snapshot blocks of its own.
            #expect(try bench.perform(.trim, v, at: 4 * Self.block, length: 4 * Self.block) == 0)
            try bench.change(.snapshot(origin: "v", name: "s"))
            for block in 0..<4 {
                #expect(
                    try bench.write(Self.a, v, at: block * Self.block, length: Self.block) == 0)
            }
        }
        let new = 32 * Self.block
        #expect(try bench.write(Self.b, v, at: new, length: Self.block) == ENOSPC)
        // Mapped and its own: in place.
        #expect(try bench.write(Self.c, v, at: 512, length: 512, fua: true) == 0)
        #expect(try bench.sectors(v, blocks: 0..<1)[1] == Self.c)
        #expect(try bench.perform(.flush, v) == 0)
        switch remedy {
        case .discard:
            #expect(
                try bench.perform(
                    .trim, v, at: (filled - 1) * Self.block, length: Self.block) == 0)
        case .deleteSnapshot:
            try bench.change(.delete(name: "s"))
        case .grow:
            try bench.rest()
            bench.dataDisk.grow(to: bench.dataDisk.platter.count + 2 * Self.block)
            try bench.reopen()
            v = try bench.volume("v")
        }
        #expect(try bench.write(Self.b, v, at: new, length: Self.block, fua: true) == 0)
        try bench.rest()
        try PowerCut(bench).forEachStateNow {
            let aftermath = try Aftermath($0)
            try aftermath.require("v", block: 32, [Self.b])
            try aftermath.require("v", sectors: 1..<2, [Self.c])
            try aftermath.require("v", sectors: 2..<128, [Self.a])
        }
    }

    @Test("T32 full at the commit: after any cut the pool opens and its free counts are right")
    func t32FullAtTheCommit() throws {
        let (bench, volume, filled) = try Self.fullBench(flushed: false)
        let start = bench.recording.now
        let flush = bench.send(.flush, volume)
        try bench.settle()
        #expect(bench.answer(flush) == 0)
        var used: Set<UInt64> = []
        try PowerCut(bench).forEachState(after: start) {
            let aftermath = try Aftermath($0)
            let bench = aftermath.bench
            let report = try requireCleanMetadata(bench, $0.what)
            let status = bench.pool.status()
            try aftermath.require(
                status.dataBlocksUsed == report.dataBlocksUsed
                    && status.metadataBlocksUsed == report.metadataBlocksUsed, "\(status)")
            used.insert(status.dataBlocksUsed)
            // What is said to be free can be had, all of it but what is kept back.
            let volume = try bench.volume("v")
            let free = status.dataBlocks - status.dataBlocksUsed
            for block in 0..<(Int(free) - Int(Self.keptBack)) {
                try aftermath.require(
                    try bench.write(
                        Self.b, volume, at: (filled + block) * Self.block, length: Self.block)
                        == 0, "block \(block) of \(free) free ones is not to be had")
            }
            try aftermath.require(
                try bench.write(Self.b, volume, at: 63 * Self.block, length: 512) == ENOSPC,
                "more blocks than there are")
            try bench.rest()
            try requireCleanMetadata(bench, "\($0.what), filled")
        }
        #expect(used.count == 2, "the commit is there or not")
    }
}
