// dm-integrity, 2021: data on one device, tags on another. A flush reached only the one with the
// tags, and what was acknowledged as durable was still in the other one's cache.
//
// T16 to T20: a flush reaches the data device always, and the metadata device in the order that a
// map needs. dm-integrity could let its two flushes overlap, because nothing on the one device
// depended on the other. Here the data flush may overlap the metadata *blocks*, which nothing
// refers to yet, but not the superblock.

import Glibc
import Testing
import ThinMetadata
import ThinPool

@Suite("dm-integrity 2021: a flush reaches both devices") struct FlushReachesBothDevices {
    private static let block = Bench.blockSize
    private static let a: UInt8 = 0xA1
    private static let b: UInt8 = 0xB2

    private static func benchWithVolume(reactors: Int = 1) throws -> (Bench, Volume) {
        let bench = try Bench(dataBlocks: 16, metadataBlocks: 128, reactors: reactors)
        try bench.change(.create(name: "v", size: UInt64(8 * block)))
        let volume = try bench.volume("v")
        #expect(try bench.write(a, volume, at: 0, length: 4 * block, fua: true) == 0)
        try bench.rest()
        return (bench, volume)
    }

    @Test("T16 in-place write: with no change of the metadata the flush still reaches the data")
    func t16InPlaceWrite() throws {
        let (bench, volume) = try Self.benchWithVolume()
        let start = bench.recording.now
        #expect(try bench.write(Self.b, volume, at: 512, length: 2 * Self.block) == 0)
        // Before the flush anything goes, sector by sector.
        var seen: Set<UInt8> = []
        try PowerCut(bench).forEachStateNow {
            let aftermath = try Aftermath($0)
            try aftermath.require("v", sectors: 1..<257, [Self.a, Self.b])
            seen.formUnion(try aftermath.sectors("v", blocks: 0..<1))
        }
        #expect(seen == [Self.a, Self.b], "the disk's cache loses nothing")
        #expect(try bench.perform(.flush, volume) == 0)
        #expect(bench.recording.begun(in: start...).allSatisfy { $0.device == .data })
        try PowerCut(bench).forEachStateNow {
            try Aftermath($0).require("v", sectors: 1..<257, [Self.b])
        }
    }

    // MARK: - Order

    @Test("T17 order: data, its flush; blocks, their flush; then the superblock; then the answer")
    func t17Order() throws {
        let (bench, volume) = try Self.benchWithVolume()
        let start = bench.recording.now
        #expect(try bench.write(Self.b, volume, at: 5 * Self.block, length: 512) == 0)
        let flush = bench.send(.flush, volume)
        var answeredAt = 0
        bench.onAnswer = { cookie, _, time in if cookie == flush { answeredAt = time } }
        // The flush of the data is slow: the blocks are written meanwhile.
        bench.holds = { $0.device == .data && $0.kind == .flush }
        try bench.settle()
        let overlapping = bench.recording.begun(in: start...)
        #expect(overlapping.contains { $0.device == .metadata && $0.kind == .write && $0.isDone })
        #expect(!overlapping.contains { $0.isSuperblock }, "the superblock waits for both flushes")
        #expect(answeredAt == 0)
        bench.holds = { _ in false }
        try bench.settle()

        let ios = bench.recording.begun(in: start...)
        let data = ios.filter { $0.device == .data && $0.kind == .write }
        let dataFlushes = ios.filter { $0.device == .data && $0.kind == .flush }
        let blocks = ios.filter { $0.device == .metadata && $0.kind == .write && !$0.isSuperblock }
        let metadataFlushes = ios.filter { $0.device == .metadata && $0.kind == .flush }
        let superblocks = ios.filter(\.isSuperblock)
        // No I/O more than these.
        try #require(data.count == 1 && dataFlushes.count == 1)
        try #require(metadataFlushes.count == 1 && superblocks.count == 1 && !blocks.isEmpty)
        #expect(
            ios.filter { $0.kind != .read }.count == 4 + blocks.count)
        #expect(data[0].end! < dataFlushes[0].begin)
        #expect(blocks.allSatisfy { $0.end! < metadataFlushes[0].begin })
        #expect(dataFlushes[0].end! < superblocks[0].begin)
        #expect(metadataFlushes[0].end! < superblocks[0].begin)
        #expect(superblocks[0].isDurable && superblocks[0].end! < answeredAt)
        #expect(try Orders(bench).violations == [])
    }

    enum Disorder: CaseIterable {
        /// The superblock is part of what overlaps the data's flush.
        case superblockBesideDataFlush
        /// The superblock is part of the metadata blocks' epoch.
        case superblockBesideBlocks
        /// What happened to dm-integrity: one of the two devices is not flushed.
        case dataNeverFlushed
    }

    /// The checks of T17, and the cuts, see an order that is wrong.
    @Test(
        "T17 control: a superblock that is part of the overlap is caught",
        arguments: Disorder.allCases)
    func t17Control(_ disorder: Disorder) throws {
        let (bench, volume) = try Self.benchWithVolume()
        switch disorder {
        case .superblockBesideDataFlush: bench.flushesDataTooLate = true
        case .superblockBesideBlocks: bench.skips = ["flush metadata"]
        case .dataNeverFlushed: bench.skips = ["flush data"]
        }
        let start = bench.recording.now
        #expect(try bench.write(Self.b, volume, at: 5 * Self.block, length: 512) == 0)
        #expect(try bench.perform(.flush, volume) == 0)
        #expect(try !Orders(bench).violations.isEmpty)
        var wrong = 0
        var count = 0
        try PowerCut(bench).forEachState(after: start) {
            count += 1
            do {
                let aftermath = try Aftermath($0)
                try aftermath.require("v", block: 0, [Self.a])
                try aftermath.require("v", sectors: 641..<1024, [0])
            } catch is ScenarioFailure { wrong += 1 }
        }
        #expect(wrong > 0 && wrong < count)
    }

    // MARK: - What is flushed how often

    /// Wafer flushes each of its two devices by itself, always, and never asks whether they are
    /// one: partitions, loop devices and files of one disk look like two and could only be guessed.
    /// One flush too many is the price.
    @Test("T18 same device: two devices of one name are still flushed each")
    func t18SameDevice() throws {
        let bench = try Bench(dataBlocks: 16, metadataBlocks: 128, path: "/dev/one")
        #expect(bench.metadataDisk.path == bench.dataDisk.path)
        try bench.change(.create(name: "v", size: UInt64(8 * Self.block)))
        let volume = try bench.volume("v")
        try bench.rest()
        let start = bench.recording.now
        #expect(try bench.write(Self.b, volume, at: 0, length: 512, fua: true) == 0)
        let ios = bench.recording.begun(in: start...)
        let superblock = try #require(ios.first { $0.isSuperblock })
        for device in [DeviceName.data, .metadata] {
            let flush = try #require(ios.first { $0.device == device && $0.kind == .flush })
            #expect(flush.end! < superblock.begin)
        }
        #expect(try Orders(bench).violations == [])
    }

    /// A device without a volatile cache is flushed like any other: to a pool in a sparse file the
    /// flush is also what makes new blocks of the file durable. Nothing is asked of the device
    /// that could tell the difference. But flushes that wait together are one.
    @Test("T19 write-through device: a flush is never left out, and those that wait share one")
    func t19WriteThrough() throws {
        let (bench, volume) = try Self.benchWithVolume(reactors: 1)
        for _ in 0..<3 {
            let flushes = bench.dataDisk.flushes
            #expect(try bench.perform(.flush, volume) == 0)
            #expect(bench.dataDisk.flushes == flushes + 1)
        }
        #expect(try bench.write(Self.b, volume, at: 0, length: 512) == 0)
        let flushes = bench.dataDisk.flushes
        let cookies = (0..<20).map { _ in bench.send(.flush, volume) }
        try bench.settle()
        #expect(cookies.allSatisfy { bench.answer($0) == 0 })
        // The first began alone; the others were sent while it ran and share the next.
        #expect(bench.dataDisk.flushes <= flushes + 2)
        // The same for those that need a commit.
        #expect(try bench.write(Self.b, volume, at: 6 * Self.block, length: 512) == 0)
        bench.done = []
        let commits = (0..<20).map { _ in bench.send(.flush, volume) }
        try bench.settle()
        #expect(commits.allSatisfy { bench.answer($0) == 0 })
        #expect(bench.done.count { $0 == "write superblock" } <= 2)
    }

    // MARK: - Failures

    @Test(
        "T20 half failure: one flush well done, the other not: nobody is told that it is durable",
        arguments: ["flush data", "flush metadata"])
    func t20HalfFailure(_ what: String) throws {
        let (bench, volume) = try Self.benchWithVolume(reactors: 2)
        #expect(try bench.write(Self.b, volume, at: 5 * Self.block, length: 512) == 0)
        bench.done = []
        bench.failing = [what: EIO]
        let cookies = (0..<2).map { bench.send(.flush, volume, on: $0) }
        let fua = bench.sendWrite(Self.b, volume, at: 6 * Self.block, length: 512, fua: true)
        try bench.settle()
        #expect((cookies + [fua]).allSatisfy { bench.answer($0) == EIO })
        #expect(!bench.done.contains("write superblock"))
        #expect(bench.pool.status().mode == .failed)
        #expect(try bench.write(Self.b, volume, at: 0, length: 512) == EIO)
        #expect(try bench.sectors(volume, blocks: 0..<4).allSatisfy { $0 == Self.a })
        #expect(try bench.sectors(volume, blocks: 4..<8).allSatisfy { $0 == 0 })
        try bench.reopen()
        #expect(bench.pool.status().needsCheck && bench.pool.status().mode == .readOnly)
        #expect(
            try bench.sectors(bench.volume("v"), blocks: 0..<4).allSatisfy { $0 == Self.a })
        try requireCleanMetadata(bench, "after the failure")
    }

    /// A metadata device that takes nothing any more can still be read, and so can the volumes.
    @Test("T20 half failure: reads go on where the metadata device fails for ever")
    func t20MetadataDeviceGone() throws {
        let (bench, volume) = try Self.benchWithVolume()
        #expect(try bench.write(Self.b, volume, at: 5 * Self.block, length: 512) == 0)
        bench.recording.fault = {
            $0.device == .metadata && $0.kind != .read ? Fault(error: EIO) : nil
        }
        #expect(try bench.perform(.flush, volume) == EIO)
        #expect(bench.pool.status().mode == .failed)
        #expect(try bench.sectors(volume, blocks: 0..<4).allSatisfy { $0 == Self.a })
        #expect(try bench.sectors(volume, blocks: 4..<8).allSatisfy { $0 == 0 })
    }
}
