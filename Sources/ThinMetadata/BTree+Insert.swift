// B-trees: inserting a key or replacing its value.
//
// 1. The path is shadowed from the root down; the caller stores the new root.
// 2. A full node is given room before it is entered, so its parent always has room for one more
//    entry. A full leaf that has the key already is left alone.
// 3. No node other than the root gets below a third of its capacity.
// 4. A key below the tree's first lowers the first key of each internal node on the way.

extension Store {
    /// Siblings with less room than this are not worth moving entries to.
    private static let worthMoving = 8

    /// - Parameters:
    ///   - value: `kind.leaf.valueSize` bytes.
    ///   - old: where the replaced value goes.
    /// - Returns: whether the key was there.
    func insert(
        _ root: inout UInt64, _ kind: TreeKind, _ key: UInt64, _ value: UnsafeRawPointer,
        old: UnsafeMutableRawPointer
    ) throws(MetadataError) -> Bool {
        var node = try shadow(root, kind)
        root = node.block
        if mustSplit(node, kind, key) { try splitRoot(node, kind, key) }
        var depth = 0
        while !node.isLeaf {
            depth += 1
            guard depth < NodeCache.maxDepth else { throw NodeCache.tooDeep(root) }
            var index = node.floorIndex(key)
            if index < 0 {
                node.setKey(0, key)
                index = 0
            }
            var child = try shadowChild(node, index, kind)
            if mustSplit(child, kind, key) {
                try makeRoom(node, index, child, kind, key)
                index = node.floorIndex(key)
                child = try cache.child(node, index, kind)
            }
            node = child
        }
        let geometry = kind.leaf
        let index = node.floorIndex(key)
        if index >= 0 && node.key(index) == key {
            let slot = node.value(at: index, geometry)
            old.copyMemory(from: slot, byteCount: geometry.valueSize)
            slot.copyMemory(from: value, byteCount: geometry.valueSize)
            return true
        }
        node.insert(at: index + 1, key: key, value: value, geometry)
        return false
    }

    /// Returns the replaced value.
    func insert64(
        _ root: inout UInt64, _ kind: TreeKind, _ key: UInt64, _ value: UInt64
    ) throws(MetadataError) -> UInt64? {
        assert(kind.leaf.valueSize == 8)
        var old: UInt64 = 0
        var new = value.littleEndian
        return try insert(&root, kind, key, &new, old: &old) ? UInt64(littleEndian: old) : nil
    }

    /// Returns the replaced value.
    func insert32(
        _ root: inout UInt64, _ kind: TreeKind, _ key: UInt64, _ value: UInt32
    ) throws(MetadataError) -> UInt32? {
        assert(kind.leaf.valueSize == 4)
        var old: UInt32 = 0
        var new = value.littleEndian
        return try insert(&root, kind, key, &new, old: &old) ? UInt32(littleEndian: old) : nil
    }

    @inline(__always) func shadowChild(
        _ parent: Node, _ index: Int, _ kind: TreeKind
    ) throws(MetadataError) -> Node {
        let block = parent.value(index)
        let child = try shadow(block, kind)
        try cache.verifyChild(child, of: parent, at: index)
        if child.block != block { parent.setValue(index, child.block) }
        return child
    }

    /// Shadows the path to `key`'s leaf; changes nothing else.
    func shadowPath(
        _ root: inout UInt64, _ kind: TreeKind, _ key: UInt64
    ) throws(MetadataError) {
        var node = try shadow(root, kind)
        root = node.block
        var depth = 0
        while !node.isLeaf {
            depth += 1
            guard depth < NodeCache.maxDepth else { throw NodeCache.tooDeep(root) }
            node = try shadowChild(node, max(0, node.floorIndex(key)), kind)
        }
    }

    @inline(__always) private func mustSplit(
        _ node: Node, _ kind: TreeKind, _ key: UInt64
    ) -> Bool {
        node.count == node.geometry(kind).capacity && !(node.isLeaf && node.contains(key))
    }

    /// How many entries stay on the left when a full node is split. Keys that only grow leave
    /// the left node as full as the minimum of the right one allows.
    private func leftShare(_ node: Node, _ geometry: NodeGeometry, _ key: UInt64) -> Int {
        key > node.lastKey ? geometry.capacity - geometry.minimum : geometry.capacity / 2
    }

    /// The full root keeps its block and becomes the parent of two new nodes.
    private func splitRoot(
        _ node: Node, _ kind: TreeKind, _ key: UInt64
    ) throws(MetadataError) {
        let geometry = node.geometry(kind)
        let share = leftShare(node, geometry, key)
        let left = try makeNode(kind, leaf: node.isLeaf)
        let right = try makeNode(kind, leaf: node.isLeaf)
        left.append(0..<share, of: node, geometry)
        right.append(share..<node.count, of: node, geometry)
        let block = node.block
        node.base.initializeMemory(as: UInt8.self, repeating: 0, count: Layout.blockSize)
        node.initialize(block: block, leaf: false, .internalNode)
        node.count = 2
        node.setKey(0, left.key(0))
        node.setValue(0, left.block)
        node.setKey(1, right.key(0))
        node.setValue(1, right.block)
    }

    /// Room in the full child at `index`: entries go to an unshared neighbour, or the child is
    /// split. The parent is shadowed and has room.
    private func makeRoom(
        _ parent: Node, _ index: Int, _ child: Node, _ kind: TreeKind, _ key: UInt64
    ) throws(MetadataError) {
        let geometry = child.geometry(kind)
        if index > 0, let left = try roomyNeighbour(parent, index - 1, child, kind) {
            // Appending: the left node is full for good, the right one takes what comes.
            let moved =
                key > child.lastKey
                ? min(geometry.capacity - left.count, child.count - geometry.minimum)
                : (child.count - left.count + 1) / 2
            left.takeFirst(moved, of: child, geometry)
            parent.setKey(index, child.key(0))
        } else if index + 1 < parent.count,
            let right = try roomyNeighbour(parent, index + 1, child, kind)
        {
            right.takeLast((child.count - right.count + 1) / 2, of: child, geometry)
            parent.setKey(index + 1, right.key(0))
        } else {
            let share = leftShare(child, geometry, key)
            let right = try makeNode(kind, leaf: child.isLeaf)
            right.append(share..<child.count, of: child, geometry)
            child.truncate(to: share, geometry)
            var pointer = right.block.littleEndian
            parent.insert(at: index + 1, key: right.key(0), value: &pointer, .internalNode)
        }
    }

    /// The neighbour, shadowed, if entries may move there.
    private func roomyNeighbour(
        _ parent: Node, _ index: Int, _ child: Node, _ kind: TreeKind
    ) throws(MetadataError) -> Node? {
        let neighbour = try cache.child(parent, index, kind)
        try verifySiblings(child, neighbour)
        guard neighbour.count + Self.worthMoving <= neighbour.geometry(kind).capacity,
            try metadata.shortCount(neighbour.block) == 1
        else { return nil }
        return try shadowChild(parent, index, kind)
    }

    /// All leaves are at one depth, so neighbours are both leaves or both internal.
    func verifySiblings(_ one: Node, _ other: Node) throws(MetadataError) {
        guard one.isLeaf == other.isLeaf else {
            throw .corrupt(
                block: MetadataBlock(other.block), "its sibling \(one.block) is at another depth")
        }
    }
}
