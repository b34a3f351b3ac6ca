// Snapshots, exclusive blocks, freed blocks: who may use what, and when.

import Foundation
import Testing
import ThinMetadata

@Suite struct SharingTests {
    private let one = ThinDeviceID(1)

    private func pool(_ mappings: Int = 600) throws -> Harness {
        let harness = try Harness(metadataBlocks: 2000, dataBlocks: 20_000, cacheBlocks: 8)
        try harness.create(1)
        for block in 0..<mappings { try harness.write(1, UInt64(block)) }
        try harness.commit()
        return harness
    }

    @Test func exclusiveOnlyWhenEveryStateSaysSo() throws {
        let harness = try pool()
        let pool = harness.pool
        let block = VirtualBlock(7)
        #expect(try pool.isExclusive(one, block))
        try harness.snapshot(2, of: 1)
        #expect(try !pool.isExclusive(one, block))
        try harness.commit()
        #expect(try !pool.isExclusive(one, block))
        // The origin gets its own copy; the old block is the snapshot's alone, but on a path that
        // was shared in the committed state.
        try harness.write(1, 7)
        #expect(try !pool.isExclusive(one, block))
        try harness.commit()
        #expect(try pool.isExclusive(one, block))
        #expect(try !pool.isExclusive(one, VirtualBlock(8)))
        try harness.delete(2)
        #expect(try !pool.isExclusive(one, VirtualBlock(8)))
        try harness.freeze()
        #expect(try !pool.isExclusive(one, VirtualBlock(8)))
        try harness.finishCommit()
        #expect(try pool.isExclusive(one, VirtualBlock(8)))
    }

    /// The snapshot shares a root that is new in the same transaction.
    @Test func snapshotOfUncommittedMappings() throws {
        let harness = try pool(10)
        for block in 0..<300 { try harness.write(1, UInt64(1000 + block)) }
        try harness.snapshot(2, of: 1)
        try harness.snapshot(3, of: 2)
        try harness.write(1, 1000)
        try harness.write(2, 1001)
        try harness.write(3, 1002)
        try harness.commit()
        try harness.discard(1, 0..<UInt64.max, limit: 10_000)
        try harness.delete(3)
        try harness.commit()
    }

    @Test func timeHasItsLimit() throws {
        let device = TestDevice(blocks: 1000)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 1000)
        device.editSuperblock { $0.setLE32(44, 0xFF_FFFE) }
        let harness = try Harness(image: device, cacheBlocks: 8)
        try harness.create(1)
        try harness.snapshot(2, of: 1)
        #expect(harness.pool.time == 0xFF_FFFF)
        try harness.write(2, 5)
        #expect(throws: MetadataError.tooManySnapshots) { try harness.snapshot(3, of: 1) }
        try harness.commit()
        #expect(
            try harness.pool.lookup(ThinDeviceID(2), VirtualBlock(5))
                == Mapping(block: DataBlock(0), time: 0xFF_FFFF))
    }

    @Test func unmetPreconditionsChangeNothing() throws {
        let harness = try pool(3)
        let missing = ThinDeviceID(9)
        #expect(throws: MetadataError.deviceExists(one)) { try harness.create(1) }
        #expect(throws: MetadataError.noSuchDevice(missing)) { try harness.snapshot(10, of: 9) }
        #expect(throws: MetadataError.deviceExists(one)) { try harness.snapshot(1, of: 1) }
        #expect(throws: MetadataError.noSuchDevice(missing)) { try harness.delete(9) }
        #expect(throws: MetadataError.noSuchDevice(missing)) {
            try harness.pool.lookup(missing, VirtualBlock(0))
        }
        #expect(try harness.pool.details(missing) == nil)
        #expect(!harness.pool.hasChanges)
        try harness.commit()
    }

    @Test func freedBlocksWaitForCommitAndDrain() throws {
        let harness = try Harness(metadataBlocks: 500, dataBlocks: 10, cacheBlocks: 8)
        try harness.create(1)
        for block in 0..<10 { #expect(try harness.write(1, UInt64(block))) }
        try harness.commit()
        #expect(try harness.pool.allocateDataBlock() == nil)
        try harness.discard(1, 0..<4, limit: 100)
        #expect(try harness.pool.allocateDataBlock() == nil)
        #expect(harness.pool.dataBlocksUsed == 6 && harness.pool.dataBlocksAvailable == 0)
        try harness.freeze()
        #expect(try harness.pool.allocateDataBlock() == nil)
        try harness.finishCommit()
        #expect(try harness.pool.allocateDataBlock() == nil)
        #expect(harness.draining.count == 4)
        harness.drain()
        #expect(harness.pool.dataBlocksAvailable == 4)
        #expect(try harness.write(1, 100))
    }

    @Test func aReservationIsInNoCommit() throws {
        let harness = try pool(5)
        let block = try #require(try harness.pool.allocateDataBlock())
        try harness.write(1, 77)
        try harness.commit()
        #expect(try readImage(harness.device).dataAllocated == 6)
        harness.pool.releaseReservation(block)
        #expect(harness.pool.dataBlocksAvailable == 20_000 - 6)
    }

    @Test func replacedAndDiscardedAreToldApart() throws {
        let harness = try pool(5)
        try harness.write(1, 0)
        try harness.discard(1, 1..<3, limit: 9)
        let frozen = try harness.pool.freeze()
        let freed = harness.pool.committed(frozen)
        #expect(freed.replaced == [DataBlock(0)])
        #expect(freed.discarded == [DataBlock(1), DataBlock(2)])
    }

    @Test func anEmptyCommitWritesTheSuperblockOnly() throws {
        let harness = try pool(5)
        #expect(!harness.pool.hasChanges && harness.pool.dirtyBlocks == 0)
        let frozen = try harness.pool.freeze()
        #expect(frozen.blocks == 0)
        let before = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 8)
        defer { before.deallocate() }
        frozen.copySuperblock(to: before)
        #expect(memcmp(before, harness.device.block(0), 4096) == 0)
        _ = harness.pool.committed(frozen)
    }

    /// A metadata snapshot shares top level and details: nothing of it may change.
    @Test(arguments: [11, 12, 13] as [UInt64]) func aHeldMetadataSnapshotStays(seed: UInt64) throws
    {
        var random = Generator(seed: seed)
        let first = try pool()
        for id in 2..<40 as Range<UInt64> { try first.snapshot(id, of: 1 + (id - 2) / 3) }
        try first.commit()
        // Most roots are their device's alone: only the held top level shares them.
        for id in 1..<36 as Range<UInt64> { try first.write(id, id) }
        try first.commit()
        first.device.reserveMetadataSnapshot()
        try expectClean(first.device, first.directory)
        let harness = try Harness(image: first.device, cacheBlocks: 8)
        harness.toolEvery = 5
        let held = try #require(harness.pool.heldRoot)
        let top = harness.device.le64(held.rawValue, 320)
        let topBefore = Data(bytes: harness.device.block(top), count: 4096)
        #expect(try !harness.pool.isExclusive(one, VirtualBlock(3)))
        for _ in 0..<40 {
            let ids = harness.model.ids
            let id = ids[random.below(ids.count)]
            switch random.below(5) {
            case 0: try harness.delete(id)
            case 1: try harness.discard(id, UInt64(random.below(600))..<600, limit: 500)
            case 2: try harness.snapshot(UInt64(1000 + random.below(1_000_000)), of: id)
            default: for _ in 0..<20 { try harness.write(id, UInt64(random.below(700))) }
            }
            if random.chance(50) { try harness.commit() }
        }
        try harness.commit()
        #expect(harness.pool.heldRoot == held)
        #expect(Data(bytes: harness.device.block(top), count: 4096) == topBefore)
    }

    /// Leaves at their minimum are merged with neighbours that another device shares.
    @Test(arguments: [84, 85, 86, 90, 120, 168]) func mergingSharedLeaves(left: Int) throws {
        for right in [84, 85, 100] as [UInt64] {
            let harness = try Harness(metadataBlocks: 500, dataBlocks: 5000, cacheBlocks: 8)
            try harness.create(1)
            // Splits 168 to 84.
            for block in 0..<168 + right { try harness.write(1, block) }
            try harness.discard(1, 0..<UInt64(168 - left), limit: 1000)
            try harness.commit()
            try harness.snapshot(2, of: 1)
            try harness.snapshot(3, of: 1)
            try harness.discard(2, 0..<170, limit: 1)
            try harness.commit()
            try harness.discard(3, 170..<200, limit: 20)
            try harness.commit()
            try harness.discard(1, 0..<UInt64.max, limit: 3)
            try harness.delete(2)
            try harness.commit()
        }
    }
}
