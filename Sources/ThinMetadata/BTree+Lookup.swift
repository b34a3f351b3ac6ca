// B-trees, reading: one key, the leaf around a key, the first key from some point on, every leaf.
//
// 1. A descent never goes deeper than `maxDepth`: a damaged tree with a loop is an error.
// 2. A child's keys lie between its own and the next key of its parent; the parent's key may be
//    smaller than the child's first.
// 3. Walking from leaf to leaf, the key to go on from only grows: a walk of a damaged tree ends.

extension NodeCache {
    /// 252-way nodes, at least a third full, on at most 4,161,600 blocks: 5 levels, and some air.
    static let maxDepth = 10

    static func tooDeep(_ block: UInt64) -> MetadataError {
        .corrupt(block: MetadataBlock(block), "its tree is deeper than any tree can be")
    }

    /// Invariant 2 for the child at `index`.
    @inline(__always) func verifyChild(
        _ child: Node, of parent: Node, at index: Int
    ) throws(MetadataError) {
        let count = child.count
        guard count > 0, child.key(0) >= parent.key(index),
            index + 1 == parent.count || child.key(count - 1) < parent.key(index + 1)
        else {
            throw .corrupt(
                block: MetadataBlock(child.block),
                "its keys do not fit entry \(index) of its parent \(parent.block)")
        }
    }

    @inline(__always) func child(
        _ parent: Node, _ index: Int, _ kind: TreeKind
    ) throws(MetadataError) -> Node {
        let child = try self.node(parent.value(index), kind)
        try verifyChild(child, of: parent, at: index)
        return child
    }

    /// The value of `key`, valid until the next change or trim.
    @inline(__always) func find(
        _ root: UInt64, _ kind: TreeKind, _ key: UInt64
    ) throws(MetadataError) -> UnsafeMutableRawPointer? {
        var node = try self.node(root, kind)
        var depth = 0
        while true {
            let index = node.floorIndex(key)
            guard index >= 0 else { return nil }
            if node.isLeaf {
                return node.key(index) == key ? node.value(at: index, kind.leaf) : nil
            }
            depth += 1
            guard depth < Self.maxDepth else { throw Self.tooDeep(root) }
            node = try child(node, index, kind)
        }
    }

    /// The leaf that `key` belongs to, and the smallest key that belongs to a later leaf (nil: it
    /// is the last one).
    func leaf(
        _ root: UInt64, _ kind: TreeKind, for key: UInt64
    ) throws(MetadataError) -> (leaf: Node, next: UInt64?) {
        var node = try self.node(root, kind)
        var next: UInt64?
        var depth = 0
        while !node.isLeaf {
            // A key below the first belongs to the first leaf.
            let index = max(0, node.floorIndex(key))
            if index + 1 < node.count { next = node.key(index + 1) }
            depth += 1
            guard depth < Self.maxDepth else { throw Self.tooDeep(root) }
            node = try child(node, index, kind)
        }
        return (node, next)
    }

    /// The first key that is at least `key`.
    func firstKey(
        _ root: UInt64, _ kind: TreeKind, from key: UInt64
    ) throws(MetadataError) -> UInt64? {
        var from = key
        while true {
            let (leaf, next) = try leaf(root, kind, for: from)
            let index = leaf.ceilingIndex(from)
            if index < leaf.count { return leaf.key(index) }
            // Rises with each round: `next` is above `from`.
            guard let next else { return nil }
            from = next
        }
    }

    /// Levels of the tree: 1 if the root is a leaf.
    func depth(_ root: UInt64, _ kind: TreeKind) throws(MetadataError) -> Int {
        var node = try self.node(root, kind)
        var depth = 1
        while !node.isLeaf {
            depth += 1
            guard depth <= Self.maxDepth else { throw Self.tooDeep(root) }
            node = try child(node, 0, kind)
        }
        return depth
    }

    /// Calls `body` for each leaf, in key order.
    func forEachLeaf(
        _ root: UInt64, _ kind: TreeKind, _ body: (Node) throws(MetadataError) -> Void
    ) throws(MetadataError) {
        var from: UInt64 = 0
        while true {
            let (leaf, next) = try leaf(root, kind, for: from)
            try body(leaf)
            guard let next else { return }
            from = next
        }
    }
}
