// dm-thin, 2019: metadata was committed without a flush of the data that it refers to. Blocks
// copied on write lost what surrounded the write, new ones showed what the disk had held before.
//
// T1 to T15: whatever is cut, a mapping that survives refers to data that survives.

import Glibc
import Simulation
import Testing
import ThinMetadata
import ThinPool

@Suite("dm-thin 2019: data before metadata") struct DataBeforeMetadata {
    private static let block = Bench.blockSize
    private static let a: UInt8 = 0xA1
    private static let b: UInt8 = 0xB2

    /// A bench whose volume "v" holds `a` in its first blocks, flushed, and which is at rest.
    private static func benchWithVolume(
        blocks: Int = 4, filled: Int = 1, dataBlocks: Int = 16, reactors: Int = 1
    ) throws -> (Bench, Volume) {
        let bench = try Bench(
            dataBlocks: dataBlocks, metadataBlocks: 128, reactors: reactors)
        try bench.change(.create(name: "v", size: UInt64(blocks * block)))
        let volume = try bench.volume("v")
        if filled > 0 {
            #expect(try bench.write(a, volume, at: 0, length: filled * block) == 0)
        }
        #expect(try bench.perform(.flush, volume) == 0)
        try bench.rest()
        return (bench, volume)
    }

    // MARK: - Commits that nobody asked for

    /// Writes `length` bytes of `b` into a shared block, without a flush, and lets the commit
    /// interval pass.
    private static func writeIntoSharedBlock(
        at offset: Int, length: Int, flushesDataTooLate: Bool = false
    ) throws -> (bench: Bench, start: Int) {
        let (bench, volume) = try benchWithVolume()
        try bench.change(.snapshot(origin: "v", name: "s"))
        try bench.rest()
        bench.flushesDataTooLate = flushesDataTooLate
        let start = bench.recording.now
        bench.done = []
        #expect(try bench.write(b, volume, at: offset, length: length) == 0)
        #expect(!bench.done.contains("write superblock"))
        try bench.rest()
        #expect(bench.done.contains("write superblock"), "the commit came by itself")
        return (bench, start)
    }

    private static func verifyCopy(_ survivors: Survivors, offset: Int, length: Int) throws {
        let aftermath = try Aftermath(survivors)
        let written = (offset / Bench.sector)..<((offset + length) / Bench.sector)
        try aftermath.require("v", sectors: 0..<written.lowerBound, [a])
        try aftermath.require("v", sectors: written, [a, b])
        try aftermath.require("v", sectors: written.upperBound..<sectorsPerBlock, [a])
        try aftermath.require("s", block: 0, [a])
    }

    @Test("T1 cow-neighbour: a small write into a shared block never harms the rest of it")
    func t1CowNeighbour() throws {
        let (bench, start) = try Self.writeIntoSharedBlock(at: 8192, length: 4096)
        try PowerCut(bench).forEachState(after: start) {
            try Self.verifyCopy($0, offset: 8192, length: 4096)
        }
        #expect(try Orders(bench).violations == [])
    }

    /// With the data flush where dm-thin had it, the same cuts find the damage.
    @Test("T1 control: with the data flush after the superblock the neighbours are lost")
    func t1Control() throws {
        let (bench, start) = try Self.writeIntoSharedBlock(
            at: 8192, length: 4096, flushesDataTooLate: true)
        var wrong = 0
        try PowerCut(bench).forEachState(after: start) {
            do { try Self.verifyCopy($0, offset: 8192, length: 4096) } catch is ScenarioFailure {
                wrong += 1
            }
        }
        #expect(wrong > 0)
        #expect(try !Orders(bench).violations.isEmpty)
    }

    @Test("T2 zeroing: a new block shows what was written and zeroes, never what the disk held")
    func t2Zeroing() throws {
        let (bench, volume) = try Self.benchWithVolume(filled: 0)
        let start = bench.recording.now
        #expect(try bench.write(Self.b, volume, at: 1024, length: 512) == 0)
        try bench.rest()
        try PowerCut(bench).forEachState(after: start) {
            // That the secret is not seen is part of every aftermath.
            let aftermath = try Aftermath($0)
            try aftermath.require("v", sectors: 0..<2, [0])
            try aftermath.require("v", sectors: 2..<3, [0, Self.b])
            try aftermath.require("v", sectors: 3..<sectorsPerBlock, [0])
        }
    }

    @Test("T3 whole-block overwrite of a shared block: every sector old or new")
    func t3WholeBlockOverwrite() throws {
        let (bench, start) = try Self.writeIntoSharedBlock(at: 0, length: Self.block)
        try PowerCut(bench).forEachState(after: start) {
            try Self.verifyCopy($0, offset: 0, length: Self.block)
        }
    }

    // MARK: - Commits while clients write

    private static let connections = 8

    @Test(
        "T4 commit race: no mapping is committed whose data was not flushed after it was written",
        arguments: UInt64(1)...6)
    func t4CommitRace(_ seed: UInt64) throws {
        let bench = try Bench(
            dataBlocks: 64, metadataBlocks: 192, reactors: Self.connections)
        let ledger = Ledger(bench)
        ledger.create("v", blocks: 6)
        try ledger.settle()
        for block in 0..<6 {
            try ledger.write(
                "v", units: (block * Ledger.unitsPerBlock)..<((block + 1) * Ledger.unitsPerBlock))
        }
        try ledger.settle()
        let start = bench.recording.now
        bench.order = SeededRandom(seed: seed)
        // A data flush takes as long as a hundred other things.
        let slow = 100
        bench.holds = { [unowned bench] io in
            io.device == .data && io.kind == .flush && bench.recording.now < io.begin + slow
        }
        var clients = RandomClients(ledger, seed: seed, reactors: Self.connections)
        clients.deletions = false
        for _ in 0..<120 { try clients.act() }
        bench.holds = { _ in false }
        try ledger.settle()
        try bench.rest()
        try ledger.verify()
        let orders = try Orders(bench)
        #expect(orders.violations == [])
        #expect(orders.commitCount > 3)
        // The orders are told by the recording; two of the histories are cut at each I/O too.
        guard seed <= 2 else { return }
        var cut = PowerCut(bench)
        cut.exhaustiveLimit = 3
        cut.samples = 1
        try cut.forEachState(after: start) { survivors in
            try ledger.verify(try Aftermath(survivors))
        }
    }

    // MARK: - Flushes that fail

    /// A bench with a provisioning write that no commit covers yet; two flushes are sent, the
    /// background I/O named fails.
    private static func failCommit(at what: String) throws -> Bench {
        let (bench, volume) = try benchWithVolume(reactors: 2)
        #expect(try bench.write(b, volume, at: block, length: 4096) == 0)
        let flushes = bench.dataDisk.flushes
        bench.done = []
        bench.failing[what] = EIO
        let cookies = [bench.send(.flush, volume), bench.send(.flush, volume, on: 1)]
        let write = bench.sendWrite(b, volume, at: 2 * block, length: 4096, fua: true, on: 1)
        try bench.settle()
        #expect(cookies.map { bench.answer($0) } == [EIO, EIO])
        #expect(bench.answer(write) == EIO)
        #expect(!bench.done.contains("write superblock"))
        #expect(bench.done.count { $0 == what } == 1, "a failed flush is not tried again")
        #expect(what != "flush data" || bench.dataDisk.flushes == flushes)
        #expect(bench.pool.status().mode == .failed)
        bench.failing = [:]
        return bench
    }

    /// What is found after a commit that failed: the state before it.
    private static func verifyRolledBack(_ bench: Bench) throws {
        try bench.settle()
        #expect(!bench.done.contains("write superblock"))
        try bench.reopen()
        #expect(bench.pool.status().needsCheck)
        #expect(bench.pool.status().mode == .readOnly)
        let volume = try bench.volume("v")
        #expect(try bench.sectors(volume, blocks: 0..<1).allSatisfy { $0 == a })
        #expect(try bench.sectors(volume, blocks: 1..<3).allSatisfy { $0 == 0 })
        #expect(try bench.write(b, volume, at: 0, length: 512) == EPERM)
        try requireCleanMetadata(bench, "after the failure")
    }

    @Test("T5 flush fails: a data flush that fails keeps the superblock from being written")
    func t5FlushFails() throws {
        try Self.verifyRolledBack(Self.failCommit(at: "flush data"))
    }

    @Test("T5 flush fails: also where no mapping is new, and nothing is acknowledged afterwards")
    func t5FlushFailsInPlace() throws {
        let (bench, volume) = try Self.benchWithVolume()
        #expect(try bench.write(Self.b, volume, at: 0, length: 512) == 0)
        bench.recording.fault = {
            $0.device == .data && $0.kind == .flush ? Fault(error: EIO) : nil
        }
        #expect(try bench.perform(.flush, volume) == EIO)
        bench.recording.fault = nil
        #expect(bench.pool.status().mode == .failed)
        #expect(try bench.perform(.flush, volume) == EIO)
        #expect(try bench.write(Self.b, volume, at: 0, length: 512) == EIO)
        // Reading goes on.
        let sectors = try bench.sectors(volume, blocks: 0..<1)
        #expect(sectors.allSatisfy { $0 == Self.a || $0 == Self.b })
    }

    @Test("T6 metadata flush fails: the superblock is not written")
    func t6MetadataFlushFails() throws {
        try Self.verifyRolledBack(Self.failCommit(at: "flush metadata"))
    }

    // MARK: - The superblock

    /// The format has one superblock. It survives being torn because only its first 512 bytes ever
    /// change, and a device writes a sector whole.
    @Test("T7 superblock torn: any of its sectors may be the old ones")
    func t7SuperblockTorn() throws {
        let (bench, volume) = try Self.benchWithVolume()
        bench.holds = { $0.isSuperblock }
        let old = bench.metadataDisk.platter.page(0)
        let write = bench.sendWrite(
            Self.b, volume, at: Self.block, length: Self.block, fua: true)
        try bench.settle()
        #expect(bench.answer(write) == nil)
        let new = try #require(bench.recording.ios.last { $0.isSuperblock }).contents
        #expect(old != new && old[512...] == new[512...])
        var seen: Set<UInt8> = []
        try PowerCut(bench).forEachTear {
            let aftermath = try Aftermath($0)
            try aftermath.require("v", block: 0, [Self.a])
            try aftermath.require("v", block: 1, [0, Self.b])
            seen.insert(try aftermath.sectors("v", blocks: 1..<2).first!)
        }
        #expect(seen == [0, Self.b])
        // Were a sector torn, the checksum would say so: no pool opens, and nothing traps.
        for byte in stride(from: 8, to: 504, by: 8) where old[byte...] != new[byte...] {
            let survivors = PowerCut(bench).nothingUnflushed()
            var torn = survivors
            let mixed = Array(new[..<byte]) + Array(old[byte...])
            if mixed == new || mixed == old { continue }
            mixed.withUnsafeBytes { torn.metadata.write(at: 0, from: $0) }
            #expect(throws: PoolError.self) { try Bench(after: torn) }
        }
    }

    // MARK: - Promises

    enum Target: CaseIterable {
        case unmapped, shared, mapped
    }

    @Test(
        "T8 FUA: what is answered is there, on a mapped block, whatever the cut",
        arguments: Target.allCases)
    func t8FUA(_ target: Target) throws {
        let (bench, volume) = try Self.benchWithVolume()
        if target == .shared {
            try bench.change(.snapshot(origin: "v", name: "s"))
            try bench.rest()
        }
        let start = bench.recording.now
        let offset = target == .unmapped ? Self.block : 0
        #expect(try bench.write(Self.b, volume, at: offset + 4096, length: 8192, fua: true) == 0)
        let ios = bench.recording.begun(in: start...)
        if target == .mapped {
            // In place: no commit.
            #expect(ios.map(\.kind) == [.write, .flush])
            #expect(ios.allSatisfy { $0.device == .data })
        } else {
            #expect(ios.contains { $0.isSuperblock })
        }
        let old: UInt8 = target == .unmapped ? 0 : Self.a
        let first = offset / Bench.sector
        try PowerCut(bench).forEachStateNow {
            let aftermath = try Aftermath($0)
            try aftermath.require("v", sectors: first..<(first + 8), [old])
            try aftermath.require("v", sectors: (first + 8)..<(first + 24), [Self.b])
            try aftermath.require("v", sectors: (first + 24)..<(first + 128), [old])
            if target == .shared { try aftermath.require("s", block: 0, [Self.a]) }
        }
    }

    @Test("T9 flush with nothing new: the data device is flushed, the metadata is left alone")
    func t9FlushWithNothingNew() throws {
        let (bench, volume) = try Self.benchWithVolume()
        for _ in 0..<3 {
            let start = bench.recording.now
            #expect(try bench.write(Self.b, volume, at: 0, length: 512) == 0)
            #expect(try bench.perform(.flush, volume) == 0)
            let ios = bench.recording.begun(in: start...)
            #expect(ios.map(\.kind) == [.write, .flush])
            #expect(ios.allSatisfy { $0.device == .data })
            try PowerCut(bench).forEachStateNow {
                try Aftermath($0).require("v", sectors: 0..<1, [Self.b])
            }
        }
        // Even where nothing at all was written since.
        let flushes = bench.dataDisk.flushes
        #expect(try bench.perform(.flush, volume) == 0)
        #expect(bench.dataDisk.flushes == flushes + 1)
    }

    @Test(
        "T10 flush order: a flush covers what was answered before it, and waits for no more",
        arguments: [true, false])
    func t10FlushOrder(_ isMapped: Bool) throws {
        let (bench, volume) = try Self.benchWithVolume(blocks: 8, filled: 4)
        let start = bench.recording.now
        let offset = isMapped ? 0 : 4 * Self.block
        #expect(try bench.write(Self.b, volume, at: offset, length: 512) == 0)
        bench.holds = { $0.device == .data && $0.kind == .write }
        let late = bench.sendWrite(Self.b, volume, at: offset + Self.block, length: 512)
        #expect(try bench.perform(.flush, volume) == 0)
        let answered = bench.recording.now
        #expect(bench.answer(late) == nil)
        let old: UInt8 = isMapped ? Self.a : 0
        func verify(_ survivors: Survivors) throws {
            let aftermath = try Aftermath(survivors)
            let first = offset / Bench.sector
            let isPromised = survivors.time >= answered
            try aftermath.require(
                "v", sectors: first..<(first + 1), isPromised ? [Self.b] : [old, Self.b])
            try aftermath.require(
                "v", sectors: (first + 128)..<(first + 129), [old, Self.b])
            try aftermath.require("v", sectors: (first + 129)..<(first + 256), [old])
        }
        try PowerCut(bench).forEachStateNow(verify)
        bench.holds = { _ in false }
        try bench.settle()
        #expect(bench.answer(late) == 0)
        try PowerCut(bench).forEachState(after: start, verify)
    }

    @Test(
        "T11 multi-conn: a flush on one connection covers what was answered on another",
        arguments: Target.allCases)
    func t11MultiConn(_ target: Target) throws {
        let (bench, volume) = try Self.benchWithVolume(reactors: 2)
        if target == .shared { try bench.change(.snapshot(origin: "v", name: "s")) }
        let block = target == .unmapped ? 1 : 0
        #expect(try bench.write(Self.b, volume, at: block * Self.block, length: 512, on: 0) == 0)
        #expect(try bench.perform(.flush, volume, on: 1) == 0)
        try PowerCut(bench).forEachStateNow {
            try Aftermath($0).require(
                "v", sectors: (block * sectorsPerBlock)..<(block * sectorsPerBlock + 1), [Self.b])
        }
    }

    // MARK: - Blocks that are given up

    /// A bench whose pool is full: "v" holds all blocks that volumes can have; "w" holds none.
    private static func fullBench(reactors: Int = 1) throws -> (Bench, filled: Int) {
        let bench = try Bench(dataBlocks: 10, metadataBlocks: 128, reactors: reactors)
        try bench.change(.create(name: "v", size: UInt64(16 * block)))
        try bench.change(.create(name: "w", size: UInt64(16 * block)))
        let volume = try bench.volume("v")
        var filled = 0
        while try bench.write(a, volume, at: filled * block, length: block) == 0 { filled += 1 }
        #expect(filled > 2)
        #expect(try bench.perform(.flush, volume) == 0)
        try bench.rest()
        return (bench, filled)
    }

    @Test("T12 discard and reuse: a freed block is nobody else's before that is durable")
    func t12DiscardAndReuse() throws {
        let (bench, _) = try Self.fullBench()
        let v = try bench.volume("v")
        let w = try bench.volume("w")
        let start = bench.recording.now
        #expect(try bench.perform(.trim, v, at: 0, length: Self.block) == 0)
        #expect(try bench.write(Self.b, w, at: 512, length: 512) == 0)
        try bench.rest()
        try PowerCut(bench).forEachState(after: start) {
            let aftermath = try Aftermath($0)
            let block = Set(try aftermath.sectors("v", blocks: 0..<1))
            try aftermath.require(block == [Self.a] || block == [0], "block 0 of v: \(block)")
            try aftermath.require("v", block: 1, [Self.a])
            try aftermath.require("w", sectors: 1..<2, [0, Self.b])
            try aftermath.require("w", sectors: 2..<128, [0])
        }
        #expect(try Orders(bench).violations == [])
    }

    @Test("T12 discard and reuse: the same for a snapshot that is deleted")
    func t12DeleteAndReuse() throws {
        let bench = try Bench(dataBlocks: 12, metadataBlocks: 128)
        try bench.change(.create(name: "v", size: UInt64(16 * Self.block)))
        let v = try bench.volume("v")
        #expect(try bench.write(Self.a, v, at: 0, length: 2 * Self.block) == 0)
        try bench.change(.snapshot(origin: "v", name: "s"))
        // The snapshot alone has the old blocks now.
        #expect(try bench.write(Self.b, v, at: 0, length: 2 * Self.block) == 0)
        var filled = 2
        while try bench.write(Self.b, v, at: filled * Self.block, length: Self.block) == 0 {
            filled += 1
        }
        #expect(try bench.perform(.flush, v) == 0)
        try bench.rest()
        let start = bench.recording.now
        let deletion = bench.ask(.delete(name: "s"))
        while bench.pool.volumeNames().contains("s") { bench.progress() }
        // It is gone, but not durably so.
        let write = bench.sendWrite(0xC3, v, at: filled * Self.block, length: Self.block)
        try bench.settle { bench.answer(write) != nil && deletion.isDone }
        #expect(bench.answer(write) == 0)
        try bench.rest()
        var kept = 0
        try PowerCut(bench).forEachState(after: start) {
            let aftermath = try Aftermath($0)
            if aftermath.sectors["s"] != nil {
                kept += 1
                try aftermath.require("s", block: 0, [Self.a])
                try aftermath.require("s", block: 1, [Self.a])
            }
            try aftermath.require("v", block: 0, [Self.b])
            try aftermath.require("v", block: filled, [0, 0xC3])
        }
        #expect(kept > 0)
    }

    @Test("T12 discard and reuse: a read in flight keeps its block from being anybody else's")
    func t12ReadInFlight() throws {
        let (bench, _) = try Self.fullBench(reactors: 2)
        let v = try bench.volume("v")
        let w = try bench.volume("w")
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Self.block, alignment: 4096)
        defer { buffer.deallocate() }
        bench.holds = { $0.device == .data && $0.kind == .read }
        let read = bench.send(
            .read, v, at: 0, length: Self.block, buffer: buffer.baseAddress, on: 1)
        #expect(try bench.perform(.trim, v, at: 0, length: Self.block) == 0)
        let write = bench.sendWrite(Self.b, w, at: 0, length: Self.block)
        bench.done = []
        try bench.rest()
        #expect(bench.done.contains("write superblock"))
        #expect(bench.answer(write) == nil, "the block is used while it is still being read")
        bench.holds = { _ in false }
        try bench.settle()
        #expect(bench.answer(read) == 0 && bench.answer(write) == 0)
        #expect(buffer.allSatisfy { $0 == Self.a })
    }

    @Test("T13 discard passdown: the device is told after the commit, never before")
    func t13DiscardPassdown() throws {
        let (bench, volume) = try Self.benchWithVolume(blocks: 8, filled: 4)
        // A commit right now: the next one that nobody asks for is an interval away.
        #expect(try bench.write(Self.a, volume, at: 6 * Self.block, length: 512, fua: true) == 0)
        let start = bench.recording.now
        bench.done = []
        #expect(try bench.perform(.trim, volume, at: 0, length: 2 * Self.block) == 0)
        // Time to do it too early.
        try bench.settle()
        #expect(bench.done == [])
        try bench.rest()
        let discard = try #require(bench.done.firstIndex(of: "discard data"))
        #expect(try #require(bench.done.firstIndex(of: "write superblock")) < discard)
        #expect(try Orders(bench).violations == [])
        try PowerCut(bench).forEachState(after: start) {
            let aftermath = try Aftermath($0)
            let blocks = Set(try aftermath.sectors("v", blocks: 0..<2))
            try aftermath.require(blocks == [Self.a] || blocks == [0], "v: \(blocks)")
            try aftermath.require("v", block: 2, [Self.a])
        }
    }

    @Test("T14 discard when full: a write at once waits for the discard's commit and succeeds")
    func t14DiscardWhenFull() throws {
        let gibibyte = 1 << 30
        let bench = try Bench(dataBlocks: 40, metadataBlocks: 256)
        try bench.change(.create(name: "v", size: UInt64(4 * gibibyte)))
        let volume = try bench.volume("v")
        // All over the first gibibyte.
        let step = gibibyte / 64
        var filled = 0
        while try bench.write(Self.a, volume, at: filled * step, length: Self.block) == 0 {
            filled += 1
        }
        #expect(filled > 30)
        #expect(try bench.perform(.trim, volume, at: 0, length: gibibyte) == 0)
        for index in 0..<filled {
            #expect(
                try bench.write(Self.b, volume, at: 2 * gibibyte + index * step, length: 4096)
                    == 0)
        }
        #expect(try bench.perform(.flush, volume) == 0)
        #expect(
            try bench.read(volume, at: 0, length: Self.block).allSatisfy { $0 == 0 })
        try requireCleanMetadata(bench, "after the discard")
    }

    struct Zeroing: CustomTestStringConvertible {
        var offset: Int
        var length: Int
        var noHole = false
        var isShared = false
        var testDescription: String {
            "\(offset)+\(length)\(noHole ? ", no hole" : "")\(isShared ? ", shared" : "")"
        }
    }

    @Test(
        "T15 read-your-zero: zeroes that were flushed are zeroes, never old data",
        arguments: [
            Zeroing(offset: 0, length: block),
            Zeroing(offset: 512, length: 4096),
            Zeroing(offset: 4096, length: 2 * block),
            Zeroing(offset: 0, length: block, noHole: true),
            Zeroing(offset: 0, length: block, isShared: true),
            Zeroing(offset: 512, length: 4096, isShared: true),
            Zeroing(offset: 4096, length: 2 * block, noHole: true, isShared: true),
            Zeroing(offset: 4 * block, length: 2 * block, noHole: true),
        ])
    func t15ReadYourZero(_ zeroing: Zeroing) throws {
        let (bench, volume) = try Self.benchWithVolume(blocks: 8, filled: 4)
        if zeroing.isShared {
            try bench.change(.snapshot(origin: "v", name: "s"))
            try bench.rest()
        }
        let start = bench.recording.now
        #expect(
            try bench.perform(
                .writeZeroes, volume, at: zeroing.offset, length: zeroing.length,
                noHole: zeroing.noHole) == 0)
        #expect(try bench.perform(.flush, volume) == 0)
        let flushed = bench.recording.now
        try bench.rest()
        let end = 4 * sectorsPerBlock
        let zeroed =
            (zeroing.offset / Bench.sector)..<((zeroing.offset + zeroing.length) / Bench.sector)
        try PowerCut(bench).forEachState(after: start) {
            let aftermath = try Aftermath($0)
            let isPromised = $0.time >= flushed
            try aftermath.require("v", sectors: zeroed, isPromised ? [0] : [0, Self.a])
            try aftermath.require("v", sectors: 0..<min(end, zeroed.lowerBound), [Self.a])
            if zeroed.upperBound < end {
                try aftermath.require("v", sectors: zeroed.upperBound..<end, [Self.a])
            }
            if zeroing.isShared { try aftermath.require("s", sectors: 0..<end, [Self.a]) }
        }
    }
}
