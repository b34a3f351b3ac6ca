// Damaged metadata: a typed error or an answer, never a crash, never an endless loop.

import Foundation
import Testing
import ThinMetadata

@Suite struct CorruptionTests {
    private func image() throws -> TestDevice {
        let harness = try Harness(metadataBlocks: 800, dataBlocks: 20_000, cacheBlocks: 100)
        harness.toolEvery = 100
        for id in 1...5 as ClosedRange<UInt64> { try harness.create(id) }
        for virtual in 0..<900 as Range<UInt64> { try harness.write(1 + virtual % 3, virtual) }
        for id in 6...20 as ClosedRange<UInt64> { try harness.snapshot(id, of: id % 5 + 1) }
        for id in 1...20 as ClosedRange<UInt64> {
            for step in 0..<5 as Range<UInt64> { try harness.write(id, step * 170 + id) }
        }
        try harness.commit()
        return harness.device
    }

    /// Everything the interface offers; errors end it.
    private func exercise(_ device: TestDevice, _ random: inout Generator) throws {
        let pool = try ThinMetadata(device, cacheBlocks: 30)
        for id in try pool.deviceIDs() {
            _ = try pool.details(id)
            var at = VirtualBlock(0)
            var visits = 0
            while at.rawValue < 2000 {
                let next = try pool.visitLeaf(id, from: at, limit: VirtualBlock(2000)) { _, _ in }
                try #require(next > at)
                at = next
                visits += 1
                try #require(visits < 5000)
            }
        }
        let ids = try pool.deviceIDs()
        guard !ids.isEmpty else { return }
        for round in 0..<40 {
            let id = ids[random.below(ids.count)]
            guard try pool.details(id) != nil else { continue }
            switch random.below(6) {
            case 0: _ = try pool.remove(id, 0..<500, limit: 200) { _, _ in }
            case 1: try pool.createSnapshot(ThinDeviceID(UInt32(500 + round)), of: id)
            case 2: try pool.deleteDevice(id)
            case 3: _ = try pool.isExclusive(id, VirtualBlock(3))
            case 4: _ = try pool.deleteSlice(id, budget: 50)
            default:
                guard let block = try pool.allocateDataBlock() else { return }
                _ = try pool.insert(id, VirtualBlock(UInt64(random.below(1200))), block)
            }
            if random.chance(20) {
                let frozen = try pool.freeze()
                let freed = pool.committed(frozen)
                pool.makeAvailable(freed.discarded + freed.replaced)
            }
        }
    }

    private func expectTyped(_ body: () throws -> Void) {
        do { try body() } catch {
            #expect(error is MetadataError, "\(error)")
        }
    }

    @Test func flippedBytesAreFoundByTheChecksum() throws {
        let good = try image()
        let live = try readImage(good).live.sorted()
        var random = Generator(seed: 31)
        for _ in 0..<400 {
            let device = TestDevice(copying: good)
            let block = live[random.below(live.count)]
            let offset = random.below(4096)
            let memory = device.block(block)
            let byte = memory.load(fromByteOffset: offset, as: UInt8.self)
            memory.storeBytes(
                of: byte ^ UInt8(1 + random.below(255)), toByteOffset: offset, as: UInt8.self)
            expectTyped { try exercise(device, &random) }
        }
    }

    /// The checksum is right, the contents are not: what a faulty writer would leave.
    @Test(arguments: [41, 42, 43, 44] as [UInt64]) func sealedNonsense(seed: UInt64) throws {
        let good = try image()
        let live = try readImage(good).live.sorted()
        var random = Generator(seed: seed)
        let salts: [UInt32] = [160_774, 121_107, 240_779, 160_478]
        for _ in 0..<600 {
            let device = TestDevice(copying: good)
            for _ in 0..<1 + random.below(3) {
                let block = live[random.below(live.count)]
                let memory = device.block(block)
                let unsalted = referenceChecksum(memory, salt: 0)
                guard let salt = salts.first(where: { unsalted ^ $0 == memory.le32(0) }) else {
                    continue
                }
                // Fields and the first entries are hit more often than the rest.
                let offset = [4, 16, 32, 64, 80, 2048, 16][random.below(7)] + 4 * random.below(24)
                device.edit(block, salt: salt) {
                    switch random.below(3) {
                    case 0: $0.setLE32(offset, UInt32(random.below(900)))
                    case 1: $0.setLE64(offset, UInt64(live[random.below(live.count)]))
                    default: $0.setLE32(offset, UInt32.max)
                    }
                }
            }
            expectTyped { try exercise(device, &random) }
        }
    }

    /// A time of more than 24 bits does not fit a mapping.
    @Test func timePastTheLastIsRefused() throws {
        let device = try image()
        device.editSuperblock { $0.setLE32(44, 1 << 24) }
        #expect(
            throws: MetadataError.corrupt(
                block: MetadataBlock(0), "its time, 16777216, is too late")
        ) { try ThinMetadata(device, cacheBlocks: 8) }
    }

    /// A number of mappings that cannot grow any more.
    @Test func detailsThatClaimTooMuchAreRefused() throws {
        let device = try image()
        // Values follow 126 keys.
        device.edit(device.le64(0, 328), salt: 121_107) { $0.setLE64(32 + 8 * 126, .max) }
        let pool = try ThinMetadata(device, cacheBlocks: 8)
        let block = try #require(try pool.allocateDataBlock())
        #expect(throws: MetadataError.self) {
            try pool.insert(ThinDeviceID(1), VirtualBlock(1 << 30), block)
        }
    }

    @Test func readErrorsKeepTheirType() throws {
        let device = try image()
        let pool = try ThinMetadata(device, cacheBlocks: 8)
        device.failReads = true
        do {
            _ = try pool.lookup(ThinDeviceID(1), VirtualBlock(1))
            Issue.record("no error")
        } catch {
            guard case .device = error else {
                Issue.record("\(error)")
                return
            }
        }
        device.failReads = false
        #expect(try pool.lookup(ThinDeviceID(1), VirtualBlock(3)) != nil)
    }

    /// A bitmap that is full, of which the index says that it is empty. The insertion that finds out has
    /// begun: it cannot end as one for which there is no space, which may be tried again.
    @Test func bitmapsThatClaimTooMuchAreDamage() throws {
        let perBitmap = BitmapLayout.entriesPerBitmap
        let harness = try Harness(
            metadataBlocks: 3 * perBitmap, dataBlocks: 20_000, cacheBlocks: 500)
        try harness.create(1)
        try harness.commit()
        let device = harness.device
        let index = device.le64(
            0, SuperblockLayout.metadataSpaceMapRoot + SpaceMapRootLayout.bitmapRoot)
        // Few are free in the first bitmap, and none in the others; the second claims otherwise.
        let freeBlocks = 300
        for bitmap in 0..<3 {
            let entry = IndexBlockLayout.entries + bitmap * IndexEntryLayout.size
            let used = Int(device.le32(index, entry + IndexEntryLayout.noneFreeBefore))
            let first = bitmap == 0 ? used + freeBlocks : 0
            device.edit(device.le64(index, entry), salt: 240_779) {
                let start = BitmapLayout.entries + first / 4
                memset($0 + start, 0xAA, Layout.blockSize - start)
            }
            guard bitmap != 1 else { continue }
            device.edit(index, salt: 160_478) {
                $0.setLE32(entry + IndexEntryLayout.freeCount, bitmap == 0 ? UInt32(freeBlocks) : 0)
            }
        }
        let pool = try ThinMetadata(device, cacheBlocks: 500)
        var failure: MetadataError?
        for id in 2...10_000 as ClosedRange<UInt32> where failure == nil {
            do throws(MetadataError) {
                try pool.createThin(ThinDeviceID(id))
                guard let block = try pool.allocateDataBlock() else { break }
                _ = try pool.insert(ThinDeviceID(id), VirtualBlock(0), block)
            } catch { failure = error }
        }
        guard case .corrupt = failure else {
            Issue.record("\(String(describing: failure))")
            return
        }
    }
}
