// B-trees: removing keys, one or a run of them, with rebalancing.
//
// 1. A node other than the root is entered only with more entries than its minimum, so that it may
//    lose one. A node at its minimum takes entries from a neighbour or is merged with it first.
// 2. An internal root has at least two children: with one left, that child becomes the root.
// 3. A leaf that goes as a whole is not copied first: its parent drops it. If the leaf is shared,
//    its entries' references stay with the others.

extension Store {
    /// What a removal does with each entry: key, value, and whether the entry's reference was this
    /// tree's own (and has to be dropped) or stays with another tree that shares the leaf.
    typealias Removed = (UInt64, UnsafeMutableRawPointer, Bool) throws(MetadataError) -> Void

    /// Removes one key that exists, or does nothing.
    func removeKey(
        _ root: inout UInt64, _ kind: TreeKind, _ key: UInt64
    ) throws(MetadataError) {
        guard try cache.find(root, kind, key) != nil else { return }
        _ = try removeRun(&root, kind, from: key, through: key, limit: 1) {
            _, _, _ throws(MetadataError) in
        }
    }

    /// Removes a run of keys in one descent: `first`, which has to exist, and those that follow it
    /// up to `last`, as far as one leaf or some leaves that go as a whole allow.
    /// - Returns: how many; at least 1, at most `limit`.
    func removeRun(
        _ root: inout UInt64, _ kind: TreeKind, from first: UInt64, through last: UInt64,
        limit: Int, _ removed: Removed
    ) throws(MetadataError) -> Int {
        assert(limit > 0)
        try collapse(&root, kind)
        if let count = try dropRootLeaf(&root, kind, first, last, limit, removed) { return count }
        var node = try shadow(root, kind)
        root = node.block
        var isRoot = true
        var depth = 0
        while !node.isLeaf {
            depth += 1
            guard depth < NodeCache.maxDepth else { throw NodeCache.tooDeep(root) }
            var index = node.floorIndex(first)
            guard index >= 0 else { throw Self.vanished(first, root) }
            let child = try cache.child(node, index, kind)
            if child.isLeaf {
                let count = try dropLeaves(
                    node, index, isRoot, kind, first, last, limit, removed)
                if count > 0 {
                    if isRoot { try collapse(&root, kind) }
                    return count
                }
            }
            if child.count <= child.geometry(kind).minimum {
                try rebalance(node, index, kind)
                if isRoot && node.count == 1 {
                    // The merged child is the root from here on.
                    let only = node.value(0)
                    try release(node.block)
                    root = only
                    node = try shadow(only, kind)
                    root = node.block
                    continue
                }
                index = node.floorIndex(first)
            }
            node = try shadowChild(node, index, kind)
            isRoot = false
        }
        return try removeFromLeaf(node, isRoot, kind, first, last, limit, removed)
    }

    private static func vanished(_ key: UInt64, _ root: UInt64) -> MetadataError {
        .corrupt(block: MetadataBlock(root), "its tree lost key \(key)")
    }

    /// Invariant 2: while the root is an internal node with one child, the child takes its place.
    private func collapse(_ root: inout UInt64, _ kind: TreeKind) throws(MetadataError) {
        for _ in 0..<NodeCache.maxDepth {
            let node = try cache.node(root, kind)
            guard !node.isLeaf && node.count == 1 else { return }
            let only = node.value(0)
            // The root's reference on the child goes over to whoever refers to the root; if others
            // have the root as well, they keep theirs.
            if try count(root) > 1 { try retain(only) }
            try release(root)
            root = only
        }
        throw NodeCache.tooDeep(root)
    }

    /// A shared leaf as root, all of whose keys go: an empty leaf takes its place.
    private func dropRootLeaf(
        _ root: inout UInt64, _ kind: TreeKind, _ first: UInt64, _ last: UInt64, _ limit: Int,
        _ removed: Removed
    ) throws(MetadataError) -> Int? {
        let node = try cache.node(root, kind)
        guard kind == .mapping, node.isLeaf,
            goes(node, first, last, limit), try count(root) > 1
        else { return nil }
        let removedCount = node.count
        for index in 0..<removedCount {
            try removed(node.key(index), node.value(at: index, kind.leaf), false)
        }
        try release(root)
        root = try makeNode(kind, leaf: true).block
        return removedCount
    }

    /// Whether every key of the leaf is to be removed now.
    private func goes(_ leaf: Node, _ first: UInt64, _ last: UInt64, _ limit: Int) -> Bool {
        leaf.count > 0 && leaf.count <= limit && leaf.key(0) >= first && leaf.lastKey <= last
    }

    /// Drops the leaf at `index` and those after it while they go as a whole and the parent, which
    /// is shadowed, may lose a child.
    private func dropLeaves(
        _ parent: Node, _ index: Int, _ isRoot: Bool, _ kind: TreeKind,
        _ first: UInt64, _ last: UInt64, _ limit: Int, _ removed: Removed
    ) throws(MetadataError) -> Int {
        guard kind == .mapping else { return 0 }
        let floor = isRoot ? 1 : NodeGeometry.internalNode.minimum
        var total = 0
        var dropped = 0
        while parent.count - dropped > floor && index + dropped < parent.count {
            let leaf = try cache.child(parent, index + dropped, kind)
            guard leaf.isLeaf, goes(leaf, first, last, limit - total) else { break }
            let isOwn = try count(leaf.block) == 1
            let entries = leaf.count
            for entry in 0..<entries {
                try removed(leaf.key(entry), leaf.value(at: entry, kind.leaf), isOwn)
            }
            try release(leaf.block)
            total += entries
            dropped += 1
        }
        if dropped > 0 { parent.remove(index..<index + dropped, .internalNode) }
        return total
    }

    private func removeFromLeaf(
        _ leaf: Node, _ isRoot: Bool, _ kind: TreeKind, _ first: UInt64, _ last: UInt64,
        _ limit: Int, _ removed: Removed
    ) throws(MetadataError) -> Int {
        let geometry = kind.leaf
        let start = leaf.floorIndex(first)
        guard start >= 0 && leaf.key(start) == first else { throw Self.vanished(first, leaf.block) }
        let spare = isRoot ? leaf.count : leaf.count - geometry.minimum
        let most = min(limit, spare, leaf.count - start)
        guard most > 0 else { throw Self.vanished(first, leaf.block) }
        var end = start
        while end < start + most && leaf.key(end) <= last {
            try removed(leaf.key(end), leaf.value(at: end, geometry), true)
            end += 1
        }
        leaf.remove(start..<end, geometry)
        return end - start
    }

    /// The child at `index` is at its minimum: merges it with a neighbour, or evens both out. The
    /// parent is shadowed.
    private func rebalance(
        _ parent: Node, _ index: Int, _ kind: TreeKind
    ) throws(MetadataError) {
        guard parent.count > 1 else {
            throw .corrupt(block: MetadataBlock(parent.block), "a node has a single child")
        }
        let leftIndex = index > 0 ? index - 1 : index
        let left = try cache.child(parent, leftIndex, kind)
        let right = try cache.child(parent, leftIndex + 1, kind)
        try verifySiblings(left, right)
        let geometry = left.geometry(kind)
        let total = left.count + right.count
        if total < 2 * (geometry.minimum + 1) {
            try merge(parent, leftIndex, right, kind)
        } else {
            let left = try shadowChild(parent, leftIndex, kind)
            let right = try shadowChild(parent, leftIndex + 1, kind)
            let target = total / 2
            if left.count < target {
                left.takeFirst(target - left.count, of: right, geometry)
            } else if left.count > target {
                right.takeLast(left.count - target, of: left, geometry)
            }
            parent.setKey(leftIndex + 1, right.key(0))
        }
    }

    /// Moves all entries of the right node to the left one. Its references go along; if others
    /// share it, they keep theirs and the entries get one more each.
    private func merge(
        _ parent: Node, _ leftIndex: Int, _ right: Node, _ kind: TreeKind
    ) throws(MetadataError) {
        let left = try shadowChild(parent, leftIndex, kind)
        left.append(0..<right.count, of: right, left.geometry(kind))
        if try count(right.block) > 1 { try addReferences(ofEntries: right, kind) }
        try release(right.block)
        parent.remove(leftIndex + 1..<leftIndex + 2, .internalNode)
    }
}
