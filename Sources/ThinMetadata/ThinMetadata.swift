// The open transaction over one dm-thin metadata device.
//
// 1. Not thread-safe: every call is made under the pool's lock, except what FrozenTransaction says
//    about itself. Reads of metadata blocks are synchronous; nothing is written here but by
//    `format` and `setNeedsCheck`.
// 2. A call that finds its precondition unmet (no such device, no space) changes nothing. After any
//    other error of a changing call the object is of no use: drop it and open the pool anew, which
//    gives the last committed state.
// 3. At most one frozen transaction is under way. What is freed comes back only when the
//    transaction that freed it is durable, so `outOfMetadataSpace` may pass with the next commit.
// 4. The order of the commit is the caller's: data flush and metadata blocks, metadata flush, then
//    the superblock alone, flush, then `committed`.

import BlockIO

/// A thin device's numbers as the details tree has them.
public struct DeviceDetails: Equatable, Sendable {
    /// Entries of the mapping tree.
    public var mappedBlocks: UInt64
    /// The pool's transaction id when the device was made.
    public var transactionID: UInt64
    public var creationTime: UInt32
    /// Mappings with an earlier time are treated as shared.
    public var snapshottedTime: UInt32

    public init(
        mappedBlocks: UInt64, transactionID: UInt64, creationTime: UInt32, snapshottedTime: UInt32
    ) {
        self.mappedBlocks = mappedBlocks
        self.transactionID = transactionID
        self.creationTime = creationTime
        self.snapshottedTime = snapshottedTime
    }
}

public final class ThinMetadata {
    let device: any BlockDevice
    let superblock: Superblock
    let store: Store
    /// Soft bound on metadata blocks held in memory.
    public let cacheBlocks: Int

    var records: [ThinDeviceID: DeviceRecord] = [:]
    var lastRecord: DeviceRecord?
    /// Devices whose details differ from the details tree, in the order in which they changed.
    var dirtyRecords: [DeviceRecord] = []
    /// Number of the open transaction, from 1, in memory only.
    var openTransaction: UInt64 = 1
    var frozen: FrozenTransaction?
    /// A count was lowered from more than 1 in the transaction being committed.
    var hasUnsharedInFrozen = false
    var isChanged = false
    /// How often metadata blocks that were freed have become allocatable.
    public internal(set) var blockReuses: UInt64 = 0
    /// Readers of a committed state, and the metadata blocks that wait for them to end.
    var pins = 0
    var pinnedQuarantine: [UInt64] = []
    /// How often pins were broken.
    var pinGeneration: UInt64 = 0

    /// Opens the pool's last committed state.
    public init(_ device: any BlockDevice, cacheBlocks: Int) throws(MetadataError) {
        let superblock = try Superblock(reading: device)
        let path = device.path
        let metadataRoot = superblock.metadataSpaceMap
        let dataRoot = superblock.dataSpaceMap
        guard metadataRoot.blockCount <= Layout.maxMetadataBlocks, metadataRoot.blockCount > 0
        else {
            throw .corrupt(
                block: MetadataBlock(0), "a metadata space map of \(metadataRoot.blockCount) blocks"
            )
        }
        guard device.size / UInt64(Layout.blockSize) >= metadataRoot.blockCount else {
            throw .unsupported(
                path: path,
                "the device has \(device.size / UInt64(Layout.blockSize)) metadata blocks, "
                    + "the pool \(metadataRoot.blockCount); it was cut short")
        }
        guard dataRoot.blockCount <= Mapping.maxBlock + 1 else {
            throw .corrupt(
                block: MetadataBlock(0), "a data space map of \(dataRoot.blockCount) blocks")
        }
        // A wider one would not fit a mapping.
        guard superblock.time <= Mapping.maxTime else {
            throw .corrupt(block: MetadataBlock(0), "its time, \(superblock.time), is too late")
        }
        let roots = [
            metadataRoot.bitmapRoot, metadataRoot.refCountRoot, dataRoot.bitmapRoot,
            dataRoot.refCountRoot, superblock.mappingRoot, superblock.detailsRoot,
        ]
        guard roots.allSatisfy({ $0 > 0 && $0 < metadataRoot.blockCount }) else {
            throw .corrupt(block: MetadataBlock(0), "a root lies outside the device")
        }
        let cache = NodeCache(
            device, metadataLimit: metadataRoot.blockCount, bound: max(1, cacheBlocks))
        cache.dataLimit = dataRoot.blockCount
        let metadata = try SpaceMap(
            device, blockCount: metadataRoot.blockCount, indexRoot: metadataRoot.bitmapRoot,
            overflowRoot: metadataRoot.refCountRoot,
            entries: try Self.readIndexBlock(
                device, metadataRoot.bitmapRoot, metadataRoot.blockCount))
        let data = try SpaceMap(
            device, blockCount: dataRoot.blockCount, indexRoot: dataRoot.bitmapRoot,
            overflowRoot: dataRoot.refCountRoot,
            entries: try Self.readIndexTree(cache, dataRoot.bitmapRoot, dataRoot.blockCount))
        self.device = device
        self.superblock = superblock
        self.cacheBlocks = cacheBlocks
        store = Store(cache: cache, metadata: metadata, data: data)
    }

    private typealias IndexEntry = (block: UInt64, freeCount: UInt32, noneFreeBefore: UInt32)

    private static func indexEntry(
        _ memory: UnsafeMutableRawPointer, in block: UInt64, limit: UInt64
    ) throws(MetadataError) -> IndexEntry {
        let bitmap = memory.le64(IndexEntryLayout.block)
        guard bitmap > 0 && bitmap < limit else {
            throw .corrupt(
                block: MetadataBlock(block), "a bitmap in block \(bitmap), outside the device")
        }
        return (
            bitmap, memory.le32(IndexEntryLayout.freeCount),
            memory.le32(IndexEntryLayout.noneFreeBefore)
        )
    }

    private static func readIndexBlock(
        _ device: any BlockDevice, _ block: UInt64, _ blockCount: UInt64
    ) throws(MetadataError) -> [IndexEntry] {
        let memory = UnsafeMutableRawPointer.allocate(
            byteCount: Layout.blockSize, alignment: Layout.blockSize)
        defer { memory.deallocate() }
        try readBlock(device, block, into: memory)
        try verifyHeader(memory, .index, block)
        var entries: [IndexEntry] = []
        for index in 0..<SpaceMap.pages(for: blockCount) {
            let entry = memory + IndexBlockLayout.entries + IndexEntryLayout.size * index
            entries.append(try indexEntry(entry, in: block, limit: blockCount))
        }
        return entries
    }

    private static func readIndexTree(
        _ cache: NodeCache, _ root: UInt64, _ blockCount: UInt64
    ) throws(MetadataError) -> [IndexEntry] {
        let expected = SpaceMap.pages(for: blockCount)
        var entries: [IndexEntry] = []
        try cache.forEachLeaf(root, .dataIndex) { leaf throws(MetadataError) in
            for index in 0..<leaf.count {
                guard leaf.key(index) == UInt64(entries.count), entries.count < expected else {
                    throw .corrupt(
                        block: MetadataBlock(leaf.block),
                        "bitmap \(leaf.key(index)) of the data space map, where "
                            + "\(entries.count) of \(expected) is due")
                }
                entries.append(
                    try indexEntry(
                        leaf.value(at: index, TreeKind.dataIndex.leaf), in: leaf.block,
                        limit: cache.metadataLimit))
            }
        }
        guard entries.count == expected else {
            throw .corrupt(
                block: MetadataBlock(root),
                "\(entries.count) bitmaps for \(blockCount) data blocks")
        }
        return entries
    }

    // MARK: The pool's numbers, with what the open transaction changed

    public var time: UInt32 { superblock.time }
    /// Owned by volume managers; kept as it is.
    public var transactionID: UInt64 { superblock.transactionID }
    public var dataBlockSectors: UInt32 { superblock.dataBlockSectors }
    /// The metadata snapshot's superblock copy, if one is held.
    public var heldRoot: MetadataBlock? {
        superblock.heldRoot == 0 ? nil : MetadataBlock(superblock.heldRoot)
    }
    public var needsCheck: Bool { superblock.needsCheck }

    public var dataBlocks: UInt64 { store.data.blockCount }
    /// Data blocks with a reference.
    public var dataBlocksUsed: UInt64 { store.data.allocatedBlocks }
    /// Data blocks that can be allocated now: not used, not reserved, not waiting for a commit.
    public var dataBlocksAvailable: UInt64 { store.data.availableBlocks }
    public var metadataBlocks: UInt64 { store.metadata.blockCount }
    /// Metadata blocks that can be allocated now, the reserve included.
    public var metadataBlocksFree: UInt64 { store.metadata.availableBlocks }
    public var metadataBlocksUsed: UInt64 { store.metadata.allocatedBlocks }
    /// Metadata blocks that nobody refers to any more but the states that are pinned.
    public var metadataBlocksPinned: UInt64 { UInt64(pinnedQuarantine.count) }

    /// Whether the open transaction differs from the last frozen one.
    public var hasChanges: Bool { isChanged }
    /// Metadata blocks that the next freeze would write, the superblock not counted.
    public var dirtyBlocks: Int {
        guard isChanged else { return 0 }
        return store.cache.openCount + store.data.dirtyPages.count
            + store.metadata.dirtyPages.count + 1
    }

    /// Brings the memory for unchanged metadata under its bound. Called between operations.
    public func trimCache() {
        // A bitmap takes two blocks: itself, and which of its blocks are busy.
        store.data.trim(bound: max(4, cacheBlocks / 4))
        store.cache.trim(taken: min(2 * store.data.loadedPages, cacheBlocks / 2))
    }

    func requireWritable() throws(MetadataError) {
        if needsCheck { throw .needsCheck(path: device.path) }
    }
}
