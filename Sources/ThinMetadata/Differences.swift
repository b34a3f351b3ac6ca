// Where the mappings of two devices differ: a walk down both trees at once.
//
// 1. A node on both ways down is one subtree of both: its keys are skipped, and it is not read.
// 2. Each step answers some keys, from the one it is given on: a walk of damaged trees ends.

extension ThinMetadata {
    /// Says of the virtual blocks from `from` on whether both devices map them to the same data
    /// block, or neither maps them: those of one subtree that both have, or of a leaf of each.
    /// `body` gets runs in ascending order, without a gap.
    /// - Parameter reading: read what is not in memory.
    /// - Returns: the first virtual block not answered; `from` itself if it takes a node that was
    ///   not to be read.
    public func visitDifferences(
        of id: ThinDeviceID, from other: ThinDeviceID, _ from: VirtualBlock, limit: VirtualBlock,
        reading: Bool, _ body: (Range<UInt64>, _ differs: Bool) -> Void
    ) throws(MetadataError) -> VirtualBlock {
        guard from < limit else { return limit }
        let meeting = try TwoDescents.meet(
            store.cache, try existing(id).root, try existing(other).root, for: from.rawValue,
            reading: reading)
        switch meeting {
        case .missing: return from
        case .same(let next):
            let end = min(limit.rawValue, next ?? limit.rawValue)
            body(from.rawValue..<end, false)
            return VirtualBlock(end)
        case .leaves(let one, let another, let next):
            let end = min(limit.rawValue, next ?? limit.rawValue)
            compare(one, another, from.rawValue..<end, body)
            return VirtualBlock(end)
        }
    }

    private func compare(
        _ one: Node, _ another: Node, _ range: Range<UInt64>, _ body: (Range<UInt64>, Bool) -> Void
    ) {
        var first = one.ceilingIndex(range.lowerBound)
        var second = another.ceilingIndex(range.lowerBound)
        var from = range.lowerBound
        while true {
            let key = first < one.count ? one.key(first) : UInt64.max
            let other = second < another.count ? another.key(second) : UInt64.max
            let next = min(key, other)
            guard next < range.upperBound else { break }
            if from < next { body(from..<next, false) }
            let isSame =
                key == other
                && Mapping(rawValue: one.value(first)).block
                    == Mapping(rawValue: another.value(second)).block
            body(next..<next + 1, !isSame)
            if key == next { first += 1 }
            if other == next { second += 1 }
            from = next + 1
        }
        if from < range.upperBound { body(from..<range.upperBound, false) }
    }

    /// Calls `body` for each node that comparing the range would have to read. Where an inner node is
    /// missing, what is below it is not known yet.
    /// - Parameter steps: takes so many steps of the walk only.
    public func forEachMissingNode(
        of id: ThinDeviceID, from other: ThinDeviceID, _ range: Range<UInt64>, steps: Int,
        _ body: (MetadataBlock) -> Void
    ) throws(MetadataError) {
        guard let record = try record(id), let base = try self.record(other) else { return }
        var from = range.lowerBound
        for _ in 0..<steps where from < range.upperBound {
            let next: UInt64?
            switch try TwoDescents.meet(
                store.cache, record.root, base.root, for: from, reading: false)
            {
            case .same(let end), .leaves(_, _, let end): next = end
            case .missing(let one, let another, let end):
                if let one { body(MetadataBlock(one)) }
                if let another { body(MetadataBlock(another)) }
                next = end
            }
            guard let next else { return }
            from = next
        }
    }
}

/// The ways down two trees to where a key belongs.
private struct TwoDescents {
    /// Where they lead. What is said is true of the keys below `next`, or of all from the key on.
    enum Meeting {
        /// A subtree that both trees have.
        case same(next: UInt64?)
        case leaves(Node, Node, next: UInt64?)
        /// Nodes that are not in memory, and were not to be read.
        case missing(UInt64?, UInt64?, next: UInt64?)
    }

    static func meet(
        _ cache: NodeCache, _ root: UInt64, _ otherRoot: UInt64, for key: UInt64, reading: Bool
    ) throws(MetadataError) -> Meeting {
        if root == otherRoot { return .same(next: nil) }
        var one = Descent(cache, root, key)
        var another = Descent(cache, otherRoot, key)
        // Level by level, so that a common node is found before either way goes through it, if the
        // trees are equally high.
        while true {
            let moves = one.canGoOn(reading: reading)
            if moves {
                try one.goOn()
                if let place = another.place(of: one.block) { return same(another, place, one) }
            }
            let otherMoves = another.canGoOn(reading: reading)
            if otherMoves {
                try another.goOn()
                if let place = one.place(of: another.block) { return same(one, place, another) }
            }
            if !moves && !otherMoves { break }
        }
        let next = lesser(one.way.last!.next, another.way.last!.next)
        guard let leaf = one.leaf, let otherLeaf = another.leaf else {
            return .missing(
                one.leaf == nil ? one.block : nil, another.leaf == nil ? another.block : nil,
                next: next)
        }
        return .leaves(leaf, otherLeaf, next: next)
    }

    /// The last node of `late` is the one at `place` of `early`, and perhaps their parents have the
    /// following ones in common, too.
    private static func same(_ early: Descent, _ place: Int, _ late: Descent) -> Meeting {
        guard place == early.way.count - 1, let one = early.parent, let another = late.parent
        else { return .same(next: lesser(early.way[place].next, late.way.last!.next)) }
        var index = one.index + 1
        var otherIndex = another.index + 1
        while index < one.node.count, otherIndex < another.node.count,
            one.node.key(index) == another.node.key(otherIndex),
            one.node.value(index) == another.node.value(otherIndex)
        {
            index += 1
            otherIndex += 1
        }
        return .same(
            next: lesser(
                index < one.node.count ? one.node.key(index) : early.nextOfParent,
                otherIndex < another.node.count
                    ? another.node.key(otherIndex) : late.nextOfParent))
    }

    private static func lesser(_ a: UInt64?, _ b: UInt64?) -> UInt64? {
        guard let a, let b else { return a ?? b }
        return min(a, b)
    }
}

/// A way down one mapping tree.
private struct Descent {
    private let cache: NodeCache
    private let key: UInt64
    /// The nodes from the root to the one that is to be read next, each with the smallest key that
    /// belongs to a later one.
    private(set) var way: [(block: UInt64, next: UInt64?)]
    /// The node that the last one was found in, and where.
    private(set) var parent: (node: Node, index: Int)?
    private(set) var leaf: Node?

    init(_ cache: NodeCache, _ root: UInt64, _ key: UInt64) {
        self.cache = cache
        self.key = key
        way = [(root, nil)]
        way.reserveCapacity(NodeCache.maxDepth)
    }

    var block: UInt64 { way.last!.block }
    var nextOfParent: UInt64? { way[way.count - 2].next }

    func place(of block: UInt64) -> Int? { way.firstIndex { $0.block == block } }

    func canGoOn(reading: Bool) -> Bool { leaf == nil && (reading || cache.contains(block)) }

    mutating func goOn() throws(MetadataError) {
        let node =
            if let parent { try cache.child(parent.node, parent.index, .mapping) } else {
                try cache.node(block, .mapping)
            }
        if node.isLeaf {
            leaf = node
            return
        }
        guard way.count < NodeCache.maxDepth else { throw NodeCache.tooDeep(way[0].block) }
        // A key below the first belongs to the first child.
        let index = max(0, node.floorIndex(key))
        let next = index + 1 < node.count ? node.key(index + 1) : way.last!.next
        parent = (node, index)
        way.append((node.value(index), next))
    }
}
