// A B-tree node in memory: the block exactly as on the device, seen through its fields.
//
// 1. Keys are strictly increasing; the first `count` keys and values are live.
// 2. Slots that these functions vacate are zeroed, so that equal trees are equal blocks.
// 3. Nothing here checks bounds against the disk: a node was verified when it was read.

import Glibc

/// Whose nodes they are. A frame carries its kind, so that a damaged pointer from one tree into
/// another is noticed although both nodes are well formed.
enum TreeKind: UInt8 {
    /// Device id -> root of its mapping tree.
    case topLevel
    /// Virtual block -> data block and time.
    case mapping
    /// Device id -> details.
    case details
    /// Bitmap number -> index entry of the data space map.
    case dataIndex
    /// Data block -> count, from 3 up.
    case dataOverflow
    /// Metadata block -> count, from 3 up.
    case metadataOverflow

    @inline(__always) var leaf: NodeGeometry {
        switch self {
        case .topLevel, .mapping: return .internalNode
        case .details: return NodeGeometry(capacity: 126, valueSize: 24)
        case .dataIndex: return NodeGeometry(capacity: 168, valueSize: 16)
        case .dataOverflow, .metadataOverflow: return NodeGeometry(capacity: 336, valueSize: 4)
        }
    }
}

/// How many entries a node has room for and where they are.
struct NodeGeometry: Equatable {
    let capacity: Int
    let valueSize: Int

    static var internalNode: NodeGeometry { NodeGeometry(capacity: 252, valueSize: 8) }

    /// A node other than a root has at least this many entries.
    @inline(__always) var minimum: Int { capacity / 3 }
    @inline(__always) var values: Int { NodeLayout.keys + 8 * capacity }
}

struct Node {
    let base: UnsafeMutableRawPointer

    /// Values of internal nodes, mapping leaves and top-level leaves.
    private static let wideValues = NodeLayout.keys + 8 * 252

    @inline(__always) init(_ base: UnsafeMutableRawPointer) { self.base = base }

    @inline(__always) var isLeaf: Bool { base.le32(NodeLayout.flags) == NodeLayout.leafFlag }
    @inline(__always) var block: UInt64 { base.le64(Layout.blocknr) }
    @inline(__always) var count: Int {
        get { Int(base.le32(NodeLayout.entryCount)) }
        nonmutating set { base.setLE32(NodeLayout.entryCount, UInt32(newValue)) }
    }
    @inline(__always) func geometry(_ kind: TreeKind) -> NodeGeometry {
        isLeaf ? kind.leaf : .internalNode
    }
    @inline(__always) func key(_ index: Int) -> UInt64 { base.le64(NodeLayout.keys + 8 * index) }
    @inline(__always) func setKey(_ index: Int, _ key: UInt64) {
        base.setLE64(NodeLayout.keys + 8 * index, key)
    }
    @inline(__always) var lastKey: UInt64 { key(count - 1) }

    /// An 8-byte value: a child's block, a mapping root, or a mapping.
    @inline(__always) func value(_ index: Int) -> UInt64 {
        base.le64(Self.wideValues + 8 * index)
    }
    @inline(__always) func setValue(_ index: Int, _ value: UInt64) {
        base.setLE64(Self.wideValues + 8 * index, value)
    }
    @inline(__always) func value(
        at index: Int, _ geometry: NodeGeometry
    ) -> UnsafeMutableRawPointer {
        base + geometry.values + geometry.valueSize * index
    }

    /// The last entry whose key is at most `key`; -1 if there is none.
    @inline(__always) func floorIndex(_ key: UInt64) -> Int {
        let keys = base + NodeLayout.keys
        var low = -1
        var high = count
        while high - low > 1 {
            let middle = (low + high) >> 1
            if keys.le64(8 * middle) <= key { low = middle } else { high = middle }
        }
        return low
    }
    /// The first entry whose key is at least `key`; `count` if there is none.
    @inline(__always) func ceilingIndex(_ key: UInt64) -> Int {
        let index = floorIndex(key)
        return index >= 0 && self.key(index) == key ? index : index + 1
    }
    func contains(_ key: UInt64) -> Bool {
        let index = floorIndex(key)
        return index >= 0 && self.key(index) == key
    }

    /// Makes the zeroed block an empty node.
    func initialize(block: UInt64, leaf: Bool, _ geometry: NodeGeometry) {
        base.setLE32(NodeLayout.flags, leaf ? NodeLayout.leafFlag : NodeLayout.internalFlag)
        base.setLE64(Layout.blocknr, block)
        base.setLE32(NodeLayout.entryCount, 0)
        base.setLE32(NodeLayout.maxEntries, UInt32(geometry.capacity))
        base.setLE32(NodeLayout.valueSize, UInt32(geometry.valueSize))
    }

    /// Inserts an entry before `index`. The node must have room.
    func insert(at index: Int, key: UInt64, value: UnsafeRawPointer, _ geometry: NodeGeometry) {
        let count = self.count
        assert(count < geometry.capacity && index <= count)
        let keys = base + NodeLayout.keys
        memmove(keys + 8 * (index + 1), keys + 8 * index, 8 * (count - index))
        let slot = self.value(at: index, geometry)
        let size = geometry.valueSize
        memmove(slot + size, slot, size * (count - index))
        setKey(index, key)
        memcpy(slot, value, size)
        self.count = count + 1
    }

    /// Removes the entries of `range`.
    func remove(_ range: Range<Int>, _ geometry: NodeGeometry) {
        let count = self.count
        assert(range.upperBound <= count)
        let keys = base + NodeLayout.keys
        memmove(
            keys + 8 * range.lowerBound, keys + 8 * range.upperBound,
            8 * (count - range.upperBound))
        memmove(
            value(at: range.lowerBound, geometry), value(at: range.upperBound, geometry),
            geometry.valueSize * (count - range.upperBound))
        truncate(to: count - range.count, geometry)
    }

    /// Drops the entries from `newCount` on and zeroes their slots.
    func truncate(to newCount: Int, _ geometry: NodeGeometry) {
        let dropped = count - newCount
        memset(base + NodeLayout.keys + 8 * newCount, 0, 8 * dropped)
        memset(value(at: newCount, geometry), 0, geometry.valueSize * dropped)
        count = newCount
    }

    /// Appends copies of `range` of another node's entries.
    func append(_ range: Range<Int>, of other: Node, _ geometry: NodeGeometry) {
        let count = self.count
        assert(count + range.count <= geometry.capacity)
        memcpy(
            base + NodeLayout.keys + 8 * count,
            other.base + NodeLayout.keys + 8 * range.lowerBound, 8 * range.count)
        memcpy(
            value(at: count, geometry), other.value(at: range.lowerBound, geometry),
            geometry.valueSize * range.count)
        self.count = count + range.count
    }

    /// Moves the first `moved` entries of `right` to the end of this node.
    func takeFirst(_ moved: Int, of right: Node, _ geometry: NodeGeometry) {
        append(0..<moved, of: right, geometry)
        right.remove(0..<moved, geometry)
    }

    /// Moves the last `moved` entries of `left` before this node's first.
    func takeLast(_ moved: Int, of left: Node, _ geometry: NodeGeometry) {
        let count = self.count
        let start = left.count - moved
        assert(count + moved <= geometry.capacity && start >= 0)
        let keys = base + NodeLayout.keys
        memmove(keys + 8 * moved, keys, 8 * count)
        memmove(value(at: moved, geometry), value(at: 0, geometry), geometry.valueSize * count)
        memcpy(keys, left.base + NodeLayout.keys + 8 * start, 8 * moved)
        memcpy(
            value(at: 0, geometry), left.value(at: start, geometry), geometry.valueSize * moved)
        self.count = count + moved
        left.truncate(to: start, geometry)
    }
}
