// Running out of metadata, wrong hints, sequential fill, determinism.

import Foundation
import Testing
import ThinMetadata

@Suite struct SpaceTests {
    /// Whatever the size: provisioning stops in time, every freeze succeeds, and all can be undone.
    @Test(arguments: [100, 120, 160, 200, 400, 1000])
    func aFullMetadataDeviceCanBeEmptied(blocks: Int) throws {
        try fillAndEmpty(blocks, dataBlocks: 60_000)
    }

    /// The same where the blocks of a leaf may lie in more bitmaps than a small reserve has room for.
    @Test(arguments: [300, 400])
    func aFullMetadataDeviceOfManyBitmapsCanBeEmptied(blocks: Int) throws {
        try fillAndEmpty(blocks, dataBlocks: 100 * 16_320)
    }

    private func fillAndEmpty(_ blocks: Int, dataBlocks: UInt64) throws {
        var random = Generator(seed: UInt64(blocks))
        let harness = try Harness(metadataBlocks: blocks, dataBlocks: dataBlocks, cacheBlocks: 8)
        harness.toolEvery = 60
        var made: UInt64 = 0
        var refused = 0
        while refused < 20 {
            do {
                if made == 0 || random.chance(6) {
                    let ids = harness.model.ids
                    if made == 0 || random.chance(30) {
                        try harness.create(made)
                    } else {
                        try harness.snapshot(made, of: ids[random.below(ids.count)])
                    }
                    made += 1
                } else {
                    let ids = harness.model.ids
                    let id = ids[random.below(ids.count)]
                    for _ in 0..<40 {
                        guard try harness.write(id, UInt64(random.below(20_000))) else {
                            throw MetadataError.outOfMetadataSpace
                        }
                    }
                }
            } catch {
                guard error as? MetadataError == .outOfMetadataSpace else { throw error }
                refused += 1
                try harness.commit()
            }
            if random.chance(5) { try harness.commit() }
        }
        #expect(harness.model.devices.count > 0)
        var rounds = 0
        while let id = harness.model.ids.first {
            rounds += 1
            try #require(rounds < 2000)
            if random.chance(50) {
                try harness.discard(id, 0..<UInt64(random.below(20_000) + 1), limit: 700)
            } else {
                _ = try harness.deleteSlice(id, budget: 300)
            }
            try harness.commit()
        }
        #expect(try readImage(harness.device).dataAllocated == 0)
    }

    @Test func fullDataDeviceIsFoundFullOnlyWhenItIs() throws {
        let harness = try Harness(metadataBlocks: 1000, dataBlocks: 33_000, cacheBlocks: 8)
        try harness.create(1)
        for block in 0..<400 { try harness.write(1, UInt64(block)) }
        try harness.commit()
        // The index claims that nothing is free in the first bitmap.
        let root = harness.device.le64(0, 80)
        harness.device.edit(root, salt: 121_107) {
            $0.setLE32(1376 + 8, 0)
            $0.setLE32(1376 + 12, 16_320)
        }
        let again = try Harness(image: harness.device, cacheBlocks: 8)
        var allocated = 0
        while try again.pool.allocateDataBlock() != nil { allocated += 1 }
        #expect(allocated == 33_000 - 400)
    }

    @Test func wrongHintsAreRepairedByTheNextCommit() throws {
        let harness = try Harness(metadataBlocks: 1000, dataBlocks: 33_000, cacheBlocks: 8)
        try harness.create(1)
        for block in 0..<400 { try harness.write(1, UInt64(block)) }
        try harness.commit()
        let root = harness.device.le64(0, 80)
        harness.device.edit(root, salt: 121_107) {
            // Last bitmap: nr_free without the entries past the end, as some tools write it.
            $0.setLE32(1376 + 2 * 16 + 8, 33_000 - 2 * 16_320)
        }
        harness.device.editSuperblock { $0.setLE64(72, 9999) }
        let again = try Harness(image: harness.device, cacheBlocks: 8)
        #expect(again.pool.dataBlocksUsed == 400 && !again.pool.hasChanges)
        try again.write(1, 5000)
        try again.commit()
        try again.pool.growData(to: 48_960)
        #expect(again.pool.dataBlocksAvailable == 48_960 - 401)
        try again.commit()
    }

    @Test func sequentialWritesFillLeaves() throws {
        let harness = try Harness(metadataBlocks: 1000, dataBlocks: 33_000, cacheBlocks: 100)
        harness.toolEvery = 10
        try harness.create(1)
        for block in 0..<25_200 {
            try harness.write(1, UInt64(block))
            #expect(harness.model.devices[1]!.mappings[UInt64(block)]! >> 24 == UInt64(block))
            if block % 5000 == 0 { try harness.commit() }
        }
        try harness.commit()
        // 100 full leaves, and few more.
        #expect(harness.pool.metadataBlocksUsed < 120)
    }

    @Test func equalWorkGivesEqualImages() throws {
        func work() throws -> TestDevice {
            var random = Generator(seed: 99)
            let harness = try Harness(metadataBlocks: 1000, dataBlocks: 33_000, cacheBlocks: 16)
            harness.toolEvery = 100
            for id in 0..<30 as Range<UInt64> { try harness.create(id * 7) }
            for round in 0..<10 {
                for _ in 0..<300 {
                    try harness.write(UInt64(random.below(30)) * 7, UInt64(random.below(900)))
                }
                try harness.snapshot(UInt64(1000 + round), of: UInt64(random.below(30)) * 7)
                try harness.discard(UInt64(random.below(30)) * 7, 0..<300, limit: 100)
                try harness.commit()
                harness.pool.trimCache()
            }
            return harness.device
        }
        let one = try work()
        let two = try work()
        #expect(memcmp(one.bytes, two.bytes, one.blocks * 4096) == 0)
    }

    @Test func fullMetadataGrows() throws {
        let harness = try Harness(metadataBlocks: 140, dataBlocks: 60_000, cacheBlocks: 8)
        try harness.create(1)
        var virtual: UInt64 = 0
        while try harness.write(1, virtual) { virtual += 97 }
        try harness.commit()
        harness.device.grow(blocks: 40_000)
        try harness.pool.growMetadata()
        for _ in 0..<2000 {
            #expect(try harness.write(1, virtual))
            virtual += 97
        }
        try harness.commit()
        #expect(harness.pool.metadataBlocks == 40_000)
    }

    /// The bitmaps that growth adds are used before they have been written for the first time: what
    /// their places on the device hold until then is not theirs.
    @Test func newBitmapsAreUsedBeforeTheyAreWritten() throws {
        let harness = try Harness(metadataBlocks: 1000, dataBlocks: 1000, cacheBlocks: 8)
        try harness.create(1)
        try harness.commit()
        try harness.pool.growData(to: 40_000)
        try harness.freeze()
        for virtual in 0..<3 as Range<UInt64> {
            var skipped: [DataBlock] = []
            for _ in 0..<15_000 {
                if let block = try harness.pool.allocateDataBlock() { skipped.append(block) }
            }
            #expect(try harness.write(1, virtual))
            for block in skipped { harness.pool.releaseReservation(block) }
        }
        try harness.finishCommit()
        try harness.commit()
        #expect(harness.pool.dataBlocksUsed == 3)
    }

    /// The same of the metadata's own.
    @Test func newMetadataBitmapsAreUsedBeforeTheyAreWritten() throws {
        let harness = try Harness(metadataBlocks: 16_300, dataBlocks: 40_000, cacheBlocks: 8)
        try harness.create(1)
        try harness.commit()
        harness.device.grow(blocks: 40_000)
        // Something lies there: the device is not new.
        for block in 16_300..<16_400 as Range<UInt64> {
            memset(harness.device.block(block), 7, 4096)
        }
        try harness.pool.growMetadata()
        try harness.freeze()
        // More leaves than there was room for in the last of the old bitmaps.
        for virtual in 0..<8000 as Range<UInt64> { try harness.write(1, virtual) }
        try harness.finishCommit()
        try harness.commit()
    }

    /// A bitmap whose new place is not written yet must not be read back from there.
    @Test func bitmapsStayUntilTheirCommitIsDurable() throws {
        let harness = try Harness(metadataBlocks: 1000, dataBlocks: 12 * 16_320, cacheBlocks: 8)
        try harness.create(1)
        for round in 0..<3 as Range<UInt64> {
            // One mapping in each bitmap, more bitmaps than are kept.
            for page in 0..<12 as Range<UInt64> {
                try harness.write(1, 100 * round + page)
                var skipped: [DataBlock] = []
                for _ in 0..<16_319 {
                    if let block = try harness.pool.allocateDataBlock() { skipped.append(block) }
                }
                for block in skipped { harness.pool.releaseReservation(block) }
            }
            try harness.freeze()
            harness.pool.trimCache()
            harness.pool.trimCache()
            try harness.discard(1, 0..<1000, limit: 10)
            try harness.finishCommit()
            try harness.commit()
            harness.pool.trimCache()
            harness.pool.trimCache()
        }
    }
}
