// A pool and a model of what it has to contain, through commits, delays and crashes.

import Foundation
import Testing
import ThinMetadata

struct Model: Equatable {
    var time: UInt32 = 0
    var devices: [UInt64: ImageDevice] = [:]

    /// Data block -> how many mappings of any device refer to it.
    var uses: [UInt64: Int] {
        var uses: [UInt64: Int] = [:]
        for device in devices.values {
            for raw in device.mappings.values { uses[raw >> 24, default: 0] += 1 }
        }
        return uses
    }
    var ids: [UInt64] { devices.keys.sorted() }
}

final class Harness {
    let device: TestDevice
    let directory: TemporaryDirectory
    let cacheBlocks: Int
    var pool: ThinMetadata
    /// The open state, the one being committed, the committed one.
    var model: Model
    var frozenModel: Model?
    var committedModel: Model
    var frozen: FrozenTransaction?
    /// Blocks of the committed state on the device.
    var live: Set<UInt64>
    /// Freed data blocks whose I/O has not drained yet.
    var draining: [DataBlock] = []
    var commits = 0
    var toolEvery = 1

    init(
        metadataBlocks: Int, dataBlocks: UInt64, cacheBlocks: Int
    ) throws {
        device = TestDevice(blocks: metadataBlocks)
        directory = try TemporaryDirectory()
        self.cacheBlocks = cacheBlocks
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: dataBlocks)
        pool = try ThinMetadata(device, cacheBlocks: cacheBlocks)
        model = Model()
        committedModel = model
        live = try readImage(device).live
    }

    /// Goes on from an existing image.
    init(image: TestDevice, cacheBlocks: Int) throws {
        device = image
        directory = try TemporaryDirectory()
        self.cacheBlocks = cacheBlocks
        pool = try ThinMetadata(device, cacheBlocks: cacheBlocks)
        let parsed = try readImage(device, strictHints: false)
        model = Model(time: parsed.time, devices: parsed.devices)
        committedModel = model
        live = parsed.live
    }

    // MARK: Operations, on pool and model alike

    func create(_ id: UInt64) throws {
        try pool.createThin(ThinDeviceID(UInt32(id)))
        model.devices[id] = ImageDevice(created: model.time, snapped: model.time)
    }

    func snapshot(_ id: UInt64, of origin: UInt64) throws {
        try pool.createSnapshot(ThinDeviceID(UInt32(id)), of: ThinDeviceID(UInt32(origin)))
        model.time += 1
        model.devices[origin]!.snapped = model.time
        var copy = model.devices[origin]!
        copy.created = model.time
        copy.transaction = pool.transactionID
        model.devices[id] = copy
    }

    /// False if there is no data block or no metadata space.
    @discardableResult
    func write(_ id: UInt64, _ virtual: UInt64) throws -> Bool {
        guard let block = try pool.allocateDataBlock() else { return false }
        let replaced: Mapping?
        do {
            replaced = try pool.insert(
                ThinDeviceID(UInt32(id)), VirtualBlock(virtual), block)
        } catch {
            guard error == .outOfMetadataSpace else { throw error }
            pool.releaseReservation(block)
            return false
        }
        #expect(replaced?.rawValue == model.devices[id]!.mappings[virtual])
        if model.devices[id]!.mappings[virtual] == nil { model.devices[id]!.mapped += 1 }
        model.devices[id]!.mappings[virtual] = block.rawValue << 24 | UInt64(model.time)
        return true
    }

    func discard(_ id: UInt64, _ range: Range<UInt64>, limit: Int) throws {
        var got: [UInt64] = []
        var wrong = 0
        let next: VirtualBlock?
        do {
            next = try pool.remove(
                ThinDeviceID(UInt32(id)), range, limit: limit
            ) { virtual, mapping in
                if self.model.devices[id]!.mappings[virtual.rawValue] != mapping.rawValue {
                    wrong += 1
                }
                got.append(virtual.rawValue)
            }
        } catch {
            guard error == .outOfMetadataSpace else { throw error }
            return
        }
        #expect(wrong == 0)
        let expected = model.devices[id]!.mappings.keys.filter { range.contains($0) }.sorted()
        #expect(got == Array(expected.prefix(got.count)))
        #expect(got.count <= limit)
        if let next {
            #expect(got.count < expected.count)
            #expect(next.rawValue > got.last ?? 0 && next.rawValue <= expected[got.count])
        } else {
            #expect(got.count == expected.count)
        }
        for virtual in got { model.devices[id]!.mappings[virtual] = nil }
        model.devices[id]!.mapped -= UInt64(got.count)
    }

    func delete(_ id: UInt64) throws {
        do {
            try pool.deleteDevice(ThinDeviceID(UInt32(id)))
        } catch {
            guard error == .outOfMetadataSpace else { throw error }
            return
        }
        model.devices[id] = nil
    }

    /// A slice takes mappings away from one end; the model learns which from the pool.
    func deleteSlice(_ id: UInt64, budget: Int) throws -> Bool {
        let thin = ThinDeviceID(UInt32(id))
        if try pool.deleteSlice(thin, budget: budget) {
            model.devices[id] = nil
            return true
        }
        let before = model.devices[id]!.mappings
        var left: [UInt64: UInt64] = [:]
        var from = VirtualBlock(0)
        while from.rawValue < UInt64.max {
            from = try pool.visitLeaf(thin, from: from, limit: VirtualBlock(.max)) {
                left[$0.rawValue] = $1.rawValue
            }
        }
        for (virtual, raw) in left { #expect(before[virtual] == raw) }
        #expect(left.count < before.count)
        model.devices[id]!.mappings = left
        model.devices[id]!.mapped = UInt64(left.count)
        return false
    }

    // MARK: Commit

    func freeze() throws {
        let transaction = try pool.freeze()
        frozen = transaction
        frozenModel = model
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        defer { buffer.deallocate() }
        var targets: Set<UInt64> = []
        for index in 0..<transaction.blocks {
            let target = transaction.copyBlock(index, to: buffer).rawValue
            #expect(target != 0)
            #expect(targets.insert(target).inserted)
        }
        // Nothing of the committed state is overwritten before the superblock.
        try #require(targets.isDisjoint(with: live))
        #expect(!pool.hasChanges)
    }

    /// Writes what was frozen, the superblock too or not.
    func writeFrozen(superblock: Bool) {
        guard let frozen else { return }
        for index in 0..<frozen.blocks {
            let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
            defer { buffer.deallocate() }
            let target = frozen.copyBlock(index, to: buffer)
            memcpy(device.block(target.rawValue), buffer, 4096)
        }
        if superblock { frozen.copySuperblock(to: device.block(0)) }
    }

    func finishCommit() throws {
        guard let transaction = frozen, let state = frozenModel else { return }
        writeFrozen(superblock: true)
        let freed = pool.committed(transaction)
        frozen = nil
        frozenModel = nil
        committedModel = state
        draining += freed.discarded + freed.replaced
        commits += 1
        try verifyCommitted()
    }

    func commit() throws {
        try freeze()
        try finishCommit()
        drain()
    }

    func drain() {
        pool.makeAvailable(draining)
        draining = []
    }

    func verifyCommitted() throws {
        let image = try readImage(device)
        #expect(image.time == committedModel.time)
        try #require(image.devices == committedModel.devices)
        live = image.live
        if commits % toolEvery == 0 { try expectClean(device, directory) }
    }

    /// The process dies; perhaps what was frozen reached the device, but not its superblock.
    func crash() throws {
        writeFrozen(superblock: false)
        frozen = nil
        frozenModel = nil
        draining = []
        model = committedModel
        pool = try ThinMetadata(device, cacheBlocks: cacheBlocks)
        let image = try readImage(device, strictHints: commits > 0)
        try #require(image.devices == committedModel.devices)
    }

    // MARK: Checks of the open state

    func verifyLookups(_ random: inout Generator, samples: Int) throws {
        #expect(try pool.deviceIDs().map { UInt64($0.rawValue) } == model.ids)
        let states = [model, frozenModel ?? model, committedModel]
        let uses = states.map(\.uses)
        for id in model.ids {
            let thin = ThinDeviceID(UInt32(id))
            let expected = model.devices[id]!
            let details = try #require(try pool.details(thin))
            #expect(details.mappedBlocks == expected.mapped)
            #expect(details.snapshottedTime == expected.snapped)
            let keys = expected.mappings.keys.sorted()
            for _ in 0..<min(samples, keys.count) {
                let key = keys[random.below(keys.count)]
                let found = try pool.lookup(thin, VirtualBlock(key))
                #expect(found?.rawValue == expected.mappings[key])
                if try pool.isExclusive(thin, VirtualBlock(key)) {
                    let block = expected.mappings[key]! >> 24
                    for use in uses { #expect(use[block] ?? 1 == 1) }
                    for state in states {
                        for (other, device) in state.devices where other != id {
                            #expect(device.mappings[key].map { $0 >> 24 } != block)
                        }
                    }
                }
                let absent = key &+ 1
                if expected.mappings[absent] == nil {
                    #expect(try pool.lookup(thin, VirtualBlock(absent)) == nil)
                }
            }
            try verifyVisit(thin, expected, &random)
            try verifySharing(thin, expected, uses[0])
            let other = model.ids[random.below(model.ids.count)]
            try verifyDifferences(id, other, &random)
        }
    }

    private func verifyVisit(
        _ id: ThinDeviceID, _ expected: ImageDevice, _ random: inout Generator
    ) throws {
        let from = UInt64(random.below(500))
        let limit = from + UInt64(random.below(3000)) + 1
        var at = VirtualBlock(from)
        var seen: [UInt64: UInt64] = [:]
        while at.rawValue < limit {
            let next = try pool.visitLeaf(id, from: at, limit: VirtualBlock(limit)) {
                seen[$0.rawValue] = $1.rawValue
            }
            try #require(next > at && next.rawValue <= limit)
            at = next
        }
        #expect(seen == expected.mappings.filter { (from..<limit).contains($0.key) })
    }

    /// Shared is what is older than the last snapshot and still has another user.
    func verifySharing(
        _ id: ThinDeviceID, _ expected: ImageDevice, _ uses: [UInt64: Int]
    ) throws {
        var at = VirtualBlock(0)
        var told: [UInt64: Bool] = [:]
        while at.rawValue < UInt64.max {
            at = try pool.visitSharing(id, from: at, limit: VirtualBlock(.max)) {
                told[$0.rawValue] = $1
            }
        }
        let shared = expected.mappings.mapValues { raw in
            raw & 0xFF_FFFF < UInt64(expected.snapped) && uses[raw >> 24]! > 1
        }
        #expect(told == shared)
    }

    func verifyDifferences(
        _ id: UInt64, _ other: UInt64, _ random: inout Generator
    ) throws {
        let one = model.devices[id]!.mappings
        let another = model.devices[other]!.mappings
        let from = random.chance(50) ? 0 : UInt64(random.below(5000))
        let limit = random.chance(50) ? UInt64.max : from + 1 + UInt64(random.below(5000))
        let expected = Set(one.keys).union(another.keys).filter {
            (from..<limit).contains($0)
                && one[$0].map { $0 >> 24 } != another[$0].map { $0 >> 24 }
        }
        #expect(Set(try differences(id, other, from..<limit)) == expected)
    }

    /// The blocks that differ, by steps that follow each other without a gap.
    func differences(_ id: UInt64, _ other: UInt64, _ range: Range<UInt64>) throws -> [UInt64] {
        var found: [UInt64] = []
        var at = range.lowerBound
        while at < range.upperBound {
            var end = at
            let next = try pool.visitDifferences(
                of: ThinDeviceID(UInt32(id)), from: ThinDeviceID(UInt32(other)), VirtualBlock(at),
                limit: VirtualBlock(range.upperBound), reading: true
            ) { run, differs in
                #expect(run.lowerBound == end && !run.isEmpty)
                end = run.upperBound
                if differs { found += run }
            }
            try #require(next.rawValue == end && end > at && end <= range.upperBound)
            at = end
        }
        return found
    }
}
