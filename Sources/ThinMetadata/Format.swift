// A new pool, and the one flag that is set outside of a transaction.
//
// 1. The superblock is written last, when all else is durable: a device whose formatting was cut
//    short is blank or what it was before, never half a pool.
// 2. Layout of a new pool: 1 index block, 2 metadata overflow root, metadata bitmaps, data bitmaps,
//    data index tree, data overflow root, top-level root, details root; all one after another.

import BlockIO

import Glibc

extension ThinMetadata {
    /// Writes an empty pool with room for `dataBlocks` blocks of `dataBlockSectors` sectors.
    public static func format(
        _ device: any BlockDevice, dataBlockSectors: UInt32, dataBlocks: UInt64
    ) throws(MetadataError) {
        if let reason = Superblock.illegalDataBlockSize(dataBlockSectors) {
            throw .unsupported(path: device.path, reason)
        }
        guard dataBlocks <= Mapping.maxBlock + 1 else {
            throw .unsupported(path: device.path, "a pool has at most 2^40 data blocks")
        }
        let blocks = min(device.size / UInt64(Layout.blockSize), Layout.maxMetadataBlocks)
        let plan = FormatPlan(metadataBlocks: blocks, dataBlocks: dataBlocks)
        guard plan.minimum <= blocks else {
            throw .unsupported(
                path: device.path,
                "metadata for \(dataBlocks) data blocks takes at least "
                    + "\(plan.minimum * 4) KiB; the device has \(blocks * 4) KiB")
        }
        let writer = FormatWriter(device)
        try plan.write(writer)
        try writer.finish()
        let superblock = plan.superblock(dataBlockSectors: dataBlockSectors)
        try superblock.write(to: device)
    }

    /// Sets or clears the superblock's needs_check flag, durably; changes nothing else.
    public static func setNeedsCheck(
        _ device: any BlockDevice, _ on: Bool
    ) throws(MetadataError) {
        let superblock = try Superblock(reading: device)
        superblock.needsCheck = on
        try superblock.write(to: device)
    }
}

extension Superblock {
    /// Seals, writes and flushes.
    fileprivate func write(to device: any BlockDevice) throws(MetadataError) {
        seal()
        do {
            try device.write(
                at: 0, from: UnsafeRawBufferPointer(start: bytes, count: Layout.blockSize))
            try device.flush()
        } catch {
            throw .device(error)
        }
    }
}

/// Writes blocks in ascending order, many at a time.
private final class FormatWriter {
    private static let batch = 256
    private let device: any BlockDevice
    private let buffer: UnsafeMutableRawPointer
    private var first: UInt64 = 1
    private var count = 0

    init(_ device: any BlockDevice) {
        self.device = device
        buffer = .allocate(byteCount: Self.batch * Layout.blockSize, alignment: Layout.blockSize)
    }
    deinit { buffer.deallocate() }

    /// The next block, zeroed for `fill`.
    func add(
        _ kind: BlockKind, fill: (UnsafeMutableRawPointer, UInt64) -> Void
    ) throws(MetadataError) {
        if count == Self.batch { try writeBatch() }
        let memory = buffer + count * Layout.blockSize
        memset(memory, 0, Layout.blockSize)
        let number = first + UInt64(count)
        fill(memory, number)
        memory.seal(as: kind, number: MetadataBlock(number))
        count += 1
    }

    private func writeBatch() throws(MetadataError) {
        do {
            try device.write(
                at: first * UInt64(Layout.blockSize),
                from: UnsafeRawBufferPointer(start: buffer, count: count * Layout.blockSize))
        } catch {
            throw .device(error)
        }
        first += UInt64(count)
        count = 0
    }

    func finish() throws(MetadataError) {
        if count > 0 { try writeBatch() }
        do { try device.flush() } catch { throw .device(error) }
    }
}

/// Where everything of a new pool goes.
private struct FormatPlan {
    let metadataBlocks: UInt64
    let dataBlocks: UInt64
    let metadataBitmaps: Int
    let dataBitmaps: Int
    /// Nodes of the data index tree by level, leaves first; the last level is the root.
    let indexLevels: [Int]

    /// Free blocks that the first transactions need at least.
    private var spare: UInt64 { ThinMetadata.leastReserve(dataBitmaps: dataBitmaps) + 32 }
    private static let indexBlock: UInt64 = 1
    private static let metadataOverflow: UInt64 = 2
    private static let firstMetadataBitmap: UInt64 = 3

    init(metadataBlocks: UInt64, dataBlocks: UInt64) {
        self.metadataBlocks = metadataBlocks
        self.dataBlocks = dataBlocks
        metadataBitmaps = SpaceMap.pages(for: metadataBlocks)
        dataBitmaps = SpaceMap.pages(for: dataBlocks)
        var levels = [Self.nodes(for: dataBitmaps, TreeKind.dataIndex.leaf.capacity)]
        while let last = levels.last, last > 1 {
            levels.append(Self.nodes(for: last, NodeGeometry.internalNode.capacity))
        }
        indexLevels = levels
    }

    private static func nodes(for entries: Int, _ capacity: Int) -> Int {
        max(1, (entries + capacity - 1) / capacity)
    }

    private var firstDataBitmap: UInt64 { Self.firstMetadataBitmap + UInt64(metadataBitmaps) }
    private var firstIndexNode: UInt64 { firstDataBitmap + UInt64(dataBitmaps) }
    private var dataOverflow: UInt64 { firstIndexNode + UInt64(indexLevels.reduce(0, +)) }
    private var topLevel: UInt64 { dataOverflow + 1 }
    private var details: UInt64 { dataOverflow + 2 }
    /// Blocks in use, the superblock included.
    private var used: UInt64 { dataOverflow + 3 }
    var minimum: UInt64 { used + spare }

    func write(_ writer: FormatWriter) throws(MetadataError) {
        try writer.add(.index) { memory, _ in fillIndexBlock(memory) }
        try writer.add(.node) { emptyLeaf($0, $1, .metadataOverflow) }
        for index in 0..<metadataBitmaps {
            try writer.add(.bitmap) { memory, _ in fillMetadataBitmap(memory, index) }
        }
        for _ in 0..<dataBitmaps { try writer.add(.bitmap) { _, _ in } }
        try writeIndexTree(writer)
        try writer.add(.node) { emptyLeaf($0, $1, .dataOverflow) }
        try writer.add(.node) { emptyLeaf($0, $1, .topLevel) }
        try writer.add(.node) { emptyLeaf($0, $1, .details) }
    }

    private func emptyLeaf(_ memory: UnsafeMutableRawPointer, _ block: UInt64, _ kind: TreeKind) {
        Node(memory).initialize(block: block, leaf: true, kind.leaf)
    }

    /// How many of the bitmap's entries are in use: the first `used` blocks are.
    private func usedEntries(_ index: Int) -> UInt64 {
        let perBitmap = UInt64(BitmapLayout.entriesPerBitmap)
        let base = UInt64(index) * perBitmap
        return used <= base ? 0 : min(perBitmap, used - base)
    }

    private func fillIndexBlock(_ memory: UnsafeMutableRawPointer) {
        for index in 0..<metadataBitmaps {
            let entry = memory + IndexBlockLayout.entries + IndexEntryLayout.size * index
            let used = UInt32(usedEntries(index))
            fillEntry(entry, Self.firstMetadataBitmap + UInt64(index), used)
        }
    }

    private func fillEntry(_ entry: UnsafeMutableRawPointer, _ block: UInt64, _ used: UInt32) {
        entry.setLE64(IndexEntryLayout.block, block)
        entry.setLE32(
            IndexEntryLayout.freeCount, UInt32(BitmapLayout.entriesPerBitmap) - used)
        entry.setLE32(IndexEntryLayout.noneFreeBefore, used)
    }

    private func fillMetadataBitmap(_ memory: UnsafeMutableRawPointer, _ index: Int) {
        for entry in 0..<Int(usedEntries(index)) {
            // Count 1: the high bit comes first.
            let offset = BitmapLayout.entries + entry / 4
            let byte = memory.load(fromByteOffset: offset, as: UInt8.self)
            memory.storeBytes(
                of: byte | 2 << UInt8(2 * (entry % 4)), toByteOffset: offset, as: UInt8.self)
        }
    }

    /// Entries are spread evenly over a level's nodes, so that none falls below a third.
    private func writeIndexTree(_ writer: FormatWriter) throws(MetadataError) {
        var below = dataBitmaps
        var firstBelow = firstDataBitmap
        /// Bitmaps under each node of the level below.
        var firstKeys = (0..<dataBitmaps).map { UInt64($0) }
        var firstNode = firstIndexNode
        for (level, nodes) in indexLevels.enumerated() {
            var keys: [UInt64] = []
            for place in 0..<nodes {
                let start = below * place / nodes
                let end = below * (place + 1) / nodes
                try writer.add(.node) { memory, block in
                    let node = Node(memory)
                    let geometry = level == 0 ? TreeKind.dataIndex.leaf : .internalNode
                    node.initialize(block: block, leaf: level == 0, geometry)
                    node.count = end - start
                    for child in start..<end {
                        node.setKey(child - start, firstKeys[child])
                        let value = node.value(at: child - start, geometry)
                        if level == 0 {
                            fillEntry(value, firstBelow + UInt64(child), 0)
                        } else {
                            value.setLE64(0, firstBelow + UInt64(child))
                        }
                    }
                }
                if start < end { keys.append(firstKeys[start]) }
            }
            below = nodes
            firstBelow = firstNode
            firstKeys = keys
            firstNode += UInt64(nodes)
        }
    }

    func superblock(dataBlockSectors: UInt32) -> Superblock {
        let superblock = Superblock()
        let bytes = superblock.bytes
        bytes.setLE64(SuperblockLayout.magic, SuperblockLayout.magicValue)
        bytes.setLE32(SuperblockLayout.version, SuperblockLayout.versionValue)
        superblock.dataSpaceMap = SpaceMapRoot(
            blockCount: dataBlocks, allocatedCount: 0, bitmapRoot: dataOverflow - 1,
            refCountRoot: dataOverflow)
        superblock.metadataSpaceMap = SpaceMapRoot(
            blockCount: metadataBlocks, allocatedCount: used, bitmapRoot: Self.indexBlock,
            refCountRoot: Self.metadataOverflow)
        superblock.mappingRoot = topLevel
        superblock.detailsRoot = details
        bytes.setLE32(SuperblockLayout.dataBlockSize, dataBlockSectors)
        bytes.setLE32(SuperblockLayout.metadataBlockSize, Layout.metadataBlockSectors)
        bytes.setLE64(SuperblockLayout.metadataBlockCount, metadataBlocks)
        return superblock
    }
}
