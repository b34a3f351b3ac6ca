// Thin devices: the top-level tree (id -> mapping root) and the details tree, as one.
//
// 1. The two trees have the same ids in every frozen transaction.
// 2. Before a device's mapping tree is changed, the top-level path to its entry is shadowed: if a
//    metadata snapshot shares that path, the shadowing gives every mapping root in it one more
//    reference, and only then does the mapping root's count say whether it is shared.
// 3. A mapping root that changes is written to the top-level tree at once; details are written when
//    the transaction is frozen, but for ids that come or go.

import BlockIO

/// A device that was looked at: what its entries in the two trees say, or will say.
final class DeviceRecord {
    let id: ThinDeviceID
    var root: UInt64
    var details: DeviceDetails
    var isDirty = false
    var isDeleted = false
    /// The transaction in which the top-level path was shadowed last (invariant 2).
    var shadowedIn: UInt64 = 0

    init(_ id: ThinDeviceID, root: UInt64, details: DeviceDetails) {
        self.id = id
        self.root = root
        self.details = details
    }
}

extension ThinMetadata {
    // MARK: Looking

    /// All ids, ascending.
    public func deviceIDs() throws(MetadataError) -> [ThinDeviceID] {
        var ids: [ThinDeviceID] = []
        try store.cache.forEachLeaf(
            superblock.detailsRoot, .details
        ) { leaf throws(MetadataError) in
            for index in 0..<leaf.count {
                guard let id = UInt32(exactly: leaf.key(index)) else {
                    throw .corrupt(
                        block: MetadataBlock(leaf.block), "device id \(leaf.key(index))")
                }
                ids.append(ThinDeviceID(id))
            }
        }
        return ids
    }

    /// With what the open transaction changed; nil if there is no such device.
    public func details(_ id: ThinDeviceID) throws(MetadataError) -> DeviceDetails? {
        try record(id)?.details
    }

    @inline(__always) func record(_ id: ThinDeviceID) throws(MetadataError) -> DeviceRecord? {
        if let lastRecord, lastRecord.id == id { return lastRecord }
        return try findRecord(id)
    }

    @inline(__always) func existing(_ id: ThinDeviceID) throws(MetadataError) -> DeviceRecord {
        guard let record = try record(id) else { throw .noSuchDevice(id) }
        return record
    }

    @inline(never) private func findRecord(
        _ id: ThinDeviceID
    ) throws(MetadataError) -> DeviceRecord? {
        if let record = records[id] {
            lastRecord = record
            return record
        }
        let key = UInt64(id.rawValue)
        let details = try store.cache.find(superblock.detailsRoot, .details, key)
        let root = try store.cache.find(superblock.mappingRoot, .topLevel, key)
        guard let details, let root else {
            guard details == nil && root == nil else {
                throw .corrupt(
                    block: MetadataBlock(superblock.detailsRoot),
                    "device \(id.rawValue) is in only one of the two device trees")
            }
            return nil
        }
        let record = DeviceRecord(id, root: root.le64(0), details: DeviceDetails(details))
        // A wider one would not fit a mapping.
        guard record.details.snapshottedTime <= Mapping.maxTime else {
            throw .corrupt(
                block: MetadataBlock(superblock.detailsRoot),
                "device \(id.rawValue) was last snapshotted at time "
                    + "\(record.details.snapshottedTime), which is too late")
        }
        records[id] = record
        lastRecord = record
        return record
    }

    // MARK: Changing

    /// A new device without mappings.
    public func createThin(_ id: ThinDeviceID) throws(MetadataError) {
        precondition(id <= .max, "thin device ids have 24 bits")
        try requireWritable()
        guard try record(id) == nil else { throw .deviceExists(id) }
        try requireSpace(try creationCost(id), keepingReserve: true)
        isChanged = true
        let root = try store.makeNode(.mapping, leaf: true).block
        try add(
            id, root: root,
            DeviceDetails(
                mappedBlocks: 0, transactionID: transactionID, creationTime: time,
                snapshottedTime: time))
    }

    /// A new device with the origin's present mappings. The caller has quiesced the origin.
    public func createSnapshot(
        _ id: ThinDeviceID, of origin: ThinDeviceID
    ) throws(MetadataError) {
        precondition(id <= .max, "thin device ids have 24 bits")
        try requireWritable()
        let source = try existing(origin)
        guard try record(id) == nil else { throw .deviceExists(id) }
        guard time < Mapping.maxTime else { throw .tooManySnapshots }
        try requireSpace(try creationCost(id), keepingReserve: true)
        isChanged = true
        superblock.time += 1
        try store.retain(source.root)
        try add(
            id, root: source.root,
            DeviceDetails(
                mappedBlocks: source.details.mappedBlocks, transactionID: transactionID,
                creationTime: time, snapshottedTime: time))
        source.details.snapshottedTime = time
        markDirty(source)
    }

    private func add(
        _ id: ThinDeviceID, root: UInt64, _ details: DeviceDetails
    ) throws(MetadataError) {
        let key = UInt64(id.rawValue)
        var top = superblock.mappingRoot
        let existing = try store.insert64(&top, .topLevel, key, root)
        superblock.mappingRoot = top
        guard existing == nil else {
            throw .corrupt(block: MetadataBlock(top), "device \(id.rawValue) is there already")
        }
        let record = DeviceRecord(id, root: root, details: details)
        record.shadowedIn = openTransaction
        try writeDetails(record)
        records[id] = record
    }

    /// Removes the device and drops all it refers to; visits only nodes that are its alone.
    public func deleteDevice(_ id: ThinDeviceID) throws(MetadataError) {
        try requireWritable()
        let record = try existing(id)
        try requireSpace(try deletionCost(record), keepingReserve: false)
        try remove(record)
    }

    private func remove(_ record: DeviceRecord) throws(MetadataError) {
        try touch(record)
        let key = UInt64(record.id.rawValue)
        var top = superblock.mappingRoot
        try store.removeKey(&top, .topLevel, key)
        superblock.mappingRoot = top
        var details = superblock.detailsRoot
        try store.removeKey(&details, .details, key)
        superblock.detailsRoot = details
        try store.dropMappings(record.root)
        record.isDeleted = true
        records[record.id] = nil
        if lastRecord === record { lastRecord = nil }
    }

    /// Trees with at most this many nodes of their own are deleted at once.
    private static let smallTree = 2000

    /// One bounded step of a deletion: unmaps about `budget` blocks, leaf by leaf, so that every
    /// state in between is a valid pool with a smaller device. What shares its root with another
    /// device, or has few nodes of its own, goes at once.
    /// - Returns: whether the device is gone.
    public func deleteSlice(_ id: ThinDeviceID, budget: Int) throws(MetadataError) -> Bool {
        precondition(budget > 0)
        try requireWritable()
        let record = try existing(id)
        let own = try store.exclusiveNodes(record.root, .mapping, limit: Self.smallTree)
        if own < Self.smallTree, hasSpace(try deletionCost(record), keepingReserve: false) {
            try remove(record)
            return true
        }
        // Whole leaves: never less than one.
        let limit = max(budget, NodeGeometry.internalNode.capacity)
        _ = try remove(id, 0..<UInt64.max, limit: limit) { _, _ in }
        guard record.details.mappedBlocks == 0 else { return false }
        guard hasSpace(try deletionCost(record), keepingReserve: false) else { return false }
        try remove(record)
        return true
    }

    // MARK: Records

    /// Prepares the device for a change of its mappings in the open transaction (invariant 2).
    @inline(__always) func touch(_ record: DeviceRecord) throws(MetadataError) {
        guard record.shadowedIn != openTransaction else { return }
        isChanged = true
        var top = superblock.mappingRoot
        try store.shadowPath(&top, .topLevel, UInt64(record.id.rawValue))
        superblock.mappingRoot = top
        record.shadowedIn = openTransaction
    }

    func setRoot(_ record: DeviceRecord, _ root: UInt64) throws(MetadataError) {
        assert(record.shadowedIn == openTransaction)
        guard root != record.root else { return }
        record.root = root
        var top = superblock.mappingRoot
        let old = try store.insert64(&top, .topLevel, UInt64(record.id.rawValue), root)
        superblock.mappingRoot = top
        guard old != nil else {
            throw .corrupt(
                block: MetadataBlock(top), "device \(record.id.rawValue) has lost its entry")
        }
    }

    @inline(__always) func markDirty(_ record: DeviceRecord) {
        isChanged = true
        if !record.isDirty {
            record.isDirty = true
            dirtyRecords.append(record)
        }
    }

    func writeDetails(_ record: DeviceRecord) throws(MetadataError) {
        var bytes = record.details.stored
        var old = bytes
        var root = superblock.detailsRoot
        _ = try store.insert(&root, .details, UInt64(record.id.rawValue), &bytes, old: &old)
        superblock.detailsRoot = root
        record.isDirty = false
    }
}

extension DeviceDetails {
    init(_ memory: UnsafeMutableRawPointer) {
        self.init(
            mappedBlocks: memory.le64(DeviceDetailsLayout.mappedBlocks),
            transactionID: memory.le64(DeviceDetailsLayout.transactionID),
            creationTime: memory.le32(DeviceDetailsLayout.creationTime),
            snapshottedTime: memory.le32(DeviceDetailsLayout.snapshottedTime))
    }

    /// The 24 bytes of the format.
    var stored: (UInt64, UInt64, UInt32, UInt32) {
        (
            mappedBlocks.littleEndian, transactionID.littleEndian, creationTime.littleEndian,
            snapshottedTime.littleEndian
        )
    }
}
