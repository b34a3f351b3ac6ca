// Pools whose metadata device is full, or filled up for a moment: removals use the reserve, and
// everything that was promised of a full pool goes on.

import Glibc
import Testing
import ThinMetadata
import ThinPool

@Suite struct FullMetadataTests {
    private static let block = Bench.blockSize
    /// Data blocks of one bitmap: one more takes another.
    private static let bitmap = 16_320
    /// Sizes of the metadata device, so that removals do not always stop at the same distance from the
    /// end of the reserve.
    private static let sizes = 150..<158

    /// A pool at rest with as many volumes "v0", "v1" ... as its metadata holds, two blocks in each.
    private func fullBench(
        metadataBlocks: Int, before: (Bench) throws -> Void = { _ in }
    ) throws -> (bench: Bench, volumes: [Volume]) {
        let bench = try Bench(dataBlocks: Self.bitmap, metadataBlocks: metadataBlocks)
        try before(bench)
        var volumes: [Volume] = []
        while true {
            let name = "v\(volumes.count)"
            let change = bench.ask(.create(name: name, size: UInt64(4 * Self.block)))
            try bench.rest()
            if let error = change.error {
                #expect(error.kind == .outOfSpace)
                break
            }
            let volume = try bench.volume(name)
            try #require(try provision(bench, volume, blocks: 2) == 0)
            volumes.append(volume)
        }
        try #require(volumes.count > 8)
        return (bench, volumes)
    }

    private func provision(_ bench: Bench, _ volume: Volume, blocks: Int) throws -> Int32 {
        try bench.perform(.writeZeroes, volume, length: blocks * Self.block, noHole: true)
    }

    /// Trims one block of each volume, each of another leaf, before anything is committed.
    private func trim(_ bench: Bench, _ volumes: [Volume]) -> [UInt64] {
        volumes.map { bench.send(.trim, $0, length: Self.block) }
    }

    /// Whoever waits for a commit has had it; then what came of that is committed.
    private func settleAndRest(_ bench: Bench) throws {
        try bench.settle()
        try bench.rest()
    }

    /// What there is no space for now there is with the next commit, or the one after it.
    @Test(arguments: sizes) func trimsWaitForWhatTrimsHaveTaken(metadataBlocks: Int) throws {
        let (bench, volumes) = try fullBench(metadataBlocks: metadataBlocks)
        let trims = trim(bench, volumes)
        #expect(trims.contains { bench.answer($0) == nil }, "there was space for all of them")
        try settleAndRest(bench)
        #expect(trims.allSatisfy { bench.answer($0) == 0 })
        let mapped = try bench.pool.volumeList().map(\.mappedBytes)
        #expect(mapped.allSatisfy { $0 == UInt64(Self.block) })
    }

    /// Trims have taken the reserve: a change of the catalogue waits for a commit, too, and does not
    /// fail the pool.
    @Test(arguments: sizes) func changesWaitForWhatTrimsHaveTaken(metadataBlocks: Int) throws {
        let (bench, volumes) = try fullBench(metadataBlocks: metadataBlocks)
        let trims = trim(bench, volumes)
        let change = bench.ask(.set(name: "v0", description: "as it was"))
        try settleAndRest(bench)
        #expect(change.isDone && change.error == nil)
        #expect(volumes[0].description == "as it was")
        #expect(trims.allSatisfy { bench.answer($0) == 0 })
        #expect(bench.pool.status().mode == .writable)
        try requireCleanMetadata(bench, "after the change")
    }

    /// A snapshot has its origin held while it waits; then it is refused, and the origin goes on.
    @Test func aSnapshotIsRefused() throws {
        let (bench, volumes) = try fullBench(metadataBlocks: 150)
        let trims = trim(bench, volumes)
        let change = bench.ask(.snapshot(origin: "v0", name: "s"))
        try settleAndRest(bench)
        #expect(change.error?.kind == .outOfSpace)
        #expect(try bench.write(1, volumes[0], at: Self.block, length: 512, fua: true) == 0)
        #expect(trims.allSatisfy { bench.answer($0) == 0 })
        #expect(bench.pool.status().mode == .writable)
    }

    /// A deletion for which there is no space at once goes on in the background.
    @Test(arguments: sizes) func deletionsWaitForWhatTrimsHaveTaken(metadataBlocks: Int) throws {
        let (bench, volumes) = try fullBench(metadataBlocks: metadataBlocks)
        _ = trim(bench, volumes)
        let change = bench.ask(.delete(name: "v1"))
        try settleAndRest(bench)
        #expect(change.isDone && change.error == nil)
        let status = bench.pool.status()
        #expect(status.deleting == 0 && status.volumes == volumes.count - 1)
        try requireCleanMetadata(bench, "after the deletion")
    }

    /// A volume that is deleted at once where there is space, and for which the upper bound is beyond
    /// the whole reserve.
    @Test func aMiddlingVolumeGoesInTheBackground() throws {
        let blocks = 3000
        let (bench, _) = try fullBench(metadataBlocks: 150) { bench in
            try bench.change(.create(name: "big", size: UInt64(blocks * Self.block)))
            try #require(
                try provision(bench, try bench.volume("big"), blocks: blocks) == 0)
        }
        let before = bench.pool.status()
        try bench.change(.delete(name: "big"))
        #expect(bench.pool.status().deleting == 1)
        try bench.rest()
        let after = bench.pool.status()
        #expect(after.deleting == 0)
        #expect(after.dataBlocksUsed == before.dataBlocksUsed - UInt64(blocks))
        try requireCleanMetadata(bench, "after the deletion")
    }

    /// A longer data device takes metadata. Where there is none the pool opens as it was: only then can
    /// somebody make room.
    @Test func aLongerDataDeviceIsTakenUpWhenThereIsRoom() throws {
        let (bench, volumes) = try fullBench(metadataBlocks: 150)
        bench.dataDisk.grow(to: 9 * Self.bitmap * Self.block)
        try bench.reopen()
        var status = bench.pool.status()
        #expect(status.mode == .writable && status.dataBlocks == UInt64(Self.bitmap))
        #expect(status.problems.count == 1 + bench.pool.spaceProblems.count)
        // It is no damage.
        try requireCleanMetadata(bench, "with a longer device")
        #expect(try bench.pool.check().isClean)
        for index in volumes.indices { try bench.change(.delete(name: "v\(index)")) }
        try bench.rest()
        try bench.reopen()
        status = bench.pool.status()
        #expect(status.dataBlocks == UInt64(9 * Self.bitmap) && status.problems.isEmpty)
    }

    /// Said once when it is reached, and again when space came back and is gone again.
    @Test func fullMetadataIsTold() throws {
        let (bench, volumes) = try fullBench(metadataBlocks: 150) { bench in
            try bench.change(.create(name: "big", size: UInt64(8000 * Self.block)))
        }
        let told = Told()
        bench.pool.onSpaceWarning = { told.warnings.append($0) }
        let big = try bench.volume("big")
        var next = 0
        func fill() throws {
            var error: Int32 = 0
            while error == 0, next < 8000 {
                error = try bench.perform(
                    .writeZeroes, big, at: next * Self.block, length: Self.block, noHole: true)
                if error == 0 { next += 1 }
            }
            #expect(error == ENOSPC)
        }
        let words = "no metadata left"
        try fill()
        try fill()
        try bench.rest()
        #expect(told.warnings.count { $0.contains(words) } == 1, "\(told.warnings)")
        #expect(bench.pool.status().problems.count { $0.contains(words) } == 1)
        #expect(try bench.pool.check().isClean)
        for index in volumes.indices.prefix(8) { try bench.change(.delete(name: "v\(index)")) }
        try bench.rest()
        #expect(!bench.pool.status().problems.contains { $0.contains(words) })
        try fill()
        try bench.rest()
        #expect(told.warnings.count { $0.contains(words) } == 2, "\(told.warnings)")
    }

    private final class Told: @unchecked Sendable { var warnings: [String] = [] }

    // MARK: - The check

    /// A pool with room for some transactions, each of which changes a leaf of each volume.
    private func changingBench() throws -> (bench: Bench, volumes: [Volume]) {
        let bench = try Bench(dataBlocks: 1000, metadataBlocks: 160)
        let volumes = try (0..<20).map { index in
            try bench.change(.create(name: "v\(index)", size: UInt64(64 * Self.block)))
            return try bench.volume("v\(index)")
        }
        try bench.rest()
        return (bench, volumes)
    }

    /// Checks the pool, and meanwhile maps a block of each volume, and commits, so many times.
    private func check(
        _ bench: Bench, _ volumes: [Volume], rounds: Int
    ) throws -> (report: PoolCheckReport?, error: PoolError?, answers: [Int32]) {
        var answers: [Int32] = []
        do throws(PoolError) {
            let report = try bench.pool.check { _ in
                guard answers.isEmpty else { return true }
                for round in 0..<rounds {
                    let requests = volumes.map {
                        bench.send(
                            .writeZeroes, $0, at: round * Self.block, length: Self.block,
                            fua: true, noHole: true)
                    }
                    try? bench.settle()
                    answers += requests.map { bench.answer($0) ?? -1 }
                }
                return true
            }
            return (report, nil, answers)
        } catch { return (nil, error, answers) }
    }

    @Test func aCheckGivesWayToThoseWhoWrite() throws {
        let (bench, volumes) = try changingBench()
        let (_, error, answers) = try check(bench, volumes, rounds: 12)
        #expect(answers.count == 12 * volumes.count && answers.allSatisfy { $0 == 0 })
        #expect(error?.kind == .changesTooFast)
        // What it kept is there again, and so is the check.
        try bench.rest()
        #expect(try bench.pool.check().isClean)
    }

    @Test func aCheckKeepsWhatItReads() throws {
        let (bench, volumes) = try changingBench()
        let (report, error, answers) = try check(bench, volumes, rounds: 1)
        #expect(answers.count == volumes.count && answers.allSatisfy { $0 == 0 })
        #expect(error == nil && report?.isClean == true)
    }
}
