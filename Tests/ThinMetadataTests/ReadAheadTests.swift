// Nodes that somebody else reads and offers.

import BlockIO
import Testing

@testable import ThinMetadata

@Suite struct ReadAheadTests {
    private static let mappings: UInt64 = 20_000
    private static let id = ThinDeviceID(1)

    private func pool() throws -> MemoryDevice {
        let device = try MemoryDevice(size: 16 << 20)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 2 * Self.mappings)
        let metadata = try ThinMetadata(device, cacheBlocks: 4096)
        try metadata.createThin(Self.id)
        for block in 0..<Self.mappings {
            let place = try #require(try metadata.allocateDataBlock())
            _ = try metadata.insert(Self.id, VirtualBlock(block), place)
        }
        try commit(metadata, device)
        return device
    }

    private func commit(_ metadata: ThinMetadata, _ device: MemoryDevice) throws {
        let transaction = try metadata.freeze()
        let memory = AlignedBuffer(count: Layout.blockSize)
        for index in 0..<transaction.blocks {
            let number = transaction.copyBlock(index, to: memory.pointer)
            try device.write(
                at: number.rawValue * UInt64(Layout.blockSize),
                from: UnsafeRawBufferPointer(memory.bytes))
        }
        transaction.copySuperblock(to: memory.pointer)
        try device.write(at: 0, from: UnsafeRawBufferPointer(memory.bytes))
        _ = metadata.committed(transaction)
    }

    private func missing(_ metadata: ThinMetadata) throws -> [MetadataBlock] {
        var found: [MetadataBlock] = []
        try metadata.forEachMissingNode(Self.id, 0..<Self.mappings, leaves: 1000) {
            found.append($0)
        }
        return found
    }

    @Test func whatIsOfferedIsNotReadAgain() throws {
        let device = try pool()
        let metadata = try ThinMetadata(device, cacheBlocks: 4096)
        let memory = AlignedBuffer(count: Layout.blockSize)
        var rounds = 0
        while true {
            let blocks = try missing(metadata)
            if blocks.isEmpty { break }
            rounds += 1
            for block in blocks {
                try device.read(at: block.rawValue * UInt64(Layout.blockSize), into: memory.bytes)
                metadata.offer(block, memory.pointer, readAt: metadata.blockReuses)
            }
        }
        // The root, then the leaves.
        #expect(rounds == 2)
        for block in 0..<Self.mappings {
            #expect(try metadata.lookup(Self.id, VirtualBlock(block)) != nil)
        }
    }

    @Test func onlyWhatIsWholeAndNewIsBelieved() throws {
        let device = try pool()
        let metadata = try ThinMetadata(device, cacheBlocks: 4096)
        let memory = AlignedBuffer(count: Layout.blockSize)
        let root = try #require(try missing(metadata).first)
        try device.read(at: root.rawValue * UInt64(Layout.blockSize), into: memory.bytes)
        // Damaged, or another block.
        memory.pointer.storeBytes(of: 1, toByteOffset: 2000, as: UInt8.self)
        metadata.offer(root, memory.pointer, readAt: metadata.blockReuses)
        #expect(try missing(metadata) == [root])
        try device.read(at: root.rawValue * UInt64(Layout.blockSize), into: memory.bytes)
        metadata.offer(MetadataBlock(root.rawValue + 1), memory.pointer, readAt: 0)
        #expect(try missing(metadata) == [root])
        // Read before blocks became reusable: it may be another one's contents by now.
        let before = metadata.blockReuses
        try metadata.createThin(ThinDeviceID(2))
        try commit(metadata, device)
        #expect(metadata.blockReuses != before)
        metadata.offer(root, memory.pointer, readAt: before)
        #expect(try missing(metadata) == [root])
        metadata.offer(root, memory.pointer, readAt: metadata.blockReuses)
        #expect(try missing(metadata) != [root])
    }
}
