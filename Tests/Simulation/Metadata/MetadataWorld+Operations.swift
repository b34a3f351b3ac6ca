// What is done to the pool's metadata, and at the same time to the model.

import ThinMetadata

extension MetadataWorld {
    static let catalogue = ThinDeviceID.max.rawValue

    func anyID() -> UInt32 { ids[random.below(ids.count)] }

    // MARK: - Devices

    private func newID() -> UInt32? {
        let id = UInt32(random.oneIn(2) ? random.below(2000) : random.below(1 << 24))
        return model.devices[id] == nil ? id : nil
    }

    func createSome() throws {
        for _ in 0...random.below(options.deviceBulk) {
            guard let id = newID() else { continue }
            guard
                try change({ () throws(MetadataError) in
                    try metadata.createThin(ThinDeviceID(id))
                }) != nil
            else { return }
            counts.devices += 1
            ids.append(id)
            model.devices[id] = .init(creationTime: model.time, snapshottedTime: model.time)
        }
    }

    func snapshotSome() throws {
        for _ in 0...random.below(options.deviceBulk) where ids.count < 1500 {
            guard let id = newID() else { continue }
            try snapshot(id, of: anyID())
        }
    }

    private func snapshot(_ id: UInt32, of origin: UInt32) throws {
        guard model.time < Mapping.maxTime else {
            return try expect(.tooManySnapshots) { () throws(MetadataError) in
                try metadata.createSnapshot(ThinDeviceID(id), of: ThinDeviceID(origin))
            }
        }
        guard
            try change({ () throws(MetadataError) in
                try metadata.createSnapshot(ThinDeviceID(id), of: ThinDeviceID(origin))
            }) != nil
        else { return }
        counts.snapshots += 1
        ids.append(id)
        model.time += 1
        model.devices[origin]!.snapshottedTime = model.time
        var copy = model.devices[origin]!
        copy.creationTime = model.time
        model.devices[id] = copy
    }

    func deleteSome() throws {
        for _ in 0...random.below(options.deviceBulk) where !ids.isEmpty {
            let id = anyID()
            guard
                try change({ () throws(MetadataError) in
                    try metadata.deleteDevice(ThinDeviceID(id))
                }) != nil
            else { return }
            forget(id)
        }
    }

    private func forget(_ id: UInt32) {
        counts.deletions += 1
        model.devices[id] = nil
        ids.remove(at: ids.firstIndex(of: id)!)
    }

    func deleteSlice(_ id: UInt32) throws {
        let budget = 1 + random.below(1000)
        guard
            let isGone = try change({ () throws(MetadataError) in
                try metadata.deleteSlice(ThinDeviceID(id), budget: budget)
            })
        else { return }
        if isGone { return forget(id) }
        // Lowest first: what is left is told by the first that is left.
        guard
            let details = try read({ () throws(MetadataError) in
                try metadata.details(ThinDeviceID(id))
            })
        else { throw Dropped() }
        let before = model.devices[id]!.mappings
        let kept = before.keys.sorted().suffix(Int(details!.mappedBlocks))
        counts.removals += before.count - kept.count
        model.devices[id]!.mappings = .init(uniqueKeysWithValues: kept.map { ($0, before[$0]!) })
    }

    /// Everything is deleted, step by step; then nothing is in use.
    func takeApart() throws {
        var patience = 4000
        while let id = ids.last {
            do {
                try deleteSlice(id)
                patience -= 1
                try require(
                    patience > 0,
                    "device \(id) of \(ids.count) cannot be deleted, "
                        + "with \(model.devices[id]?.mappings.count ?? 0) mappings, "
                        + "\(metadata.metadataBlocksFree) free metadata blocks and a reserve of "
                        + "\(metadata.metadataReserve)")
                if random.oneIn(8) || model.devices[id] != nil { try commitAll() }
            } catch is Dropped {
                throw WorldFailure(description: "a deletion fails without a fault")
            }
        }
        do {
            if model.devices[Self.catalogue] != nil {
                ids = [Self.catalogue]
                try deleteSlice(Self.catalogue)
            }
            try require(model.devices.isEmpty, "the catalogue's device cannot be deleted")
            try commitAll()
        } catch is Dropped {
            throw WorldFailure(description: "a commit fails without a fault")
        }
        try require(metadata.dataBlocksUsed == 0 || held != nil, "data blocks are in use by nobody")
    }

    private func commitAll() throws {
        if commit == nil { try freeze() }
        while commit != nil { try advance() }
    }

    // MARK: - Mappings

    /// Keys to write, in the order in which they are written.
    private func keys(_ count: Int) -> [UInt64] {
        let span = UInt64(options.span)
        let start: UInt64
        switch random.below(4) {
        case 0: start = UInt64(random.below(1 << 40))
        case 1: start = landmarks[random.below(landmarks.count)]
        default: start = UInt64(random.below(options.span))
        }
        let count64 = UInt64(count)
        switch random.below(6) {
        case 0, 1: return (0..<count64).map { start + $0 }
        case 2: return (0..<count64).reversed().map { start + $0 }
        case 3: return (0..<count64).map { start + $0 * 37 }
        case 4: return (0..<count).map { _ in random.next() % span }
        default: return (0..<count).map { _ in random.next() % (1 << 40) }
        }
    }

    func writeSome() throws {
        let id = anyID()
        let keys = keys(1 + random.below(options.bulk))
        remember(keys)
        for key in keys {
            guard try write(id, key) else { return }
        }
    }

    private func remember(_ keys: [UInt64]) {
        for key in [keys[0], keys[keys.count / 2], keys[keys.count - 1]] {
            if landmarks.count < 64 {
                landmarks.append(key)
            } else {
                landmarks[random.below(64)] = key
            }
        }
    }

    /// Many leaves: enough for a tree of three levels.
    func fill(_ id: UInt32) throws {
        let isDescending = random.oneIn(3)
        for index in 0..<UInt64(30_000) {
            let key = isDescending ? (30_000 - index) << 20 : random.next() % (1 << 40)
            guard try write(id, key) else { return }
            if index % 4096 == 0 {
                metadata.trimCache()
                remember([key])
            }
        }
    }

    /// The pool's catalogue is a device, too, never shared and of a few blocks. It is written to when
    /// the pool is full, alone or with a deletion: nothing could be deleted otherwise.
    func writeCatalogue() throws {
        if model.devices[Self.catalogue] == nil {
            guard
                try change({ () throws(MetadataError) in
                    try metadata.createThin(ThinDeviceID(Self.catalogue))
                }) != nil
            else { return }
            model.devices[Self.catalogue] = .init(
                creationTime: model.time, snapshottedTime: model.time)
        }
        let key = UInt64(random.below(4))
        let victim = random.oneIn(4) ? ids.randomElement(using: &random) : nil
        let fits = try read { () throws(MetadataError) in
            try metadata.fits(
                victim.map { .delete(ThinDeviceID($0)) } ?? .none, mapping: Int(key) + 1,
                of: ThinDeviceID(Self.catalogue))
        }
        guard fits == true else { return }
        if let victim {
            let isGone: Void? = try change({ () throws(MetadataError) in
                try metadata.deleteDevice(ThinDeviceID(victim))
            })
            try require(isGone != nil, "a deletion that fits finds no space")
            forget(victim)
        }
        _ = try write(Self.catalogue, key, isAssured: true)
    }

    /// False if there is no space.
    private func write(
        _ id: UInt32, _ key: UInt64, isAssured: Bool = false
    ) throws -> Bool {
        let block: DataBlock
        if !reserved.isEmpty, random.oneIn(8) {
            block = reserved.removeLast()
        } else {
            guard let new = try allocate() else { return false }
            block = new
        }
        guard
            let replaced = try change({ () throws(MetadataError) in
                try metadata.insert(
                    ThinDeviceID(id), VirtualBlock(key), block, isAssured: isAssured)
            })
        else {
            metadata.releaseReservation(block)
            try release([block])
            return false
        }
        let due = model.devices[id]!.mappings.updateValue(
            Mapping(block: block, time: model.time), forKey: key)
        try require(
            replaced == due,
            "device \(id), virtual block \(key): \(String(describing: replaced)) "
                + "is replaced, where \(String(describing: due)) is due")
        counts.insertions += 1
        return true
    }

    func removeSome() throws {
        let id = anyID()
        let start = landmarks[random.below(landmarks.count)]
        let range: Range<UInt64>
        switch random.below(5) {
        case 0: range = 0..<UInt64.max
        case 1: range = start..<start + 1
        case 2: range = UInt64(random.below(options.span))..<UInt64(options.span)
        case 3: range = start..<UInt64.max
        default: range = start..<start + UInt64(1 + random.below(4000))
        }
        let limit = [1, 7, 300, 5000, 100_000][random.below(5)]
        var removed: [(VirtualBlock, Mapping)] = []
        guard
            let next = try change({ () throws(MetadataError) in
                try metadata.remove(ThinDeviceID(id), range, limit: limit) {
                    removed.append(($0, $1))
                }
            })
        else { return try require(removed.isEmpty, "a refused removal has removed something") }
        counts.removals += removed.count
        try require(removed.count <= limit, "\(removed.count) of \(limit) mappings are removed")
        var last: UInt64?
        for (virtual, mapping) in removed {
            let key = virtual.rawValue
            let due = model.devices[id]!.mappings.removeValue(forKey: key)
            try require(
                due == mapping && range.contains(key) && last.map { $0 < key } ?? true,
                "device \(id): \(mapping) is removed from \(key), where "
                    + "\(String(describing: due)) is due")
            last = key
        }
        // What is left of the range begins where the removal says.
        let end = next?.rawValue ?? range.upperBound
        try require(next.map { $0.rawValue > last ?? 0 || last == nil } ?? true, "it goes back")
        for key in model.devices[id]!.mappings.keys where key >= range.lowerBound && key < end {
            throw WorldFailure(description: "device \(id): virtual block \(key) is left out")
        }
    }

    // MARK: - Looking

    private func anyKey() -> UInt64 {
        switch random.below(4) {
        case 0: return random.next() % (1 << 40)
        case 1: return UInt64(random.below(options.span))
        default: return landmarks[random.below(landmarks.count)] + UInt64(random.below(3))
        }
    }

    func look() throws {
        for _ in 0..<1 + random.below(20) {
            let id = anyID()
            let key = anyKey()
            guard
                let found = try read({ () throws(MetadataError) in
                    try metadata.lookup(ThinDeviceID(id), VirtualBlock(key))
                })
            else { continue }
            let due = model.devices[id]!.mappings[key]
            try require(
                found == due,
                "device \(id), virtual block \(key): "
                    + "\(String(describing: found)), where \(String(describing: due)) is due")
        }
        if device.disk.faults.isEmpty { try model.verifyDetails(metadata, anyID()) }
        guard random.oneIn(4),
            let found = try read({ () throws(MetadataError) in
                try metadata.deviceIDs()
            })
        else { return }
        try require(found.map(\.rawValue) == model.ids, "the list of devices is wrong")
    }

    /// Some leaves of a device.
    func walk() throws {
        let id = anyID()
        var at = anyKey()
        let limit = random.oneIn(2) ? UInt64.max : at + UInt64(random.below(5000))
        let due = model.devices[id]!.mappings
        for _ in 0..<1 + random.below(8) where at < limit {
            var found: [UInt64: Mapping] = [:]
            guard
                let next = try read({ () throws(MetadataError) in
                    try metadata.visitLeaf(
                        ThinDeviceID(id), from: VirtualBlock(at), limit: VirtualBlock(limit)
                    ) { found[$0.rawValue] = $1 }
                })?.rawValue
            else { return }
            try require(next > at && next <= limit, "a walk goes from \(at) to \(next)")
            let there = due.filter { $0.key >= at && $0.key < next }
            try require(
                found == there,
                "device \(id): a walk finds \(found.count) mappings in "
                    + "\(at)..<\(next), where \(there.count) are due")
            at = next
        }
        // Past the end there is nothing to ask.
        let end = VirtualBlock(at)
        let answer = try read { () throws(MetadataError) in
            try metadata.visitLeaf(ThinDeviceID(id), from: end, limit: end) { _, _ in }
        }
        try require(answer == nil || answer == end, "an empty walk goes on")
    }

    /// Who is told that a block is the device's alone writes in place: nobody else may have it, in
    /// any state that a power cut can bring back.
    func askForExclusive() throws {
        for _ in 0..<1 + random.below(10) {
            let id = anyID()
            let key = anyKey()
            guard
                let isExclusive = try read({ () throws(MetadataError) in
                    try metadata.isExclusive(ThinDeviceID(id), VirtualBlock(key))
                }), isExclusive
            else { continue }
            guard let block = model.devices[id]!.mappings[key]?.block else {
                throw WorldFailure(description: "what is not mapped is exclusive")
            }
            for state in [model, commit?.model ?? committed, committed, held ?? committed] {
                for (other, device) in state.devices
                where other != id && device.mappings[key]?.block == block {
                    throw WorldFailure(
                        description: "device \(id), virtual block \(key): said to be exclusive, "
                            + "and device \(other) has it")
                }
            }
        }
    }

    // MARK: - Space

    func reserveSome() throws {
        if !reserved.isEmpty, random.oneIn(2) {
            let block = reserved.removeLast()
            metadata.releaseReservation(block)
            return try release([block])
        }
        for _ in 0..<random.below(6) {
            if let block = try allocate() { reserved.append(block) }
        }
    }

    func growData() throws {
        let blocks: UInt64
        switch random.below(4) {
        case 0: blocks = model.dataBlocks / 2
        case 1 where model.dataBlocks < 3_000_000:
            blocks = model.dataBlocks + UInt64(16_320 * random.below(100))
        default: blocks = model.dataBlocks + UInt64(random.below(20_000))
        }
        guard blocks < 6_000_000,
            try change({ () throws(MetadataError) in
                try metadata.growData(to: blocks)
            }) != nil
        else { return }
        try require(
            metadata.dataBlocks == max(blocks, model.dataBlocks), "the data device has not grown")
        counts.growths += 1
        model.dataBlocks = metadata.dataBlocks
        isTaken += [Bool](repeating: false, count: Int(model.dataBlocks) - isTaken.count)
    }

    func growMetadata() throws {
        if random.oneIn(2), device.blocks < 110_000 {
            let more = options.shape == .full ? 60 : 20_000
            device.grow(to: device.blocks + random.below(more))
        }
        guard try change({ () throws(MetadataError) in try metadata.growMetadata() }) != nil
        else { return }
        counts.growths += 1
        model.metadataBlocks = UInt64(device.blocks)
        try require(
            metadata.metadataBlocks == model.metadataBlocks, "the metadata has not grown")
    }

    // MARK: - Mistakes

    /// Calls that cannot be right.
    func misuse() throws {
        let there = ThinDeviceID(anyID())
        guard let free = newID() else { return }
        let gone = ThinDeviceID(free)
        try expect(.deviceExists(there)) { () throws(MetadataError) in
            try metadata.createThin(there)
        }
        if model.devices.count > 1 {
            try expect(.deviceExists(there)) { () throws(MetadataError) in
                try metadata.createSnapshot(there, of: there)
            }
        }
        try expect(.noSuchDevice(gone)) { () throws(MetadataError) in
            try metadata.createSnapshot(gone, of: gone)
        }
        try expect(.noSuchDevice(gone)) { () throws(MetadataError) in
            try metadata.deleteDevice(gone)
        }
        try expect(.noSuchDevice(gone)) { () throws(MetadataError) in
            _ = try metadata.lookup(gone, VirtualBlock(0))
        }
        try expect(
            .unsupported(path: device.path, "a pool has at most 2^40 data blocks")
        ) { () throws(MetadataError) in try metadata.growData(to: 1 << 40 + 1) }
        try misuseFormat()
    }

    /// Pools that cannot be, and a device that fails while one is made.
    private func misuseFormat() throws {
        let wrong: [(blocks: Int, sectors: UInt32, dataBlocks: UInt64)] = [
            (4000, 100, 1000), (4000, 129, 1000), (4000, 128, 1 << 40 + 1), (20, 128, 1000),
        ]
        for (blocks, sectors, dataBlocks) in wrong {
            let error = failure(SparseDevice(blocks: blocks), sectors, dataBlocks)
            guard case .unsupported? = error else {
                throw WorldFailure(description: "a pool of \(dataBlocks) data blocks is made")
            }
        }
        let other = SparseDevice(blocks: 400)
        other.disk.faults = [Fault([.write, .flush][random.below(2)])]
        guard case .device? = failure(other, 128, 1000) else {
            throw WorldFailure(description: "a pool is made on a device that fails")
        }
    }

    private func failure(
        _ device: SparseDevice, _ sectors: UInt32, _ dataBlocks: UInt64
    ) -> MetadataError? {
        do throws(MetadataError) {
            try ThinMetadata.format(device, dataBlockSectors: sectors, dataBlocks: dataBlocks)
            return nil
        } catch {
            return error
        }
    }

    /// The call is refused with this error, and changes nothing.
    func expect(
        _ error: MetadataError, _ body: () throws(MetadataError) -> Void
    ) throws {
        let changed = metadata.hasChanges
        let dirty = metadata.dirtyBlocks
        do throws(MetadataError) { try body() } catch let found {
            if case .device = found, isStruck { return }
            try require(!found.description.isEmpty, "an error has no words")
            if case .unsupported(_, let what) = error, case .unsupported(_, what) = found { return }
            try require(found == error, "\"\(found)\" is said where \"\(error)\" is due")
            return try require(
                metadata.hasChanges == changed && metadata.dirtyBlocks == dirty,
                "a mistaken call has changed something")
        }
        throw WorldFailure(description: "nothing is said where \"\(error)\" is due")
    }
}
