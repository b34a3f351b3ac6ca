// Nodes of mapping trees read by somebody else, without the lock under which the metadata is used.
//
// 1. A node that is not in memory is part of the committed state, and stays what it is until its
//    block is reused. So what was read is believed if no block became reusable meanwhile.
// 2. What is offered is verified as if it had been read here.

extension ThinMetadata {
    /// Calls `body` for each node that looking up the blocks of the range would have to read. Where
    /// an inner node is missing, what is below it is not known yet.
    /// - Parameter leaves: looks at so many leaves only.
    public func forEachMissingNode(
        _ id: ThinDeviceID, _ range: Range<UInt64>, leaves: Int, _ body: (MetadataBlock) -> Void
    ) throws(MetadataError) {
        guard let record = try record(id) else { return }
        var from = range.lowerBound
        for _ in 0..<leaves where from < range.upperBound {
            let (missing, next) = try store.cache.missingNode(record.root, .mapping, for: from)
            if let missing { body(MetadataBlock(missing)) }
            guard let next else { return }
            from = next
        }
    }

    /// Whether nothing has to be read to get at the virtual block's leaf.
    public func hasLeafInMemory(
        _ id: ThinDeviceID, _ virtual: VirtualBlock
    ) throws(MetadataError) -> Bool {
        let root = try existing(id).root
        return try store.cache.missingNode(root, .mapping, for: virtual.rawValue).missing == nil
    }

    /// A node that was read since `blockReuses` was this; of no use if it has changed.
    public func offer(_ block: MetadataBlock, _ memory: UnsafeRawPointer, readAt reuses: UInt64) {
        if reuses == blockReuses { store.cache.adopt(block.rawValue, memory, .mapping) }
    }
}

extension NodeCache {
    /// The first node on the way to the key's leaf that is not in memory, if one is not, and the
    /// smallest key that is known to belong to a later node.
    fileprivate func missingNode(
        _ root: UInt64, _ kind: TreeKind, for key: UInt64
    ) throws(MetadataError) -> (missing: UInt64?, next: UInt64?) {
        var block = root
        var next: UInt64?
        for _ in 0..<Self.maxDepth {
            guard contains(block) else { return (block, next) }
            let node = try self.node(block, kind)
            if node.isLeaf { return (nil, next) }
            let index = max(0, node.floorIndex(key))
            if index + 1 < node.count { next = node.key(index + 1) }
            block = node.value(index)
        }
        throw Self.tooDeep(root)
    }
}
