// A copy of a pool's metadata is spoilt and used. Checksums are right, so that the contents have to
// be looked at: as if the writer had been faulty. Whatever is done with it ends, with an answer or
// with a MetadataError.

import Glibc
import ThinMetadata

struct MetadataDamage {
    private let scratch: ScratchDevice
    private let used: [UInt64]
    private let dataBlocks: UInt64
    private let log: ((String) -> Void)?

    init(_ device: SparseDevice, log: ((String) -> Void)?) {
        scratch = ScratchDevice(device)
        let image = MetadataImage(device)
        used = image.blocksInUse.sorted()
        dataBlocks = image.superblock.le64(
            SuperblockLayout.dataSpaceMapRoot + SpaceMapRootLayout.blockCount)
        self.log = log
    }

    func spoilAndUse(_ random: inout SeededRandom) throws {
        for _ in 0..<1 + random.below(3) { spoil(&random) }
        try use(&random)
        var check = MetadataCheck(device: scratch)
        if random.oneIn(4) { _ = check.run() }
    }

    // MARK: - Damage

    private func kind(of block: UInt64) -> BlockKind? {
        scratch[block].withUnsafeBytes { bytes in
            BlockKind.allCases.first {
                bytes.baseAddress!.checksum(as: $0) == bytes.baseAddress!.le32(0)
            }
        }
    }

    private func spoil(_ random: inout SeededRandom) {
        var block = used[random.below(used.count)]
        // Superblock, space maps and roots are few, and much depends on them.
        if random.oneIn(2) {
            let superblock = scratch[0]
            let fields = [
                SuperblockLayout.dataMappingRoot, SuperblockLayout.deviceDetailsRoot,
                SuperblockLayout.dataSpaceMapRoot + SpaceMapRootLayout.bitmapRoot,
                SuperblockLayout.dataSpaceMapRoot + SpaceMapRootLayout.refCountRoot,
                SuperblockLayout.metadataSpaceMapRoot + SpaceMapRootLayout.bitmapRoot,
                SuperblockLayout.metadataSpaceMapRoot + SpaceMapRootLayout.refCountRoot,
            ]
            let field = random.below(fields.count + 1)
            block = field == fields.count ? 0 : superblock.le64(fields[field])
            if field == 4, random.oneIn(2), let kind = kind(of: block), kind == .index {
                block = scratch[block].le64(IndexBlockLayout.entries)
            }
        }
        if random.oneIn(24) {
            log?("block \(block) is blank")
            scratch[block] = [UInt8](repeating: 0, count: Layout.blockSize)
            return
        }
        switch kind(of: block) {
        case .superblock: spoilSuperblock(&random)
        case .node: spoilNode(block, &random)
        case .bitmap: spoilBitmap(block, &random)
        case .index: spoilIndex(block, &random)
        case nil: break
        }
    }

    private func pointer(_ random: inout SeededRandom) -> UInt64 {
        switch random.below(6) {
        case 0: return 0
        case 1: return scratch.size / UInt64(Layout.blockSize)
        case 2: return .max
        default: return used[random.below(used.count)]
        }
    }

    private func spoilSuperblock(_ random: inout SeededRandom) {
        let roots = [SuperblockLayout.dataSpaceMapRoot, SuperblockLayout.metadataSpaceMapRoot]
        let root = roots[random.below(2)]
        let choice = random.below(12)
        let pointer = pointer(&random)
        let dice = random.below(5)
        log?("superblock: \(choice) \(pointer) \(dice)")
        if choice == 11 { return scratch.truncate(to: [100, 4096, 65_536][dice % 3]) }
        scratch.edit(0, .superblock) { memory in
            switch choice {
            case 0: memory.setLE64(SuperblockLayout.dataMappingRoot, pointer)
            case 1: memory.setLE64(SuperblockLayout.deviceDetailsRoot, pointer)
            case 2: memory.setLE64(root + SpaceMapRootLayout.bitmapRoot, pointer)
            case 3: memory.setLE64(root + SpaceMapRootLayout.refCountRoot, pointer)
            case 4, 5:
                let offset = root + SpaceMapRootLayout.blockCount
                let count = memory.le64(offset)
                let counts: [UInt64] = [0, count / 2, count + 20_000, 1 << 40 + 1, count + 1]
                memory.setLE64(offset, counts[dice])
            case 6: memory.setLE64(root + SpaceMapRootLayout.allocatedCount, pointer)
            case 7: memory.setLE32(SuperblockLayout.time, UInt32(1) << UInt32(20 + dice))
            case 8: memory.setLE32(SuperblockLayout.dataBlockSize, UInt32(1) << UInt32(5 * dice))
            case 9:
                let fields: [Int] = [
                    SuperblockLayout.version, SuperblockLayout.incompatFlags,
                    SuperblockLayout.compatReadOnlyFlags, SuperblockLayout.magic, 8,
                ]
                memory.setLE32(fields[dice], 7)
            default: memory.setLE64(SuperblockLayout.heldRoot, pointer)
            }
        }
        if choice == 10, dice == 0 {
            var bytes = scratch[0]
            bytes[Layout.blockSize / 2] ^= 1
            scratch[0] = bytes
        }
    }

    private func spoilNode(_ block: UInt64, _ random: inout SeededRandom) {
        let bytes = scratch[block]
        let count = min(Int(bytes.le32(NodeLayout.entryCount)), 252)
        let capacity = min(Int(bytes.le32(NodeLayout.maxEntries)), 336)
        let size = min(Int(bytes.le32(NodeLayout.valueSize)), 24)
        let entry = [0, max(0, count - 1), random.below(count + 1)][random.below(3)]
        let key = NodeLayout.keys + 8 * entry
        let value = min(
            NodeLayout.keys + 8 * capacity + size * entry, Layout.blockSize - 8)
        let choice = random.below(17)
        let pointer = pointer(&random)
        let other = scratch[used[random.below(used.count)]]
        let dice = random.below(5)
        log?(
            "node \(block), \(count) of \(capacity) x \(size): \(choice) \(entry) \(pointer) \(dice)"
        )
        scratch.edit(block, .node) { memory in
            switch choice {
            case 0: memory.setLE32(NodeLayout.flags, [0, 1, 2, 3, 4][dice])
            case 1, 2:
                let counts = [0, 1, capacity, capacity + 1, max(0, count - 1)]
                memory.setLE32(NodeLayout.entryCount, UInt32(counts[dice]))
            case 3:
                let field = [NodeLayout.maxEntries, NodeLayout.valueSize][dice % 2]
                memory.setLE32(field, memory.le32(field) + 3)
            case 4, 5:
                let keys: [UInt64] = [
                    0, .max, memory.le64(key) &+ 1, 1 << 41, memory.le64(key) / 2,
                ]
                memory.setLE64(key, keys[dice])
            case 6, 7, 8: memory.setLE64(value, pointer)
            case 9:
                // A mapping to another data block, in use by others or outside.
                let blocks: [UInt64] = [dataBlocks, 0, dataBlocks - min(1, dataBlocks), 1 << 39, 5]
                memory.setLE64(value, blocks[dice] << 24)
            case 10: memory.setLE32(value, [0, 2, 3, .max, 4][dice])
            case 11: memory.setLE64(value, [0, .max, 1 << 32, 1, 100_000][dice])
            case 12:
                // A copy of another node, in this one's place.
                memory.copyMemory(from: [UInt8](other), byteCount: Layout.blockSize)
                memory.setLE64(8, block)
            case 13, 14:
                // A node that leads to itself, or to another one.
                guard size == 8 else { return }
                memory.setLE32(NodeLayout.flags, NodeLayout.internalFlag)
                memory.setLE32(NodeLayout.entryCount, 1)
                memory.setLE64(NodeLayout.keys + 8 * capacity, dice > 0 ? block : pointer)
            case 15:
                // What an index entry says of its bitmap is a hint.
                let free: UInt64 = [0, 16_320, 5, 1 << 31, 0][dice]
                memory.setLE64(min(value + 8, Layout.blockSize - 8), free | 16_320 << 32)
            default: memory.setLE64(8, pointer)
            }
        }
    }

    private func spoilBitmap(_ block: UInt64, _ random: inout SeededRandom) {
        let choice = random.below(6)
        let first = random.oneIn(2) ? 0 : random.below(1000)
        let bits = UInt8(random.below(4)) * 0x55
        let place = BitmapLayout.entries + Int(used[random.below(used.count)] / 4 % 4080)
        let pointer = pointer(&random)
        log?("bitmap \(block): \(choice) \(first) \(bits) \(place)")
        scratch.edit(block, .bitmap) { memory in
            switch choice {
            case 0: memset(memory + BitmapLayout.entries, Int32(bits), Layout.blockSize - 16)
            case 1: memset(memory + BitmapLayout.entries + first, Int32(bits), 16)
            case 2: memory.setLE64(8, pointer)
            default: memory.storeBytes(of: bits, toByteOffset: place, as: UInt8.self)
            }
        }
    }

    private func spoilIndex(_ block: UInt64, _ random: inout SeededRandom) {
        let pointer = pointer(&random)
        let choice = random.below(4)
        let number = UInt32(random.oneIn(2) ? 0 : random.below(20_000))
        log?("index \(block): \(choice) \(pointer) \(number)")
        scratch.edit(block, .index) { memory in
            let entry = memory + IndexBlockLayout.entries
            switch choice {
            case 0, 1: entry.setLE64(IndexEntryLayout.block, pointer)
            case 2: entry.setLE32(IndexEntryLayout.freeCount, number)
            default: entry.setLE32(IndexEntryLayout.noneFreeBefore, number)
            }
        }
    }

    // MARK: - Use

    /// Everything that can be asked and done, as the pool does it.
    private func use(_ random: inout SeededRandom) throws {
        do {
            let metadata = try ThinMetadata(scratch, cacheBlocks: 1 + random.below(64))
            _ = metadata.heldRoot
            let ids = try metadata.deviceIDs()
            for id in ids.prefix(40) {
                do { try read(metadata, id) } catch let error as MetadataError {
                    log?("\(error)")
                }
                metadata.trimCache()
            }
            guard !ids.isEmpty else { return }
            for round in 0..<30 {
                let id = random.oneIn(2) ? ids[0] : ids[random.below(ids.count)]
                try change(metadata, id, round, &random)
                metadata.trimCache()
            }
            try commit(metadata)
        } catch let error as MetadataError {
            log?("\(error)")
        }
    }

    private func read(_ metadata: ThinMetadata, _ id: ThinDeviceID) throws {
        guard try metadata.details(id) != nil else { return }
        var at = VirtualBlock(0)
        for _ in 0..<300 where at.rawValue < UInt64.max {
            var first: VirtualBlock?
            let next = try metadata.visitLeaf(id, from: at, limit: VirtualBlock(.max)) {
                virtual, _ in first = first ?? virtual
            }
            guard next > at else { throw WorldFailure(description: "a walk does not go on") }
            if let first {
                _ = try metadata.lookup(id, first)
                _ = try metadata.isExclusive(id, first)
            }
            at = next
        }
    }

    private func change(
        _ metadata: ThinMetadata, _ id: ThinDeviceID, _ round: Int, _ random: inout SeededRandom
    ) throws {
        guard try metadata.details(id) != nil else { return }
        switch random.below(9) {
        case 0:
            let start = UInt64(random.below(2000))
            _ = try metadata.remove(id, start..<start + 3000, limit: 400) { _, _ in }
        case 1: _ = try metadata.remove(id, 0..<UInt64.max, limit: 2000) { _, _ in }
        case 2:
            let copy = ThinDeviceID(UInt32(16_000_000 + round))
            try metadata.createSnapshot(copy, of: id)
            try insert(metadata, copy, &random)
        case 3: try metadata.deleteDevice(id)
        case 4: _ = try metadata.deleteSlice(id, budget: 50)
        case 5: try metadata.createThin(ThinDeviceID(UInt32(15_000_000 + round)))
        case 6 where random.oneIn(3):
            try metadata.growData(to: metadata.dataBlocks + UInt64(random.below(40_000)))
        case 6: try commit(metadata)
        default: try insert(metadata, id, &random)
        }
    }

    private func insert(
        _ metadata: ThinMetadata, _ id: ThinDeviceID, _ random: inout SeededRandom
    ) throws {
        let start = UInt64(random.below(random.oneIn(2) ? 2000 : 1 << 40))
        for key in start..<start + UInt64(1 + random.below(60)) {
            guard let block = try metadata.allocateDataBlock() else { return }
            _ = try metadata.insert(id, VirtualBlock(key), block)
        }
    }

    private func commit(_ metadata: ThinMetadata) throws {
        let transaction = try metadata.freeze()
        var bytes = [UInt8](repeating: 0, count: Layout.blockSize)
        for index in 0..<transaction.blocks {
            let target = bytes.withUnsafeMutableBytes {
                transaction.copyBlock(index, to: $0.baseAddress!)
            }
            scratch[target.rawValue] = bytes
        }
        bytes.withUnsafeMutableBytes { transaction.copySuperblock(to: $0.baseAddress!) }
        scratch[0] = bytes
        let freed = metadata.committed(transaction)
        metadata.makeAvailable(freed.discarded + freed.replaced)
    }
}
