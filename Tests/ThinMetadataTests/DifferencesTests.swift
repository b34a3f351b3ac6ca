// What a comparison of two devices costs, and what it says of damaged trees.

import BlockIO
import Testing

@testable import ThinMetadata

@Suite struct DifferencesTests {
    /// More than 252 leaves: three levels.
    private static let many: UInt64 = 70_000
    private let one = ThinDeviceID(1)
    private let two = ThinDeviceID(2)

    /// Device 1, two of whose blocks have changed since its snapshot, device 2; and device 3, which
    /// has one block more before all others.
    private func image(_ mappings: UInt64) throws -> (device: TestDevice, changed: [UInt64]) {
        let device = TestDevice(blocks: 3000)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 2 * mappings)
        let metadata = try ThinMetadata(device, cacheBlocks: 4096)
        try metadata.createThin(one)
        func write(_ id: ThinDeviceID, _ block: UInt64) throws {
            let place = try #require(try metadata.allocateDataBlock())
            _ = try metadata.insert(id, VirtualBlock(block), place)
        }
        for block in 0..<mappings { try write(one, 1000 + block) }
        try commit(metadata, device)
        try metadata.createSnapshot(two, of: one)
        let changed = [1000 + mappings / 2, 1000 + mappings - 1]
        for block in changed { try write(one, block) }
        try metadata.createSnapshot(ThinDeviceID(3), of: two)
        try write(ThinDeviceID(3), 0)
        try commit(metadata, device)
        return (device, changed)
    }

    private func commit(_ metadata: ThinMetadata, _ device: TestDevice) throws {
        let transaction = try metadata.freeze()
        for index in 0..<transaction.blocks {
            let memory = AlignedBuffer(count: Layout.blockSize)
            let number = transaction.copyBlock(index, to: memory.pointer)
            device.block(number.rawValue).copyMemory(from: memory.pointer, byteCount: 4096)
        }
        transaction.copySuperblock(to: device.block(0))
        _ = metadata.committed(transaction)
    }

    private func compare(
        _ metadata: ThinMetadata, _ id: ThinDeviceID, _ other: ThinDeviceID, reading: Bool = true
    ) throws -> (changed: [UInt64], steps: Int) {
        var changed: [UInt64] = []
        var steps = 0
        var at = VirtualBlock(0)
        while at.rawValue < 1 << 40 {
            let next = try metadata.visitDifferences(
                of: id, from: other, at, limit: VirtualBlock(1 << 40), reading: reading
            ) { if $1 { changed += $0 } }
            guard next > at else { break }
            at = next
            steps += 1
        }
        return (changed, steps)
    }

    @Test func whatIsSharedIsSkippedWhole() throws {
        let (device, changed) = try image(Self.many)
        let metadata = try ThinMetadata(device, cacheBlocks: 4096)
        _ = try metadata.details(one)
        _ = try metadata.details(two)
        device.reads = 0
        let result = try compare(metadata, one, two)
        #expect(result.changed == changed)
        // Two trees of three levels, two changes: two roots, and of each tree at most two inner
        // nodes and two leaves.
        #expect(device.reads <= 2 + 2 * (2 + 2))
        // Each change, and what lies before, between and behind on each level.
        #expect(result.steps <= 12)
    }

    @Test func oneRootIsNotLookedAt() throws {
        let device = try image(Self.many).device
        let metadata = try ThinMetadata(device, cacheBlocks: 4096)
        try metadata.createSnapshot(ThinDeviceID(4), of: two)
        device.reads = 0
        let result = try compare(metadata, ThinDeviceID(4), two)
        #expect(result.changed.isEmpty && result.steps == 1)
        #expect(device.reads == 0)
    }

    /// A block before all others makes the first leaf another one, and nothing else.
    @Test func aBlockInFrontOfAllOthers() throws {
        let metadata = try ThinMetadata(try image(Self.many).device, cacheBlocks: 4096)
        let result = try compare(metadata, two, ThinDeviceID(3))
        #expect(result.changed == [0])
        #expect(result.steps <= 6)
    }

    /// What is missing is told before it is needed, level by level, and then nothing is read.
    @Test func whatIsReadAheadIsNotReadAgain() throws {
        let (device, changed) = try image(Self.many)
        let metadata = try ThinMetadata(device, cacheBlocks: 4096)
        _ = try metadata.details(one)
        _ = try metadata.details(two)
        var rounds = 0
        while true {
            var wanted: [MetadataBlock] = []
            try metadata.forEachMissingNode(of: one, from: two, 0..<1 << 40, steps: 1000) {
                wanted.append($0)
            }
            if wanted.isEmpty { break }
            rounds += 1
            #expect(try compare(metadata, one, two, reading: false).changed.count < 2)
            for block in wanted {
                metadata.offer(
                    block, device.block(block.rawValue), readAt: metadata.blockReuses)
            }
        }
        #expect(rounds == 3)
        device.reads = 0
        #expect(
            try compare(metadata, one, two, reading: false).changed == changed)
        #expect(device.reads == 0)
    }

    /// Every block of the metadata damaged in turn: the right answer, or an error.
    @Test func damageIsAnError() throws {
        let (healthy, expected) = try image(4000)
        var errors = 0
        for block in 1..<100 {
            let device = TestDevice(copying: healthy)
            device.block(UInt64(block)).storeBytes(
                of: 0x5A5A_5A5A, toByteOffset: 900, as: UInt32.self)
            do {
                let metadata = try ThinMetadata(device, cacheBlocks: 64)
                #expect(try compare(metadata, one, two).changed == expected)
                var at = VirtualBlock(0)
                while at.rawValue < UInt64.max {
                    at = try metadata.visitSharing(one, from: at, limit: VirtualBlock(.max)) {
                        #expect($1 == !expected.contains($0.rawValue))
                    }
                }
            } catch is MetadataError { errors += 1 }
        }
        // At least all nodes of device 1.
        #expect(errors > 4000 / 252)
    }

    /// Trees of different heights that have a subtree in common.
    @Test func aHigherTreeAndALowerOne() throws {
        let device = TestDevice(blocks: 500)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 4000)
        let metadata = try ThinMetadata(device, cacheBlocks: 64)
        func write(_ id: ThinDeviceID, _ block: UInt64) throws {
            let place = try #require(try metadata.allocateDataBlock())
            _ = try metadata.insert(id, VirtualBlock(block), place)
        }
        try metadata.createThin(one)
        for block in 0..<1000 as Range<UInt64> { try write(one, block) }
        try metadata.createSnapshot(two, of: one)
        // What is left is one leaf; the other tree keeps its inner node.
        _ = try metadata.remove(one, 100..<1000, limit: 10_000) { _, _ in }
        #expect(try compare(metadata, one, two).changed == Array(100..<1000))
        #expect(try compare(metadata, two, one).changed == Array(100..<1000))
    }
}
