// New pools, and what is refused at the door.

import BlockIO
import Foundation
import Testing
import ThinMetadata

@Suite struct FormatTests {
    private func makePool(_ metadataBlocks: Int = 1024, _ dataBlocks: UInt64 = 20_000) throws
        -> TestDevice
    {
        let device = TestDevice(blocks: metadataBlocks)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: dataBlocks)
        return device
    }

    @Test(
        arguments: [
            (100, 1), (100, 0), (256, 16_320), (256, 16_321), (1024, 20_000), (40_000, 6_000_000),
            (20_000, 16_320 * 168), (20_000, 16_320 * 169),
        ] as [(Int, UInt64)])
    func newPoolIsCleanAndEmpty(metadataBlocks: Int, dataBlocks: UInt64) throws {
        let device = try makePool(metadataBlocks, dataBlocks)
        let image = try readImage(device)
        #expect(image.devices.isEmpty && image.dataAllocated == 0)
        try expectClean(device, TemporaryDirectory())
        let pool = try ThinMetadata(device, cacheBlocks: 64)
        #expect(pool.dataBlocks == dataBlocks && pool.dataBlocksAvailable == dataBlocks)
        #expect(pool.dataBlocksUsed == 0 && pool.dataBlockSectors == 128)
        #expect(pool.metadataBlocks == UInt64(metadataBlocks))
        #expect(pool.metadataBlocksUsed == image.metadataAllocated)
        #expect(try pool.deviceIDs() == [])
        #expect(pool.time == 0 && pool.heldRoot == nil && !pool.needsCheck && !pool.hasChanges)
        #expect(device.writes.last == 0 && device.writes.dropLast().allSatisfy { $0 != 0 })
    }

    @Test func formatRefusesWhatCannotWork() throws {
        let device = TestDevice(blocks: 1024)
        for sectors in [0, 64, 129, 2_097_152 + 128] as [UInt32] {
            #expect(throws: MetadataError.self) {
                try ThinMetadata.format(device, dataBlockSectors: sectors, dataBlocks: 1)
            }
        }
        #expect(throws: MetadataError.self) {
            try ThinMetadata.format(
                TestDevice(blocks: 30), dataBlockSectors: 128, dataBlocks: 1000)
        }
        #expect(throws: MetadataError.self) {
            try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 1000 * 16_320)
        }
        #expect(device.writes.isEmpty)
    }

    private func openingError(_ device: TestDevice) -> MetadataError? {
        do {
            _ = try ThinMetadata(device, cacheBlocks: 8)
            return nil
        } catch {
            return error
        }
    }

    @Test func foreignSuperblocksAreRefused() throws {
        #expect(
            openingError(TestDevice(blocks: 100)) == .notAPool(path: "test device", "it is blank"))
        #expect(openingError(TestDevice(blocks: 0)) != nil)
        let changes: [(Int, UInt64)] = [(8, 1), (32, 0xDEAD)]
        for (offset, value) in changes {
            let device = try makePool()
            device.editSuperblock { $0.setLE64(offset, value) }
            guard case .notAPool = openingError(device) else {
                Issue.record("offset \(offset) was accepted")
                continue
            }
        }
        let damaged = try makePool()
        damaged.block(0).setLE32(2000, 1)
        guard case .notAPool = openingError(damaged) else {
            Issue.record("a wrong checksum was accepted")
            return
        }
    }

    @Test(arguments: [(40, 1), (40, 3), (356, 1), (360, 1), (336, 100)] as [(Int, UInt32)])
    func unknownFeaturesAreRefused(offset: Int, value: UInt32) throws {
        let device = try makePool()
        device.editSuperblock { $0.setLE32(offset, value) }
        guard case .unsupported = openingError(device) else {
            Issue.record("offset \(offset), value \(value) was accepted")
            return
        }
    }

    @Test func aDeviceCutShortIsRefused() throws {
        let device = try makePool()
        let short = TestDevice(blocks: 1000)
        memcpy(short.bytes, device.bytes, 1000 * 4096)
        guard case .unsupported = openingError(short) else {
            Issue.record("accepted")
            return
        }
    }

    @Test(arguments: [80, 88, 208, 216, 320, 328]) func rootsOutsideAreDamage(offset: Int) throws {
        for root in [0, 1024, UInt64.max] {
            let device = try makePool()
            device.editSuperblock { $0.setLE64(offset, root) }
            guard case .corrupt = openingError(device) else {
                Issue.record("root \(root) at \(offset) was accepted")
                continue
            }
        }
    }

    @Test func unknownFieldsSurviveACommit() throws {
        let device = try makePool()
        device.editSuperblock {
            $0.setLE64(16, 0x1122_3344)
            $0.setLE64(48, 77)
            $0.setLE32(352, 5)
            $0.setLE64(400, 99)
        }
        let harness = try Harness(image: device, cacheBlocks: 8)
        #expect(harness.pool.transactionID == 77)
        try harness.pool.createThin(ThinDeviceID(4))
        #expect(try harness.pool.details(ThinDeviceID(4))?.transactionID == 77)
        harness.model.devices[4] = ImageDevice(transaction: 77)
        try harness.commit()
        #expect(device.le64(0, 16) == 0x1122_3344 && device.le64(0, 48) == 77)
        #expect(device.le32(0, 352) == 5 && device.le64(0, 400) == 99)
    }

    @Test func needsCheckForbidsChangesUntilCleared() throws {
        let device = try makePool()
        try ThinMetadata.setNeedsCheck(device, true)
        let pool = try ThinMetadata(device, cacheBlocks: 8)
        #expect(pool.needsCheck)
        #expect(throws: MetadataError.needsCheck(path: "test device")) {
            try pool.createThin(ThinDeviceID(1))
        }
        #expect(throws: MetadataError.needsCheck(path: "test device")) { try pool.freeze() }
        try ThinMetadata.setNeedsCheck(device, false)
        let again = try ThinMetadata(device, cacheBlocks: 8)
        try again.createThin(ThinDeviceID(1))
    }

    /// What the kernel leaves after its own format: no data blocks yet.
    @Test func growsFromNoDataBlocks() throws {
        let device = TestDevice(blocks: 1024)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 0)
        let harness = try Harness(image: device, cacheBlocks: 8)
        #expect(try harness.pool.allocateDataBlock() == nil)
        try harness.pool.growData(to: 40_000)
        try harness.create(1)
        for block in 0..<500 { try harness.write(1, UInt64(block)) }
        try harness.commit()
        #expect(harness.pool.dataBlocks == 40_000)
        #expect(harness.pool.dataBlocksAvailable == 39_500)
    }
}
