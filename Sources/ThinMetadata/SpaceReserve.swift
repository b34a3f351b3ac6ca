// Metadata space: an operation starts only if it, and the commit after it, cannot run out.
//
// 1. Costs are upper bounds of blocks allocated; blocks freed on the way do not count, because most
//    of them come back with a commit only.
// 2. After every operation `commitCost` blocks are allocatable: a freeze never fails for space.
// 3. Provisioning and new devices also leave the reserve alone; removals may use it. So a full pool
//    can always be emptied.

extension ThinMetadata {
    /// Blocks that only removals and commits may use.
    public var metadataReserve: UInt64 { min(4096, metadataBlocks / 10) }

    /// With this much to spare no insertion has to be looked at closely.
    private static let plenty: UInt64 = 8192

    /// Upper bound of what a freeze would allocate now.
    var commitCost: UInt64 {
        // Details path per changed device; each bitmap with its path in the index tree; every
        // metadata bitmap and the index block.
        3 * UInt64(dirtyRecords.count) + bitmapsCost(store.data.dirtyPages.count)
            + UInt64(store.metadata.slotCount) + 2
    }

    /// Upper bound for writing this many data bitmaps: themselves and the index tree's nodes.
    private func bitmapsCost(_ pages: Int) -> UInt64 {
        guard pages > 0 else { return 0 }
        let total = store.data.slotCount
        let leaves = min(pages, total / TreeKind.dataIndex.leaf.minimum + 1)
        let inner = min(leaves, total / (56 * 84) + 1)
        return UInt64(pages + leaves + inner + 2)
    }

    func dataBitmapsCost(added pages: Int) -> UInt64 {
        let leaves = pages / TreeKind.dataIndex.leaf.minimum + 2
        return UInt64(pages + 2 * leaves + 8)
    }

    func hasSpace(_ cost: UInt64, keepingReserve: Bool) -> Bool {
        store.metadata.availableBlocks
            >= cost + commitCost + (keepingReserve ? metadataReserve : 0)
    }

    func requireSpace(_ cost: UInt64, keepingReserve: Bool) throws(MetadataError) {
        guard hasSpace(cost, keepingReserve: keepingReserve) else { throw .outOfMetadataSpace }
    }

    // MARK: Costs

    /// Shadowing and splitting along one path, root split included.
    private func pathCost(_ root: UInt64, _ kind: TreeKind) throws(MetadataError) -> UInt64 {
        UInt64(3 * (try store.cache.depth(root, kind)) + 1)
    }

    /// Changing the counts of this many blocks, any of which may be in the overflow tree.
    func overflowCost(
        _ map: SpaceMap, _ kind: TreeKind, entries: Int
    ) throws(MetadataError) -> UInt64 {
        let root = try store.cache.node(map.overflowRoot, kind)
        let splits = 2 * (entries / kind.leaf.minimum) + 5
        guard !root.isLeaf else { return UInt64(splits) }
        let depth = try store.cache.depth(map.overflowRoot, kind)
        // Each change touches a path and perhaps a sibling of each node on it.
        let touched = depth == 2 ? min(2 * entries, root.count) : 2 * depth * entries
        return UInt64(splits + min(touched, Int(store.metadata.allocatedBlocks)))
    }

    /// Data blocks whose counts change: overflow tree, bitmaps and index tree.
    private func dataCost(_ entries: Int) throws(MetadataError) -> UInt64 {
        try overflowCost(store.data, .dataOverflow, entries: entries)
            + bitmapsCost(min(entries, store.data.slotCount))
    }

    /// The path to `key` in the top-level or a mapping tree, with what copying shared nodes adds.
    private func sharedPathCost(
        _ root: UInt64, _ kind: TreeKind, _ key: UInt64
    ) throws(MetadataError) -> UInt64 {
        var cost: UInt64 = 1
        var block = root
        for _ in 0..<NodeCache.maxDepth {
            let node = try store.cache.node(block, kind)
            cost += 3
            if try store.metadata.shortCount(block) > 1 {
                let isData = node.isLeaf && kind == .mapping
                cost +=
                    isData
                    ? try dataCost(node.count)
                    : try overflowCost(store.metadata, .metadataOverflow, entries: node.count)
            }
            if node.isLeaf { return cost }
            block = node.value(max(0, node.floorIndex(key)))
        }
        throw NodeCache.tooDeep(root)
    }

    /// One id more in, or out of, the two device trees.
    func deviceTreesCost(_ id: ThinDeviceID) throws(MetadataError) -> UInt64 {
        let key = UInt64(id.rawValue)
        return try sharedPathCost(superblock.mappingRoot, .topLevel, key)
            + sharedPathCost(superblock.detailsRoot, .details, key) + 2
    }

    @inline(__always) func requireInsertSpace(
        _ record: DeviceRecord, _ key: UInt64, keepingReserve: Bool
    ) throws(MetadataError) {
        if hasSpace(Self.plenty, keepingReserve: true) { return }
        try requireSpace(
            try changeCost(record, key, entries: 1), keepingReserve: keepingReserve)
    }

    /// Changing mappings at `key`: both trees' paths, counts of the blocks that come and go.
    private func changeCost(
        _ record: DeviceRecord, _ key: UInt64, entries: Int
    ) throws(MetadataError) -> UInt64 {
        let top = try sharedCostOfTop(record)
        return try top + sharedPathCost(record.root, .mapping, key)
            + dataCost(entries + 1)
            + overflowCost(store.metadata, .metadataOverflow, entries: 8) + 3
    }

    private func sharedCostOfTop(_ record: DeviceRecord) throws(MetadataError) -> UInt64 {
        try sharedPathCost(superblock.mappingRoot, .topLevel, UInt64(record.id.rawValue))
    }

    /// Mappings that one descent may remove now, at most `limit`; nil if space does not allow any.
    func removalRun(
        _ record: DeviceRecord, _ key: UInt64, _ limit: Int
    ) throws(MetadataError) -> Int? {
        let leafful = NodeGeometry.internalNode.capacity
        if hasSpace(4 * Self.plenty, keepingReserve: false) { return min(limit, 8 * leafful) }
        let run = min(limit, leafful)
        // A node that is merged or evened out brings in a sibling, as shared as itself or more.
        let cost = try 2 * changeCost(record, key, entries: run)
        if hasSpace(cost, keepingReserve: false) { return run }
        let single = try 2 * changeCost(record, key, entries: 1)
        return hasSpace(single, keepingReserve: false) ? 1 : nil
    }

    /// Removing the device and all that is its alone.
    func deletionCost(_ record: DeviceRecord) throws(MetadataError) -> UInt64 {
        let mapped = Int(clamping: record.details.mappedBlocks)
        let nodes = mapped / NodeGeometry.internalNode.minimum + 8
        return try 2 * deviceTreesCost(record.id)
            + dataCost(mapped) + overflowCost(store.metadata, .metadataOverflow, entries: nodes)
    }
}
