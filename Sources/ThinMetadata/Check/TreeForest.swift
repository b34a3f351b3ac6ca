// Reads all trees of one kind, and checks their shape.
//
// 1. `grow` reads level by level, each level in the order of its blocks: many blocks a request,
//    every node once however many trees share it, and no recursion. It checks what can be seen in
//    the node alone, hands leaves to their owner and remembers the edges.
// 2. `settle` goes from the leaves up (depth first, on its own stack) and checks what takes a
//    parent: key ranges, equal depth, fill, cycles.
//
// A node that cannot be understood is reported once and then left out: nothing is concluded from
// what may or may not be below it.

extension MetadataCheck {
    /// Which tree: what its leaves hold.
    struct TreeKind {
        var role: Role
        var leafValueSize: Int

        static let mapping = TreeKind(role: .mapping, leafValueSize: 8)
        static let topLevel = TreeKind(role: .topLevel, leafValueSize: 8)
        static let details = TreeKind(
            role: .details, leafValueSize: DeviceDetailsLayout.size)
        static let dataIndex = TreeKind(role: .dataIndex, leafValueSize: IndexEntryLayout.size)
        static let metadataOverflow = TreeKind(role: .metadataOverflow, leafValueSize: 4)
        static let dataOverflow = TreeKind(role: .dataOverflow, leafValueSize: 4)
    }

    struct TreeNode {
        static let unknownLevel = UInt8.max
        /// Deeper trees than this cannot come about; a level that reaches it stays there.
        static let levelLimit: UInt8 = 250

        enum State: UInt8 { case fresh, open, settled }

        var block: UInt32
        var entryCount: UInt16 = 0
        var minimum: UInt16 = 0
        /// Distance from the leaves.
        var level = Self.unknownLevel
        var state = State.fresh
        var isLeaf = false
        /// Could be read and understood.
        var isSound = false
        /// Its keys ascend, so that they can be compared with the neighbours'.
        var isOrdered = false
        /// So are all nodes below.
        var isComplete = false
        var fillReported = false
        var rangeReported = false
        var sharingReported = false
        /// Of the node itself.
        var firstKey: UInt64 = 0
        /// Of everything below.
        var lastKey: UInt64 = 0
        /// Leaf entries below.
        var mappings: UInt64 = 0
        /// Internal nodes: where their edges begin. Leaves: whatever the tree's owner wants.
        var start = 0
        /// Mapping trees: the newest time below.
        var maxTime: UInt32 = 0
        /// Mapping trees, for the sharing rule: how many devices see the node (2: several), and
        /// the one whose snapshotted_time is the least.
        var owners: UInt8 = 0
        var owner: UInt32 = 0
        var ownerTime: UInt32 = .max

        init(block: UInt64) { self.block = UInt32(block) }
    }

    final class TreeForest {
        /// No child: the pointer was refused.
        static let noNode = UInt32.max

        let kind: TreeKind
        private let reader: BlockReader
        private let claims: BlockClaims
        private let log: FindingLog
        var nodes: [TreeNode] = []
        private(set) var edgeKeys: [UInt64] = []
        private(set) var edgeChildren: [UInt32] = []
        private var nodeOfBlock: [UInt32: UInt32] = [:]
        /// Internal nodes, children before parents.
        private(set) var settledOrder: [UInt32] = []
        /// Called for every sound leaf: its bytes and its node, whose `start` and `maxTime` may be
        /// set. The keys' order is checked already.
        var visitLeaf: (UnsafeRawPointer, inout TreeNode) -> Void = { _, _ in }

        init(kind: TreeKind, reader: BlockReader, claims: BlockClaims, log: FindingLog) {
            self.kind = kind
            self.reader = reader
            self.claims = claims
            self.log = log
        }

        /// All nodes could be read and understood.
        private(set) var isComplete = true

        func node(of block: UInt64) -> TreeNode? {
            UInt32(exactly: block).flatMap { nodeOfBlock[$0] }.map { nodes[Int($0)] }
        }

        /// Reads the trees. `roots` are pointers: the block and where the pointer is.
        /// - Returns: the roots' nodes, `noNode` where the pointer was bad.
        func grow(roots: [(block: UInt64, from: UInt64)]) -> [UInt32] {
            var frontier: [UInt32] = []
            let rootNodes = roots.map { enter($0.block, from: $0.from, frontier: &frontier) }
            while !frontier.isEmpty {
                // By block: the high half sorts, the low half tells the node.
                var sorted = frontier.map { UInt64(nodes[Int($0)].block) << 32 | UInt64($0) }
                sorted.sort()
                frontier.removeAll(keepingCapacity: true)
                reader.forEach(sorted.map { $0 >> 32 }) { position, bytes in
                    let node = UInt32(truncatingIfNeeded: sorted[position])
                    visit(node, bytes, frontier: &frontier)
                }
            }
            settle(rootNodes)
            return rootNodes
        }

        /// Follows a pointer.
        private func enter(_ block: UInt64, from: UInt64, frontier: inout [UInt32]) -> UInt32 {
            switch claims.claim(block, as: kind.role, from: from) {
            case .refused:
                isComplete = false
                return Self.noNode
            case .again:
                return nodeOfBlock[UInt32(block)] ?? Self.noNode
            case .first:
                let index = UInt32(nodes.count)
                nodes.append(TreeNode(block: block))
                nodeOfBlock[UInt32(block)] = index
                frontier.append(index)
                return index
            }
        }

        private func visit(
            _ index: UInt32, _ bytes: UnsafeRawPointer?, frontier: inout [UInt32]
        ) {
            guard let bytes, understand(bytes, &nodes[Int(index)]) else {
                isComplete = false
                claims.isComplete = false
                return
            }
            guard !nodes[Int(index)].isLeaf else {
                visitLeaf(bytes, &nodes[Int(index)])
                return
            }
            let count = Int(nodes[Int(index)].entryCount)
            let values = NodeLayout.keys + 8 * Int(bytes.le32(NodeLayout.maxEntries))
            nodes[Int(index)].start = edgeKeys.count
            for i in 0..<count {
                edgeKeys.append(bytes.le64(NodeLayout.keys + 8 * i))
                let child = bytes.le64(values + 8 * i)
                edgeChildren.append(
                    enter(child, from: UInt64(nodes[Int(index)].block), frontier: &frontier))
            }
        }

        /// Checks the node by itself and fills in what it says.
        /// - Returns: false if nothing can be made of it.
        private func understand(_ bytes: UnsafeRawPointer, _ node: inout TreeNode) -> Bool {
            let block = UInt64(node.block)
            guard reader.verify(bytes, as: .node, number: block, role: kind.role),
                understandHeader(bytes, &node)
            else { return false }
            let count = Int(node.entryCount)
            node.isSound = true
            node.isComplete = true
            node.isOrdered = true
            if node.isLeaf {
                node.level = 0
                node.mappings = UInt64(count)
            }
            guard count > 0 else { return true }
            node.firstKey = bytes.le64(NodeLayout.keys)
            var previous = node.firstKey
            for i in 1..<max(1, count) {
                let key = bytes.le64(NodeLayout.keys + 8 * i)
                if key <= previous && node.isOrdered {
                    node.isOrdered = false
                    log.add(
                        .damage, .keyOrder, block: block,
                        "key \(key) follows key \(previous) in a \(kind.role.words)")
                }
                previous = key
            }
            node.lastKey = previous
            return true
        }

        private func understandHeader(_ bytes: UnsafeRawPointer, _ node: inout TreeNode) -> Bool {
            let block = UInt64(node.block)
            let flags = bytes.le32(NodeLayout.flags)
            let entryCount = bytes.le32(NodeLayout.entryCount)
            let maxEntries = bytes.le32(NodeLayout.maxEntries)
            let valueSize = bytes.le32(NodeLayout.valueSize)
            func refuse(_ what: String) -> Bool {
                log.add(.damage, .nodeHeader, block: block, what)
                return false
            }
            guard flags == NodeLayout.internalFlag || flags == NodeLayout.leafFlag else {
                return refuse("node flags \(flags) say neither internal (1) nor leaf (2)")
            }
            node.isLeaf = flags == NodeLayout.leafFlag
            let wanted = node.isLeaf ? kind.leafValueSize : NodeLayout.internalValueSize
            guard valueSize == UInt32(wanted) else {
                return refuse(
                    "value size is \(valueSize) in a \(kind.role.words), which has \(wanted)")
            }
            let capacity = NodeLayout.capacity(valueSize: wanted)
            let room = (Layout.blockSize - NodeLayout.keys) / (8 + wanted)
            guard maxEntries <= UInt32(room) else {
                log.add(
                    .damage, .maxEntries, block: block,
                    "max_entries is \(maxEntries), the block has room for \(capacity)")
                return false
            }
            guard entryCount <= maxEntries else {
                return refuse("\(entryCount) entries where at most \(maxEntries) may be")
            }
            if maxEntries != UInt32(capacity) {
                log.add(
                    maxEntries % 3 == 0 ? .suspicious : .damage, .maxEntries, block: block,
                    "max_entries is \(maxEntries) where every node of this kind has \(capacity)")
            }
            if bytes.le32(NodeLayout.valueSize + 4) != 0 {
                log.add(.suspicious, .unusedField, block: block, "the node's padding is not zero")
            }
            if !node.isLeaf && entryCount == 0 {
                log.add(.damage, .emptyInternalNode, block: block, "internal node without entries")
            }
            node.entryCount = UInt16(entryCount)
            node.minimum = UInt16(maxEntries / 3)
            return true
        }

        // MARK: - From the leaves up

        private func settle(_ roots: [UInt32]) {
            var stack: [(node: UInt32, next: Int)] = []
            for root in roots where root != Self.noNode {
                open(root, &stack)
                while let top = stack.last {
                    let node = nodes[Int(top.node)]
                    guard top.next < Int(node.entryCount) else {
                        finish(top.node)
                        stack.removeLast()
                        continue
                    }
                    stack[stack.count - 1].next += 1
                    let child = edgeChildren[node.start + top.next]
                    guard child != Self.noNode else { continue }
                    if nodes[Int(child)].state == .open {
                        edgeChildren[node.start + top.next] = Self.noNode
                        isComplete = false
                        claims.isComplete = false
                        log.add(
                            .damage, .usedTwice, block: UInt64(nodes[Int(child)].block),
                            "the node is below itself: block \(node.block) points back to it")
                    } else {
                        open(child, &stack)
                    }
                }
                checkRoot(root)
            }
        }

        private func open(_ index: UInt32, _ stack: inout [(node: UInt32, next: Int)]) {
            guard nodes[Int(index)].state == .fresh else { return }
            if nodes[Int(index)].isSound && !nodes[Int(index)].isLeaf {
                nodes[Int(index)].state = .open
                stack.append((index, 0))
            } else {
                nodes[Int(index)].state = .settled
            }
        }

        /// An internal node all of whose children are settled.
        private func finish(_ index: UInt32) {
            var node = nodes[Int(index)]
            let parent = node
            var mixedLevels = false
            for i in 0..<Int(node.entryCount) {
                let edge = node.start + i
                let childIndex = edgeChildren[edge]
                guard childIndex != Self.noNode, nodes[Int(childIndex)].isSound else {
                    node.isComplete = false
                    continue
                }
                let child = nodes[Int(childIndex)]
                checkFill(childIndex)
                checkRange(of: childIndex, edge: edge, in: parent)
                node.isComplete = node.isComplete && child.isComplete
                node.isOrdered = node.isOrdered && child.isOrdered
                node.maxTime = max(node.maxTime, child.maxTime)
                let (sum, overflow) = node.mappings.addingReportingOverflow(child.mappings)
                node.mappings = overflow ? .max : sum
                if child.entryCount > 0 { node.lastKey = max(node.lastKey, child.lastKey) }
                guard child.level != TreeNode.unknownLevel else { continue }
                let level = min(child.level + 1, TreeNode.levelLimit)
                mixedLevels =
                    mixedLevels || node.level != TreeNode.unknownLevel && node.level != level
                node.level = level
            }
            if mixedLevels {
                log.add(
                    .damage, .leafDepth, block: UInt64(node.block),
                    "the leaves below are not all at one depth")
                node.level = TreeNode.unknownLevel
            }
            node.state = .settled
            nodes[Int(index)] = node
            settledOrder.append(index)
        }

        private func checkFill(_ index: UInt32) {
            let node = nodes[Int(index)]
            guard node.entryCount < node.minimum, !node.fillReported else { return }
            nodes[Int(index)].fillReported = true
            log.add(
                .suspicious, .underfull, block: UInt64(node.block),
                "\(node.entryCount) entries where a \(kind.role.words) that is not a root has at "
                    + "least \(node.minimum)")
        }

        /// A child's keys have to lie between its own key in the parent and the next one.
        private func checkRange(of index: UInt32, edge: Int, in parent: TreeNode) {
            let child = nodes[Int(index)]
            guard parent.isOrdered, child.isOrdered, child.entryCount > 0, !child.rangeReported
            else { return }
            let low = edgeKeys[edge]
            let isLast = edge + 1 == parent.start + Int(parent.entryCount)
            if child.firstKey < low {
                nodes[Int(index)].rangeReported = true
                log.add(
                    .damage, .keyRange, block: UInt64(child.block),
                    "the first key is \(child.firstKey), but the parent, block \(parent.block), "
                        + "has \(low) for it: keys below that cannot be found")
            } else if !isLast, child.lastKey >= edgeKeys[edge + 1] {
                nodes[Int(index)].rangeReported = true
                log.add(
                    .damage, .keyRange, block: UInt64(child.block),
                    "keys go up to \(child.lastKey), but in the parent, block \(parent.block), "
                        + "the next child begins at \(edgeKeys[edge + 1])")
            }
        }

        private func checkRoot(_ index: UInt32) {
            let node = nodes[Int(index)]
            guard node.isSound, !node.isLeaf, node.entryCount == 1, !node.fillReported else {
                return
            }
            nodes[Int(index)].fillReported = true
            log.add(
                .suspicious, .singleChildRoot, block: UInt64(node.block),
                "an internal root with a single child: the child should be the root")
        }

        // MARK: - In the order of keys

        /// The sound leaves of one tree from left to right.
        func leaves(under root: UInt32) -> [UInt32] {
            guard root != Self.noNode else { return [] }
            var result: [UInt32] = []
            var seen: Set<UInt32> = []
            var stack = [root]
            while let index = stack.popLast() {
                let node = nodes[Int(index)]
                guard node.isSound, seen.insert(index).inserted else { continue }
                if node.isLeaf {
                    result.append(index)
                } else {
                    let edges = edgeChildren[node.start..<node.start + Int(node.entryCount)]
                    stack.append(contentsOf: edges.reversed().filter { $0 != Self.noNode })
                }
            }
            return result
        }
    }
}
