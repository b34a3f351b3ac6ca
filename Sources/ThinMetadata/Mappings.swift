// Mappings of one device: looking them up, inserting, removing.
//
// 1. `mappedBlocks` changes only when a key comes or goes, not when its value is replaced.
// 2. A data block gets its reference when the mapping is inserted, never before: what is reserved
//    only is not in any committed state.
// 3. A looked-up mapping of a cached path costs no allocation.

extension ThinMetadata {
    public func lookup(
        _ id: ThinDeviceID, _ virtual: VirtualBlock
    ) throws(MetadataError) -> Mapping? {
        let record = try existing(id)
        guard let value = try store.cache.find(record.root, .mapping, virtual.rawValue) else {
            return nil
        }
        return Mapping(rawValue: value.le64(0))
    }

    /// Calls `body` for each mapping in `from..<limit` of the leaf that `from` belongs to.
    /// - Returns: the first virtual block not yet answered, above `from`; all between that got no
    ///   call is unmapped. `limit` if nothing follows.
    public func visitLeaf(
        _ id: ThinDeviceID, from: VirtualBlock, limit: VirtualBlock,
        _ body: (VirtualBlock, Mapping) -> Void
    ) throws(MetadataError) -> VirtualBlock {
        let record = try existing(id)
        guard from < limit else { return limit }
        let (leaf, next) = try store.cache.leaf(record.root, .mapping, for: from.rawValue)
        let end = min(limit.rawValue, next ?? limit.rawValue)
        var index = leaf.ceilingIndex(from.rawValue)
        let count = leaf.count
        while index < count && leaf.key(index) < end {
            body(VirtualBlock(leaf.key(index)), Mapping(rawValue: leaf.value(index)))
            index += 1
        }
        return VirtualBlock(end)
    }

    /// The device's highest mapped virtual block.
    public func lastMapped(_ id: ThinDeviceID) throws(MetadataError) -> VirtualBlock? {
        let (leaf, _) = try store.cache.leaf(try existing(id).root, .mapping, for: .max)
        return leaf.count > 0 ? VirtualBlock(leaf.key(leaf.count - 1)) : nil
    }

    /// Maps the virtual block to a reserved data block, stamped with the pool's time. The
    /// reservation becomes a reference; the block that was mapped before loses one.
    /// - Parameter isAssured: the caller has asked `fits`, and this belongs to what it asked for.
    /// - Returns: the replaced mapping.
    public func insert(
        _ id: ThinDeviceID, _ virtual: VirtualBlock, _ block: DataBlock, isAssured: Bool = false
    ) throws(MetadataError) -> Mapping? {
        let record = try existing(id)
        try requireWritable()
        precondition(
            block.rawValue < store.data.blockCount && store.data.isBusy(block.rawValue),
            "data block \(block.rawValue) was not reserved")
        if !isAssured { try requireInsertSpace(record, virtual.rawValue) }
        try touch(record)
        markDirty(record)
        var root = record.root
        let mapping = Mapping(block: block, time: time)
        let old = try store.insert64(&root, .mapping, virtual.rawValue, mapping.rawValue)
        if root != record.root { try setRoot(record, root) }
        try store.data.setBusy(block.rawValue, false)
        try store.data.setShortCount(block.rawValue, 1)
        guard let old else {
            guard record.details.mappedBlocks < UInt64.max else {
                throw .corrupt(
                    block: MetadataBlock(superblock.detailsRoot),
                    "device \(record.id.rawValue) has fewer mappings than its details say")
            }
            record.details.mappedBlocks += 1
            return nil
        }
        let replaced = Mapping(rawValue: old)
        if replaced.block != block { try store.releaseData(replaced.block, .replacement) }
        return replaced
    }

    /// Unmaps up to `limit` mappings of the range, lowest first.
    /// - Returns: where to go on; nil if the range is done.
    public func remove(
        _ id: ThinDeviceID, _ range: Range<UInt64>, limit: Int,
        removed: (VirtualBlock, Mapping) -> Void
    ) throws(MetadataError) -> VirtualBlock? {
        precondition(limit > 0)
        let record = try existing(id)
        try requireWritable()
        var from = range.lowerBound
        var left = limit
        while from < range.upperBound {
            guard let first = try store.cache.firstKey(record.root, .mapping, from: from),
                first < range.upperBound
            else { return nil }
            guard left > 0 else { return VirtualBlock(first) }
            guard let run = try removalRun(record, first, left) else {
                // What is freed comes back with the next commit.
                if left == limit { throw .outOfMetadataSpace }
                return VirtualBlock(first)
            }
            try touch(record)
            markDirty(record)
            let (count, last) = try removeRun(
                record, from: first, through: range.upperBound - 1, limit: run, removed)
            left -= count
            from = last + 1
        }
        return nil
    }

    private func removeRun(
        _ record: DeviceRecord, from first: UInt64, through end: UInt64, limit: Int,
        _ removed: (VirtualBlock, Mapping) -> Void
    ) throws(MetadataError) -> (count: Int, last: UInt64) {
        var root = record.root
        var last = first
        let count = try store.removeRun(
            &root, .mapping, from: first, through: end, limit: limit
        ) { key, value, isOwn throws(MetadataError) in
            let mapping = Mapping(rawValue: value.le64(0))
            if isOwn { try store.releaseData(mapping.block, .discard) }
            last = key
            removed(VirtualBlock(key), mapping)
        }
        try setRoot(record, root)
        guard record.details.mappedBlocks >= UInt64(count) else {
            throw .corrupt(
                block: MetadataBlock(superblock.detailsRoot),
                "device \(record.id.rawValue) has more mappings than its details say")
        }
        record.details.mappedBlocks -= UInt64(count)
        return (count, last)
    }

    /// Whether nobody else has the virtual block's data: every node from the superblock's mapping
    /// root to the leaf, and the data block, have one reference in the open, the committing and the
    /// committed state. May say no where yes would be right, never the other way.
    public func isExclusive(
        _ id: ThinDeviceID, _ virtual: VirtualBlock
    ) throws(MetadataError) -> Bool {
        let record = try existing(id)
        // Every count of 1 may have been 2 in a state that a crash brings back.
        guard !store.hasUnshared && !hasUnsharedInFrozen else { return false }
        guard try isOwnPath(superblock.mappingRoot, .topLevel, UInt64(id.rawValue)),
            try isOwnPath(record.root, .mapping, virtual.rawValue),
            let mapping = try lookup(id, virtual)
        else { return false }
        return try store.dataCount(mapping.block) == 1
    }

    /// Calls `body` for each mapping in `from..<limit` of the leaf that `from` belongs to, and says
    /// whether anybody else has its data in the open transaction, so that a write has to copy it.
    ///
    /// Unlike `isExclusive` it tells the present state alone, not what a crash may bring back.
    /// - Returns: as `visitLeaf`; a mapping of that leaf, where it would have to read too many bitmaps.
    public func visitSharing(
        _ id: ThinDeviceID, from: VirtualBlock, limit: VirtualBlock,
        _ body: (VirtualBlock, _ isShared: Bool) -> Void
    ) throws(MetadataError) -> VirtualBlock {
        let record = try existing(id)
        var isOwn = try isOwnPath(superblock.mappingRoot, .topLevel, UInt64(id.rawValue))
        if isOwn { isOwn = try isOwnPath(record.root, .mapping, from.rawValue) }
        var failure: MetadataError?
        var stop: VirtualBlock?
        let bitmaps = store.data.loadedPages + Self.mostBitmapsRead
        let next = try visitLeaf(id, from: from, limit: limit) { block, mapping in
            guard failure == nil, stop == nil else { return }
            guard store.data.loadedPages < bitmaps else {
                stop = block
                return
            }
            var isShared = mapping.time < record.details.snapshottedTime
            if isShared, isOwn {
                do throws(MetadataError) {
                    isShared = try store.dataCount(mapping.block) > 1
                } catch { failure = error }
            }
            body(block, isShared)
        }
        if let failure { throw failure }
        return stop ?? next
    }

    /// The mappings of a leaf may each have their data elsewhere.
    private static let mostBitmapsRead = 8

    /// Whether all nodes on the way to the key's leaf have one reference.
    private func isOwnPath(
        _ root: UInt64, _ kind: TreeKind, _ key: UInt64
    ) throws(MetadataError) -> Bool {
        var block = root
        for _ in 0..<NodeCache.maxDepth {
            guard try store.count(block) == 1 else { return false }
            let node = try store.cache.node(block, kind)
            if node.isLeaf { return true }
            block = node.value(max(0, node.floorIndex(key)))
        }
        throw NodeCache.tooDeep(root)
    }
}
