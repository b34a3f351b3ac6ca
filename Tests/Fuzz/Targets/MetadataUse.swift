// Everything that can be asked of a pool's metadata and done to it, as a fuzzed sequence. Errors of
// its own type are answers; the first one that a change meets ends the use, as a pool would fail.

import ThinMetadata

struct MetadataUse {
    private static let maxOperations = 60
    private static let maxVisits = 4000

    /// Looks at everything, then does what the input says.
    static func run(_ device: OverlayDevice, _ input: inout FuzzInput) {
        do throws(MetadataError) {
            let metadata = try ThinMetadata(device, cacheBlocks: 1 + input.below(64))
            let ids = try look(metadata)
            if !ids.isEmpty { try change(metadata, ids, device, &input) }
        } catch { _ = error.description }
    }

    private static func look(_ metadata: ThinMetadata) throws(MetadataError) -> [ThinDeviceID] {
        let ids = try metadata.deviceIDs()
        for id in ids.prefix(20) {
            do throws(MetadataError) { try walk(metadata, id) } catch { _ = error.description }
            metadata.trimCache()
        }
        return ids
    }

    private static func walk(
        _ metadata: ThinMetadata, _ id: ThinDeviceID
    ) throws(MetadataError) {
        guard try metadata.details(id) != nil else { return }
        var at = VirtualBlock(0)
        for _ in 0..<maxVisits where at.rawValue < .max {
            var first: VirtualBlock?
            let from = at.rawValue
            let next = try metadata.visitLeaf(id, from: at, limit: VirtualBlock(.max)) {
                virtual, mapping in
                require(virtual.rawValue >= from, "a walk goes back")
                require(mapping.block.rawValue < metadata.dataBlocks, "a mapping leads outside")
                first = first ?? virtual
            }
            require(next > at, "a walk does not go on")
            if let first {
                require(try metadata.lookup(id, first) != nil, "a mapping is not found")
                _ = try metadata.isExclusive(id, first)
            }
            at = next
        }
    }

    private static func change(
        _ metadata: ThinMetadata, _ ids: [ThinDeviceID], _ device: OverlayDevice,
        _ input: inout FuzzInput
    ) throws(MetadataError) {
        for round in 0..<maxOperations where !input.isAtEnd {
            let operation = input.byte()
            let id = ids[input.below(ids.count)]
            guard try metadata.details(id) != nil else { continue }
            do throws(MetadataError) {
                try change(metadata, operation, id, round, &input)
            } catch {
                // Told before anything was changed.
                switch error {
                case .outOfMetadataSpace, .deviceExists, .noSuchDevice, .tooManySnapshots: break
                default: throw error
                }
            }
            metadata.trimCache()
            if operation & 0xC0 == 0xC0 { try commit(metadata, to: device) }
        }
        try commit(metadata, to: device)
    }

    private static func change(
        _ metadata: ThinMetadata, _ operation: UInt8, _ id: ThinDeviceID, _ round: Int,
        _ input: inout FuzzInput
    ) throws(MetadataError) {
        let fresh = ThinDeviceID(UInt32(1000 + round))
        switch operation % 11 {
        case 0, 1:
            let start = UInt64(input.word(UInt16.self))
            try insert(metadata, id, start, Int(input.byte()) % 40)
        case 2: try insert(metadata, id, input.word(UInt64.self), 1)
        case 3:
            let start = UInt64(input.byte())
            _ = try metadata.remove(
                id, start..<start + UInt64(input.byte()), limit: 1 + input.below(200)
            ) { _, _ in }
        case 4: _ = try metadata.remove(id, 0..<UInt64.max, limit: 2000) { _, _ in }
        case 5: try metadata.createSnapshot(fresh, of: id)
        case 6: try metadata.createThin(fresh)
        case 7: try metadata.deleteDevice(id)
        case 8: _ = try metadata.deleteSlice(id, budget: 1 + input.below(200))
        case 9: try metadata.growData(to: metadata.dataBlocks + UInt64(input.word(UInt16.self)))
        default: _ = try metadata.lookup(id, VirtualBlock(input.word(UInt64.self)))
        }
    }

    private static func insert(
        _ metadata: ThinMetadata, _ id: ThinDeviceID, _ start: UInt64, _ count: Int
    ) throws(MetadataError) {
        for key in 0..<UInt64(count) {
            guard let block = try metadata.allocateDataBlock() else { return }
            do throws(MetadataError) {
                _ = try metadata.insert(id, VirtualBlock(start &+ key), block)
            } catch {
                if case .outOfMetadataSpace = error { metadata.releaseReservation(block) }
                throw error
            }
        }
    }

    private static func commit(
        _ metadata: ThinMetadata, to device: OverlayDevice
    ) throws(MetadataError) {
        let transaction = try metadata.freeze()
        do {
            for index in 0..<transaction.blocks {
                try device.write { transaction.copyBlock(index, to: $0) }
            }
            try device.write {
                transaction.copySuperblock(to: $0)
                return MetadataBlock(0)
            }
        } catch { fatalError("fuzz: a block of the transaction lies outside: \(error)") }
        let freed = metadata.committed(transaction)
        metadata.makeAvailable(freed.discarded + freed.replaced)
    }
}
