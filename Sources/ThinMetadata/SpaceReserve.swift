// Metadata space: an operation starts only if it, and the commit after it, cannot run out.
//
// 1. Costs are upper bounds of blocks allocated; blocks freed on the way do not count, because most
//    of them come back with a commit only.
// 2. After every operation `commitCost` blocks are allocatable: a freeze never fails for space.
// 3. Provisioning and new devices also leave the reserve alone; removals may use it. So a full pool
//    can always be emptied.
// 4. What has to be in one transaction is asked for together (`fits`), before any of it is begun.

/// What an operation may allocate at most, besides what a freeze would allocate before it.
private struct Estimate {
    /// B-tree nodes copied or made, overflow trees and index tree not counted.
    var nodes = 0
    /// Data blocks, and metadata blocks, whose counts may change by other than 0 <-> 1.
    var dataEntries = 0
    var metadataEntries = 0
}

/// A change of the devices, as far as its space is concerned.
public enum DeviceChange: Sendable {
    case none
    case create(ThinDeviceID)
    case delete(ThinDeviceID)
}

extension ThinMetadata {
    /// Blocks that only removals and commits may use.
    public var metadataReserve: UInt64 {
        max(Self.leastReserve(dataBitmaps: store.data.slotCount), min(4096, metadataBlocks / 10))
    }

    /// Removing from a shared device takes a few dozen blocks, however small the pool, and all the
    /// bitmaps that the data blocks of two leaves may lie in.
    static func leastReserve(dataBitmaps: Int) -> UInt64 {
        let leaves = 2 * NodeGeometry.internalNode.capacity + 1
        return 48 + UInt64(bitmapsCost(min(leaves, dataBitmaps), of: dataBitmaps))
    }

    /// With this much to spare no insertion has to be looked at closely: paths of four levels, all
    /// shared, at 252 entries, each in the overflow tree, with two blocks each.
    private static let plenty: UInt64 = 16_384

    /// Upper bound of what a freeze would allocate now.
    var commitCost: UInt64 {
        // Details path per changed device; each bitmap with its path in the index tree; every
        // metadata bitmap and the index block.
        let details = dirtyRecords.count
        return UInt64(
            details + min(2 * details, 8 + details / 42) + bitmapsCost(store.data.dirtyPages.count)
                + store.metadata.slotCount + 2)
    }

    /// Upper bound for writing this many data bitmaps: themselves and the index tree's nodes.
    private func bitmapsCost(_ pages: Int) -> Int {
        Self.bitmapsCost(pages, of: store.data.slotCount)
    }

    private static func bitmapsCost(_ pages: Int, of total: Int) -> Int {
        guard pages > 0 else { return 0 }
        let leaf = TreeKind.dataIndex.leaf
        if total <= leaf.capacity { return pages + 1 }
        let leaves = min(pages, total / leaf.minimum + 1)
        let inner = min(leaves, total / (leaf.minimum * NodeGeometry.internalNode.minimum) + 1)
        return pages + leaves + inner + 2
    }

    /// What adding bitmaps takes, and what the reserve becomes larger by.
    func dataBitmapsCost(added pages: Int) -> UInt64 {
        guard pages > 0 else { return 0 }
        let leaves = pages / TreeKind.dataIndex.leaf.minimum + 2
        let before = store.data.slotCount
        let reserve =
            Self.leastReserve(dataBitmaps: before + pages) - Self.leastReserve(dataBitmaps: before)
        return UInt64(pages + 2 * leaves + 8) + reserve
    }

    func hasSpace(_ cost: UInt64, keepingReserve: Bool) -> Bool {
        store.metadata.availableBlocks
            >= cost + commitCost + (keepingReserve ? metadataReserve : 0)
    }

    func requireSpace(_ cost: UInt64, keepingReserve: Bool) throws(MetadataError) {
        guard hasSpace(cost, keepingReserve: keepingReserve) else { throw .outOfMetadataSpace }
    }

    /// Whether the change, and then mapping the first `count` blocks of device `id`, fit into the open
    /// transaction. If so, neither runs out of space. Only new devices leave the reserve alone.
    public func fits(
        _ change: DeviceChange, mapping count: Int, of id: ThinDeviceID
    ) throws(MetadataError) -> Bool {
        let record = try existing(id)
        var estimate = Estimate(nodes: 1 + count, dataEntries: 2 * count, metadataEntries: count)
        try addTopPath(&estimate, record)
        try addPath(&estimate, record.root, .mapping, 0, perLevel: 3, siblings: false)
        var keepsReserve = false
        switch change {
        case .none: break
        case .create(let id):
            keepsReserve = true
            try addCreation(&estimate, id)
        case .delete(let id): try addDeletion(&estimate, try existing(id))
        }
        return hasSpace(try cost(estimate), keepingReserve: keepsReserve)
    }

    // MARK: Costs

    private func cost(_ estimate: Estimate) throws(MetadataError) -> UInt64 {
        let dataPages = min(estimate.dataEntries, store.data.slotCount)
        return UInt64(
            try estimate.nodes
                + overflowCost(store.data, .dataOverflow, estimate.dataEntries)
                + bitmapsCost(dataPages)
                + overflowCost(store.metadata, .metadataOverflow, estimate.metadataEntries))
    }

    /// Changing the counts of this many blocks, any of which may come into or leave the overflow
    /// tree.
    private func overflowCost(
        _ map: SpaceMap, _ kind: TreeKind, _ entries: Int
    ) throws(MetadataError) -> Int {
        guard entries > 0 else { return 0 }
        let root = try store.cache.node(map.overflowRoot, kind)
        if root.isLeaf && root.count + entries <= kind.leaf.capacity { return 1 }
        let splits = 2 * (entries / kind.leaf.minimum) + 5
        guard !root.isLeaf else { return splits }
        let depth = try store.cache.depth(map.overflowRoot, kind)
        // Each change touches a path and perhaps a sibling of each node on it.
        let touched = depth == 2 ? min(2 * entries, root.count) : 2 * depth * entries
        return splits + min(touched, Int(store.metadata.allocatedBlocks))
    }

    /// Adds the path to `key`: so many nodes a level, and, where nodes are shared, the counts of
    /// what they refer to.
    /// - Parameter siblings: a neighbour of each node may be copied, too.
    private func addPath(
        _ estimate: inout Estimate, _ root: UInt64, _ kind: TreeKind, _ key: UInt64,
        perLevel: Int, siblings: Bool
    ) throws(MetadataError) {
        estimate.nodes += 1
        var block = root
        var isShared = false
        for _ in 0..<NodeCache.maxDepth {
            let node = try store.cache.node(block, kind)
            estimate.nodes += perLevel
            // Copying a shared node makes its children shared.
            if try store.metadata.shortCount(block) > 1 { isShared = true }
            // Node and sibling: each keeps at most a full node's entries.
            let entries = isShared ? (siblings ? 2 : 1) * node.geometry(kind).capacity : 0
            if node.isLeaf && kind == .mapping {
                estimate.dataEntries += entries
            } else if !node.isLeaf || kind == .topLevel {
                estimate.metadataEntries += entries
            }
            // The node itself loses a reference.
            estimate.metadataEntries += siblings ? 2 : 1
            if node.isLeaf { return }
            block = node.value(max(0, node.floorIndex(key)))
        }
        throw NodeCache.tooDeep(root)
    }

    /// One id more in the two device trees.
    func creationCost(_ id: ThinDeviceID) throws(MetadataError) -> UInt64 {
        var estimate = Estimate()
        try addCreation(&estimate, id)
        return try cost(estimate)
    }

    private func addCreation(
        _ estimate: inout Estimate, _ id: ThinDeviceID
    ) throws(MetadataError) {
        let key = UInt64(id.rawValue)
        estimate.nodes += 1
        estimate.metadataEntries += 1
        try addPath(
            &estimate, superblock.mappingRoot, .topLevel, key, perLevel: 3, siblings: true)
        try addPath(&estimate, superblock.detailsRoot, .details, key, perLevel: 3, siblings: true)
    }

    @inline(__always) func requireInsertSpace(
        _ record: DeviceRecord, _ key: UInt64
    ) throws(MetadataError) {
        if hasSpace(Self.plenty, keepingReserve: true) { return }
        var estimate = Estimate(nodes: 1, dataEntries: 2)
        try addTopPath(&estimate, record)
        try addPath(&estimate, record.root, .mapping, key, perLevel: 3, siblings: false)
        try requireSpace(try cost(estimate), keepingReserve: true)
    }

    /// The device's entry in the top-level tree gets another value.
    private func addTopPath(
        _ estimate: inout Estimate, _ record: DeviceRecord
    ) throws(MetadataError) {
        guard record.shadowedIn != openTransaction else { return }
        try addPath(
            &estimate, superblock.mappingRoot, .topLevel, UInt64(record.id.rawValue),
            perLevel: 1, siblings: false)
    }

    /// Mappings that one descent may remove now, at most `limit`; nil if space does not allow any.
    func removalRun(
        _ record: DeviceRecord, _ key: UInt64, _ limit: Int
    ) throws(MetadataError) -> Int? {
        let leafful = NodeGeometry.internalNode.capacity
        if hasSpace(4 * Self.plenty, keepingReserve: false) { return min(limit, 8 * leafful) }
        let run = min(limit, leafful)
        for entries in [run, 1] {
            var estimate = Estimate(nodes: 1, dataEntries: entries, metadataEntries: 2)
            try addTopPath(&estimate, record)
            try addPath(&estimate, record.root, .mapping, key, perLevel: 2, siblings: true)
            if hasSpace(try cost(estimate), keepingReserve: false) { return entries }
        }
        return nil
    }

    /// Removing the device and all that is its alone.
    func deletionCost(_ record: DeviceRecord) throws(MetadataError) -> UInt64 {
        var estimate = Estimate()
        try addDeletion(&estimate, record)
        return try cost(estimate)
    }

    private func addDeletion(
        _ estimate: inout Estimate, _ record: DeviceRecord
    ) throws(MetadataError) {
        let key = UInt64(record.id.rawValue)
        let mapped = Int(clamping: min(record.details.mappedBlocks, dataBlocks))
        estimate.dataEntries += mapped
        estimate.metadataEntries += mapped / NodeGeometry.internalNode.minimum + 2
        // Once to shadow the path, once to take the entry out.
        try addPath(
            &estimate, superblock.mappingRoot, .topLevel, key, perLevel: 2, siblings: true)
        try addPath(&estimate, superblock.detailsRoot, .details, key, perLevel: 2, siblings: true)
    }
}
