// B-trees, as a whole: counting the nodes that only one tree has, dropping a tree.
//
// 1. A walk of a damaged tree ends: a bounded count stops at its bound, and a dropped node's count
//    is 0 when a second pointer leads to it.

extension Store {
    /// Nodes of this tree that no other tree refers to, counted up to `limit`. A shared node hides
    /// what is below it.
    func exclusiveNodes(
        _ root: UInt64, _ kind: TreeKind, limit: Int
    ) throws(MetadataError) -> Int {
        guard try count(root) == 1 else { return 0 }
        let height = try cache.depth(root, kind)
        return try exclusiveNodes(root, kind, height: height, limit: limit)
    }

    /// Leaves are counted without being read: only their counts matter.
    private func exclusiveNodes(
        _ block: UInt64, _ kind: TreeKind, height: Int, limit: Int
    ) throws(MetadataError) -> Int {
        var found = 1
        guard height > 1 else { return found }
        let node = try cache.node(block, kind)
        guard !node.isLeaf else { return found }
        for index in 0..<node.count where found < limit {
            guard try count(node.value(index)) == 1 else { continue }
            found += try exclusiveNodes(
                node.value(index), kind, height: height - 1, limit: limit - found)
        }
        return found
    }

    /// Drops one reference on a mapping tree; with the last one goes what it refers to.
    func dropMappings(_ block: UInt64, depth: Int = 1) throws(MetadataError) {
        guard depth <= NodeCache.maxDepth else { throw NodeCache.tooDeep(block) }
        if try count(block) == 1 {
            let node = try cache.node(block, .mapping)
            for index in 0..<node.count {
                if node.isLeaf {
                    try releaseData(Mapping(rawValue: node.value(index)).block, .discard)
                } else {
                    try dropMappings(node.value(index), depth: depth + 1)
                }
            }
        }
        // Last: the node's memory may be used for another block from here on.
        try release(block)
    }
}
