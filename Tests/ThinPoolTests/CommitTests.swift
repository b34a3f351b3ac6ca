// The order of a commit, and what is left when a part of it fails. The names are those of the
// failures that other systems suffered.

import Glibc
import Testing
import ThinMetadata
import ThinPool

@Suite struct CommitTests {
    private static let block = Bench.blockSize

    private func benchWithVolume() throws -> (Bench, Volume) {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(8 * Self.block)))
        try bench.rest()
        bench.done = []
        return (bench, try bench.volume("v"))
    }

    @Test func flushAfterProvisioningCommitsInOrder() throws {
        let (bench, volume) = try benchWithVolume()
        #expect(try bench.write(7, volume, at: 4096, length: 512) == 0)
        #expect(try bench.perform(.flush, volume) == 0)
        let superblock = try #require(bench.done.firstIndex(of: "write superblock"))
        let dataFlush = try #require(bench.done.firstIndex(of: "flush data"))
        let metadataFlush = try #require(bench.done.firstIndex(of: "flush metadata"))
        let lastBlock = try #require(bench.done.lastIndex(of: "write metadata"))
        #expect(lastBlock < metadataFlush && metadataFlush < superblock)
        #expect(dataFlush < superblock)
        #expect(bench.done.count { $0 == "write superblock" } == 1)
    }

    @Test func flushWithNothingNewWritesNoMetadata() throws {
        let (bench, volume) = try benchWithVolume()
        #expect(try bench.write(7, volume, at: 0, length: Self.block) == 0)
        #expect(try bench.perform(.flush, volume) == 0)
        try bench.rest()
        bench.done = []
        let flushes = bench.dataDisk.flushes
        #expect(try bench.write(8, volume, at: 0, length: 512) == 0)
        #expect(try bench.perform(.flush, volume) == 0)
        #expect(bench.done.isEmpty)
        #expect(bench.dataDisk.flushes > flushes)
    }

    @Test func provisionedBlockReadsZeroAroundWhatWasWritten() throws {
        let (bench, volume) = try benchWithVolume()
        #expect(try bench.write(7, volume, at: 1024, length: 512) == 0)
        let bytes = try bench.read(volume, at: 0, length: 2 * Self.block)
        #expect(bytes[1024..<1536].allSatisfy { $0 == 7 })
        #expect(bytes[..<1024].allSatisfy { $0 == 0 } && bytes[1536...].allSatisfy { $0 == 0 })
    }

    @Test(arguments: ["flush data", "flush metadata", "write metadata"])
    func failureBeforeTheSuperblockLeavesTheOldState(_ what: String) throws {
        let (bench, volume) = try benchWithVolume()
        #expect(try bench.write(1, volume, at: 0, length: Self.block, fua: true) == 0)
        bench.done = []
        #expect(try bench.write(2, volume, at: Self.block, length: Self.block) == 0)
        bench.failing[what] = EIO
        #expect(try bench.perform(.flush, volume) == EIO)
        #expect(!bench.done.contains("write superblock"))
        #expect(bench.pool.status().mode == .failed)
        // Nothing is acknowledged any more that could not be kept.
        bench.failing = [:]
        #expect(try bench.write(3, volume, at: 0, length: 512) == EIO)
        #expect(try bench.perform(.flush, volume) == EIO)
        // Reads see the last committed state.
        #expect(try bench.read(volume, at: 0, length: 512).allSatisfy { $0 == 1 })
        #expect(try bench.read(volume, at: Self.block, length: 512).allSatisfy { $0 == 0 })
        try bench.reopen()
        #expect(bench.pool.status().mode == .readOnly)
        #expect(bench.pool.status().needsCheck)
        let again = try bench.volume("v")
        #expect(try bench.read(again, at: 0, length: 512).allSatisfy { $0 == 1 })
        #expect(try bench.read(again, at: Self.block, length: 512).allSatisfy { $0 == 0 })
        var check = MetadataCheck(device: bench.metadataDisk)
        #expect(check.run().isClean)
    }

    @Test func failedSuperblockWriteIsNeverAcknowledged() throws {
        let (bench, volume) = try benchWithVolume()
        #expect(try bench.write(2, volume, at: 0, length: 512) == 0)
        bench.failing["write superblock"] = EIO
        #expect(try bench.perform(.flush, volume) == EIO)
        #expect(bench.pool.status().mode == .failed)
    }

    @Test func discardedBlockIsUsedAgainOnlyAfterItsCommit() throws {
        let bench = try Bench(dataBlocks: 8)
        try bench.change(.create(name: "a", size: UInt64(8 * Self.block)))
        try bench.change(.create(name: "b", size: UInt64(8 * Self.block)))
        try bench.rest()
        let a = try bench.volume("a")
        let b = try bench.volume("b")
        var filled = 0
        while try bench.write(1, a, at: filled * Self.block, length: Self.block) == 0 {
            filled += 1
        }
        #expect(try bench.perform(.flush, a) == 0)
        try bench.rest()
        // The pool is full: what b writes waits for the commit of a's discard, and succeeds.
        #expect(try bench.write(2, b, at: 0, length: Self.block) == ENOSPC)
        bench.done = []
        #expect(try bench.perform(.trim, a, at: 0, length: Self.block) == 0)
        #expect(!bench.done.contains("write superblock"))
        #expect(try bench.write(2, b, at: 0, length: Self.block) == 0)
        #expect(bench.done.contains("write superblock"))
        #expect(try bench.read(a, at: 0, length: 512).allSatisfy { $0 == 0 })
        #expect(try bench.read(b, at: 0, length: 512).allSatisfy { $0 == 2 })
    }

    @Test func snapshotOfAFullPoolFailsNoAcknowledgedWrite() throws {
        let bench = try Bench(dataBlocks: 8)
        try bench.change(.create(name: "v", size: UInt64(16 * Self.block)))
        let volume = try bench.volume("v")
        var filled = 0
        while try bench.write(1, volume, at: filled * Self.block, length: Self.block) == 0 {
            filled += 1
        }
        #expect(filled > 0)
        #expect(try bench.write(2, volume, at: 0, length: 512) == 0)
        try bench.change(.snapshot(origin: "v", name: "s"))
        #expect(try bench.perform(.flush, volume) == 0)
        // Now it is shared, and there is no block for a copy: refused, and nothing has changed.
        #expect(try bench.write(3, volume, at: 0, length: 512) == ENOSPC)
        #expect(try bench.read(volume, at: 0, length: 1024) == (0..<1024).map { $0 < 512 ? 2 : 1 })
        // A full pool can be emptied.
        try bench.change(.delete(name: "s"))
        try bench.rest()
        #expect(try bench.write(3, volume, at: 0, length: 512) == 0)
        #expect(try bench.perform(.flush, volume) == 0)
    }

    @Test func writeZeroesWithoutHoleProvisions() throws {
        let bench = try Bench(dataBlocks: 8)
        try bench.change(.create(name: "v", size: UInt64(2 * Self.block)))
        try bench.change(.create(name: "w", size: UInt64(16 * Self.block)))
        let volume = try bench.volume("v")
        let other = try bench.volume("w")
        #expect(
            try bench.perform(
                .writeZeroes, volume, length: 2 * Self.block, noHole: true) == 0)
        var filled = 0
        while try bench.write(1, other, at: filled * Self.block, length: Self.block) == 0 {
            filled += 1
        }
        #expect(try bench.read(volume, at: 0, length: Self.block).allSatisfy { $0 == 0 })
        #expect(try bench.write(5, volume, at: 512, length: 512) == 0)
        #expect(try bench.write(5, volume, at: Self.block, length: Self.block) == 0)
    }

    @Test func blockThatIsNobodyElsesAnyMoreIsWrittenInPlace() throws {
        let (bench, volume) = try benchWithVolume()
        #expect(try bench.write(1, volume, at: 0, length: Self.block) == 0)
        try bench.change(.snapshot(origin: "v", name: "s"))
        try bench.change(.delete(name: "s"))
        try bench.rest()
        let used = bench.pool.status().dataBlocksUsed
        bench.done = []
        #expect(try bench.write(2, volume, at: 0, length: 512, fua: true) == 0)
        #expect(bench.done.isEmpty, "an exclusive block was copied")
        #expect(bench.pool.status().dataBlocksUsed == used)
    }
}
