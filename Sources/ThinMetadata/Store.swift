// The blocks of the open transaction: node cache, both space maps, and the rules that tie them.
//
// 1. A block of the committed state, or of the state being committed, is never written to. A node
//    is changed in place only if it was allocated in the open transaction and has one reference;
//    else it is shadowed: copied to a new block.
// 2. A metadata block's count is the number of pointers to it; a data block's count is the number
//    of mapping-leaf entries that refer to it.
// 3. A block whose count falls to 0 is busy until the transaction that freed it is durable, except
//    a metadata block allocated in the open transaction, which nobody else has seen.
// 4. The nodes of the metadata space map's overflow tree have count 1 always. So changing that
//    tree never changes a count of 3 or more, and the recursion between trees and counts ends.

import BlockIO

import Glibc

/// Why a data block lost its last reference.
enum FreedBy {
    case discard
    case replacement
}

final class Store {
    let cache: NodeCache
    let metadata: SpaceMap
    let data: SpaceMap

    /// Metadata blocks that the open transaction freed and that an older state may use.
    var quarantine: [UInt64] = []
    var discarded: [DataBlock] = []
    var replaced: [DataBlock] = []
    /// A count was lowered from more than 1 to something still above 0 in the open transaction:
    /// a count of 1 does not prove that it is 1 in the committed state, too.
    var hasUnshared = false

    init(cache: NodeCache, metadata: SpaceMap, data: SpaceMap) {
        self.cache = cache
        self.metadata = metadata
        self.data = data
    }

    // MARK: Metadata blocks

    /// A free metadata block, with count 1 now. Whoever needs some has asked before whether there are
    /// enough (`requireSpace`): what has begun cannot be tried again, so to find none is damage.
    func allocateBlock() throws(MetadataError) -> UInt64 {
        guard let block = try metadata.findFree() else {
            throw .corrupt(
                block: MetadataBlock(metadata.indexRoot),
                "the metadata space map has fewer free blocks than its index says")
        }
        try metadata.setShortCount(block, 1)
        return block
    }

    /// A new node with undefined contents.
    private func allocateNode(_ kind: TreeKind) throws(MetadataError) -> (UInt64, Node) {
        let block = try allocateBlock()
        return (block, try cache.create(block, kind))
    }

    /// A new empty node.
    func makeNode(_ kind: TreeKind, leaf: Bool) throws(MetadataError) -> Node {
        let (block, node) = try allocateNode(kind)
        memset(node.base, 0, Layout.blockSize)
        node.initialize(block: block, leaf: leaf, leaf ? kind.leaf : .internalNode)
        return node
    }

    /// The node, to be changed: itself, or a copy that takes over the caller's reference.
    @inline(__always) func shadow(
        _ block: UInt64, _ kind: TreeKind
    ) throws(MetadataError) -> Node {
        let node = try cache.node(block, kind)
        let count = try metadata.shortCount(block)
        if count == 1 && cache.isOpen(block) { return node }
        return try copy(node, block, kind, count)
    }

    @inline(never) private func copy(
        _ node: Node, _ block: UInt64, _ kind: TreeKind, _ count: UInt32
    ) throws(MetadataError) -> Node {
        guard count > 0 else {
            throw .corrupt(block: MetadataBlock(block), "a node in use has reference count 0")
        }
        guard count == 1 || kind != .metadataOverflow else {
            throw .corrupt(
                block: MetadataBlock(block), "an unshareable node has reference count \(count)")
        }
        let (target, copy) = try allocateNode(kind)
        memcpy(copy.base, node.base, Layout.blockSize)
        copy.base.setLE64(Layout.blocknr, target)
        if count > 1 { try addReferences(ofEntries: copy, kind) }
        try release(block)
        return copy
    }

    /// One more reference for each thing the node's entries refer to.
    func addReferences(ofEntries node: Node, _ kind: TreeKind) throws(MetadataError) {
        if !node.isLeaf || kind == .topLevel {
            for index in 0..<node.count { try retain(node.value(index)) }
        } else if kind == .mapping {
            for index in 0..<node.count {
                try retainData(Mapping(rawValue: node.value(index)).block)
            }
        }
    }
}
