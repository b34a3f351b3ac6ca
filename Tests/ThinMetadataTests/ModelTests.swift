// Random work against a model: every committed state is recounted and shown to thin_check.

import Foundation
import Testing
import ThinMetadata

@Suite struct ModelTests {
    /// The first seed and how many, as "100+50"; without it eight fixed ones.
    private static let seeds: [UInt64] = {
        let wanted = ProcessInfo.processInfo.environment["WAFER_MODEL_SEEDS"] ?? "1+8"
        let parts = wanted.split(separator: "+").compactMap { UInt64($0) }
        return parts.count == 2 ? Array(parts[0]..<parts[0] + parts[1]) : [1]
    }()

    @Test(arguments: seeds)
    func randomWorkMatchesTheModel(seed: UInt64) throws {
        var random = Generator(seed: seed)
        let cache = [8, 8, 64, 1000][random.below(4)]
        let harness = try Harness(
            metadataBlocks: [700, 1500, 4096][random.below(3)],
            dataBlocks: UInt64([3000, 17_000, 40_000][random.below(3)]), cacheBlocks: cache)
        harness.toolEvery = 4
        for _ in 0..<250 { try step(harness, &random) }
        if harness.frozen != nil { try harness.finishCommit() }
        harness.drain()
        try harness.commit()
        try expectClean(harness.device, harness.directory)
        #expect(try dump(harness.device, harness.directory) == harness.model.devices)
        // Everything can be taken apart again, and nothing leaks.
        for id in harness.model.ids {
            while try !harness.deleteSlice(id, budget: 500) { try harness.commit() }
        }
        try harness.commit()
        #expect(try readImage(harness.device).dataAllocated == 0)
        #expect(harness.pool.dataBlocksAvailable == harness.pool.dataBlocks)
    }

    /// One operation of any kind.
    private func step(_ harness: Harness, _ random: inout Generator) throws {
        let ids = harness.model.ids
        switch random.below(100) {
        case 0..<10 where ids.count < 25, _ where ids.isEmpty:
            let id = UInt64(random.chance(50) ? random.below(60) : random.below(1 << 24))
            if harness.model.devices[id] == nil {
                try? harness.create(id)
            } else {
                #expect(throws: MetadataError.deviceExists(ThinDeviceID(UInt32(id)))) {
                    try harness.create(id)
                }
            }
        case 10..<22 where ids.count < 30:
            let id = UInt64(100 + random.below(200))
            if harness.model.devices[id] == nil {
                let before = harness.model
                do {
                    try harness.snapshot(id, of: ids[random.below(ids.count)])
                } catch {
                    guard error as? MetadataError == .outOfMetadataSpace else { throw error }
                    #expect(harness.model == before)
                }
            }
        case 22..<60:
            try writeSome(harness, &random, ids[random.below(ids.count)])
        case 60..<74:
            let id = ids[random.below(ids.count)]
            let start = UInt64(random.below(2500))
            let length = UInt64([1, 10, 200, 3000][random.below(4)])
            try harness.discard(
                id, start..<start + length, limit: [1, 7, 300, 5000][random.below(4)])
        case 74..<78:
            try harness.delete(ids[random.below(ids.count)])
        case 78..<80:
            _ = try harness.deleteSlice(ids[random.below(ids.count)], budget: 300)
        case 80..<82:
            try grow(harness, &random)
        case 82..<92:
            // With probability, the commit is left under way while the next operations come.
            if harness.frozen != nil { try harness.finishCommit() }
            if random.chance(50) { harness.drain() }
            try harness.freeze()
            if random.chance(50) { try harness.finishCommit() }
        case 92..<94:
            try harness.crash()
        default:
            try harness.verifyLookups(&random, samples: 6)
        }
        harness.pool.trimCache()
    }

    private func writeSome(
        _ harness: Harness, _ random: inout Generator, _ id: UInt64
    ) throws {
        let committed = harness.committedModel.uses
        let committing = harness.frozenModel?.uses ?? [:]
        let start = random.chance(10) ? 1 << 33 : UInt64(random.below(2000))
        let count = [1, 5, 60, 600][random.below(4)]
        let isSequential = random.chance(60)
        for index in 0..<count {
            let virtual = isSequential ? start + UInt64(index) : UInt64(random.below(3000))
            guard try harness.write(id, virtual) else { break }
            let block = harness.model.devices[id]!.mappings[virtual]! >> 24
            // Allocatable means free in every state.
            #expect(committed[block] == nil && committing[block] == nil)
        }
    }

    private func grow(_ harness: Harness, _ random: inout Generator) throws {
        if random.chance(50) {
            let before = harness.pool.dataBlocks
            if before < 60_000 {
                try? harness.pool.growData(to: before + UInt64(random.below(9000)))
            }
        } else if harness.device.blocks < 20_000 {
            harness.device.grow(blocks: harness.device.blocks + random.below(4000))
            try harness.pool.growMetadata()
            #expect(harness.pool.metadataBlocks == UInt64(harness.device.blocks))
        }
    }
}
