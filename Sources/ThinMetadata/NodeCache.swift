// The B-tree nodes in memory: a table from block number to a 4096-byte frame.
//
// 1. A frame's memory never moves, and no frame is taken away inside an operation: a node read
//    stays valid until `trim`, unless its block is freed.
// 2. A frame is clean (equal to the device), open (allocated in the open transaction) or frozen
//    (allocated in the transaction being committed). Only open frames are ever written to.
// 3. Every block is verified when it is read: checksum, place, geometry, order of keys, and that
//    its pointers lie inside the devices. What is in the cache can be trusted to be well formed,
//    not to be the right node: the tree code compares kinds and bounds depth and keys.
// 4. A block has an open frame if and only if it is a node allocated in the open transaction.

import BlockIO

import Glibc

/// So many frames or bitmaps in a row may turn out to be in use before trimming leaves off.
let trimPatience = 512

enum FrameState: UInt8 {
    case unused
    case clean
    case open
    case frozen
}

struct Frame {
    let memory: UnsafeMutableRawPointer
    var block: UInt64 = 0
    /// Place in the list of open frames.
    var openIndex: Int32 = -1
    var kind: TreeKind = .topLevel
    var state: FrameState = .unused
    var referenced = false
}

final class NodeCache {
    private static let framesPerSlab = 64

    let device: any BlockDevice
    /// Metadata blocks: what pointers to nodes have to be below.
    private(set) var metadataLimit: UInt64
    /// Data blocks: what mappings have to be below.
    var dataLimit: UInt64 = 0
    /// The soft bound on frames in use.
    let bound: Int

    /// For each metadata block its frame's index + 1, or 0. Zero pages cost nothing until touched.
    private var table: UnsafeMutablePointer<UInt32>
    private var frames: UnsafeMutablePointer<Frame>
    private var frameCount = 0
    private var frameCapacity: Int
    private var slabs: [UnsafeMutableRawPointer] = []
    private var unused: [UInt32] = []
    private var openFrames: [UInt32] = []
    private var frozenFrames: [UInt32] = []
    private var cleanCount = 0
    private var hand = 0

    init(_ device: any BlockDevice, metadataLimit: UInt64, bound: Int) {
        self.device = device
        self.metadataLimit = metadataLimit
        self.bound = bound
        table = Self.makeTable(metadataLimit)
        frameCapacity = 256
        frames = .allocate(capacity: frameCapacity)
    }

    deinit {
        for slab in slabs { slab.deallocate() }
        frames.deallocate()
        free(table)
    }

    private static func makeTable(_ limit: UInt64) -> UnsafeMutablePointer<UInt32> {
        guard let memory = calloc(Int(limit), MemoryLayout<UInt32>.stride) else {
            fatalError("no memory for the metadata cache's table")
        }
        return memory.bindMemory(to: UInt32.self, capacity: Int(limit))
    }

    func grow(metadataLimit limit: UInt64) {
        assert(limit >= metadataLimit)
        let larger = Self.makeTable(limit)
        memcpy(larger, table, Int(metadataLimit) * MemoryLayout<UInt32>.stride)
        free(table)
        table = larger
        metadataLimit = limit
    }

    var openCount: Int { openFrames.count }
    var framesInUse: Int { frameCount - unused.count }

    @inline(__always) private func find(_ block: UInt64) -> UnsafeMutablePointer<Frame>? {
        guard block < metadataLimit else { return nil }
        let slot = table[Int(block)]
        return slot == 0 ? nil : frames + Int(slot - 1)
    }

    /// Whether the block is a node allocated in the open transaction.
    @inline(__always) func isOpen(_ block: UInt64) -> Bool {
        guard let frame = find(block) else { return false }
        return frame.pointee.state == .open
    }

    /// The node in this block, read and verified if it is not in memory.
    @inline(__always) func node(
        _ block: UInt64, _ kind: TreeKind
    ) throws(MetadataError) -> Node {
        if let frame = find(block), frame.pointee.kind == kind {
            frame.pointee.referenced = true
            return Node(frame.pointee.memory)
        }
        return try readNode(block, kind)
    }

    @inline(never) private func readNode(
        _ block: UInt64, _ kind: TreeKind
    ) throws(MetadataError) -> Node {
        guard block > 0 && block < metadataLimit else {
            throw .corrupt(block: MetadataBlock(block), "a pointer leads outside the device")
        }
        if let frame = find(block) {
            throw .corrupt(
                block: MetadataBlock(block),
                "reached as a node of the \(kind) tree, but it is one of the "
                    + "\(frame.pointee.kind) tree")
        }
        let index = takeFrame()
        let memory = frames[Int(index)].memory
        do {
            try readBlock(device, block, into: memory)
            try verify(Node(memory), block, kind)
        } catch {
            unused.append(index)
            throw error
        }
        install(index, block, kind, .clean)
        cleanCount += 1
        return Node(memory)
    }

    func contains(_ block: UInt64) -> Bool { find(block) != nil }

    /// A node that somebody else has read, unless it is in memory or is none.
    func adopt(_ block: UInt64, _ contents: UnsafeRawPointer, _ kind: TreeKind) {
        guard block > 0 && block < metadataLimit, find(block) == nil else { return }
        let index = takeFrame()
        let memory = frames[Int(index)].memory
        memcpy(memory, contents, Layout.blockSize)
        do throws(MetadataError) { try verify(Node(memory), block, kind) } catch {
            unused.append(index)
            return
        }
        install(index, block, kind, .clean)
        cleanCount += 1
    }

    /// A frame for a block that was just allocated. Its contents are undefined.
    func create(_ block: UInt64, _ kind: TreeKind) throws(MetadataError) -> Node {
        if let stale = find(block) {
            guard stale.pointee.state == .clean else {
                throw .corrupt(
                    block: MetadataBlock(block), "its reference count is 0 although it is in use")
            }
            forget(block)
        }
        let index = takeFrame()
        install(index, block, kind, .open)
        frames[Int(index)].openIndex = Int32(openFrames.count)
        openFrames.append(index)
        return Node(frames[Int(index)].memory)
    }

    /// The block was freed: its frame, if it is clean or open, is given up. A frozen frame stays
    /// until its transaction is durable.
    func forget(_ block: UInt64) {
        guard let frame = find(block), frame.pointee.state != .frozen else { return }
        if frame.pointee.state == .open {
            let place = Int(frame.pointee.openIndex)
            let last = openFrames.removeLast()
            if place < openFrames.count {
                openFrames[place] = last
                frames[Int(last)].openIndex = Int32(place)
            }
        } else {
            cleanCount -= 1
        }
        discard(frame)
    }

    private func discard(_ frame: UnsafeMutablePointer<Frame>) {
        table[Int(frame.pointee.block)] = 0
        frame.pointee.state = .unused
        frame.pointee.openIndex = -1
        unused.append(UInt32(frame - frames))
    }

    private func install(_ index: UInt32, _ block: UInt64, _ kind: TreeKind, _ state: FrameState) {
        let frame = frames + Int(index)
        frame.pointee.block = block
        frame.pointee.kind = kind
        frame.pointee.state = state
        frame.pointee.referenced = true
        table[Int(block)] = index + 1
    }

    private func takeFrame() -> UInt32 {
        if let index = unused.popLast() { return index }
        let slab = UnsafeMutableRawPointer.allocate(
            byteCount: Self.framesPerSlab * Layout.blockSize, alignment: Layout.blockSize)
        slabs.append(slab)
        if frameCount + Self.framesPerSlab > frameCapacity {
            let larger = UnsafeMutablePointer<Frame>.allocate(capacity: 2 * frameCapacity)
            larger.moveInitialize(from: frames, count: frameCount)
            frames.deallocate()
            frames = larger
            frameCapacity *= 2
        }
        for place in 0..<Self.framesPerSlab {
            (frames + frameCount + place).initialize(
                to: Frame(memory: slab + place * Layout.blockSize))
        }
        // Last first, so that frames are used in the order of their memory.
        for place in (1..<Self.framesPerSlab).reversed() {
            unused.append(UInt32(frameCount + place))
        }
        frameCount += Self.framesPerSlab
        return UInt32(frameCount - Self.framesPerSlab)
    }

    /// Turns the open frames into frozen ones; answers them by ascending block.
    func freeze() -> [(block: UInt64, memory: UnsafeMutableRawPointer)] {
        assert(frozenFrames.isEmpty)
        frozenFrames = openFrames
        openFrames.removeAll()
        frozenFrames.sort { frames[Int($0)].block < frames[Int($1)].block }
        return frozenFrames.map { index in
            let frame = frames + Int(index)
            frame.pointee.state = .frozen
            frame.pointee.openIndex = -1
            return (frame.pointee.block, frame.pointee.memory)
        }
    }

    /// The frozen frames are on the device now.
    func committed() {
        for index in frozenFrames {
            frames[Int(index)].state = .clean
            cleanCount += 1
        }
        frozenFrames.removeAll()
    }

    /// Gives up clean frames that were not used lately until the bound is kept, or none is left.
    /// Where few can go, each call looks at some of them only and the next goes on from there.
    /// - Parameter taken: what something else has taken of the bound.
    func trim(taken: Int) {
        let bound = max(1, self.bound - taken)
        var patience = trimPatience
        while framesInUse > bound && cleanCount > 0 && patience > 0 {
            patience -= 1
            hand = hand + 1 < frameCount ? hand + 1 : 0
            let frame = frames + hand
            guard frame.pointee.state == .clean else { continue }
            if frame.pointee.referenced {
                frame.pointee.referenced = false
            } else {
                discard(frame)
                cleanCount -= 1
                patience = trimPatience
            }
        }
    }

    private func verify(
        _ node: Node, _ block: UInt64, _ kind: TreeKind
    ) throws(MetadataError) {
        let number = MetadataBlock(block)
        try verifyHeader(node.base, .node, block)
        let flags = node.base.le32(NodeLayout.flags)
        guard flags == NodeLayout.leafFlag || flags == NodeLayout.internalFlag else {
            throw .corrupt(block: number, "node flags are \(flags), neither leaf nor internal")
        }
        let geometry = node.geometry(kind)
        guard node.base.le32(NodeLayout.valueSize) == UInt32(geometry.valueSize),
            node.base.le32(NodeLayout.maxEntries) == UInt32(geometry.capacity)
        else {
            throw .corrupt(block: number, "node geometry is not that of the \(kind) tree")
        }
        let entries = node.base.le32(NodeLayout.entryCount)
        guard entries <= UInt32(geometry.capacity) else {
            throw .corrupt(
                block: number, "\(entries) entries in a node for \(geometry.capacity)")
        }
        guard flags == NodeLayout.leafFlag || entries > 0 else {
            throw .corrupt(block: number, "internal node without entries")
        }
        for index in 0..<Int(entries) {
            if index > 0 && node.key(index) <= node.key(index - 1) {
                throw .corrupt(block: number, "keys \(index - 1) and \(index) are not in order")
            }
            try verifyValue(node, index, kind, geometry, number)
        }
    }

    @inline(__always) private func verifyValue(
        _ node: Node, _ index: Int, _ kind: TreeKind, _ geometry: NodeGeometry,
        _ number: MetadataBlock
    ) throws(MetadataError) {
        if !node.isLeaf || kind == .topLevel || kind == .dataIndex {
            let pointer = node.value(at: index, geometry).le64(0)
            guard pointer > 0 && pointer < metadataLimit else {
                throw .corrupt(
                    block: number, "entry \(index) points to block \(pointer), outside the device")
            }
        } else if kind == .mapping {
            let block = Mapping(rawValue: node.value(index)).block
            guard block.rawValue < dataLimit else {
                throw .corrupt(
                    block: number,
                    "entry \(index) maps to data block \(block.rawValue), outside the device")
            }
        }
    }
}

/// Reads one block.
func readBlock(
    _ device: any BlockDevice, _ block: UInt64, into memory: UnsafeMutableRawPointer
) throws(MetadataError) {
    do {
        try device.read(
            at: block * UInt64(Layout.blockSize),
            into: UnsafeMutableRawBufferPointer(start: memory, count: Layout.blockSize))
    } catch {
        throw .device(error)
    }
}

/// Checksum and place of a block just read.
func verifyHeader(
    _ memory: UnsafeRawPointer, _ kind: BlockKind, _ block: UInt64
) throws(MetadataError) {
    guard memory.le32(Layout.csum) == memory.checksum(as: kind) else {
        throw .corrupt(block: MetadataBlock(block), "the checksum does not fit a \(kind)")
    }
    guard memory.le64(Layout.blocknr) == block else {
        throw .corrupt(
            block: MetadataBlock(block),
            "it says that it is block \(memory.le64(Layout.blocknr))")
    }
}
