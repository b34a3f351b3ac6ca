// Builds metadata images node by node, so that a test knows where everything is, can share nodes
// as it likes and break one thing at a time. Written from the format's description alone: it uses
// the layout, but no code of the transactions nor of the check.

import BlockIO
import ThinMetadata

final class PoolImage: BlockDevice {
    let path = "pool image"
    var bytes: [UInt8]
    /// Blocks whose reads fail.
    var unreadable: Set<UInt64> = []
    var reads = 0

    private var next: UInt64 = 1
    private var counts: [UInt64: UInt32] = [0: 1]
    private var dataCounts: [UInt64: UInt32] = [:]

    struct Device {
        var id: UInt64
        var root: UInt64
        var mapped: UInt64
        var created: UInt32 = 0
        var snapshotted: UInt32 = 0
        var transaction: UInt64 = 0
    }

    /// Where things are, once `finish` is done.
    struct Places {
        var top: UInt64 = 0
        var details: UInt64 = 0
        var held: UInt64 = 0
        var index: UInt64 = 0
        var metadataBitmaps: [UInt64] = []
        var dataBitmaps: [UInt64] = []
        var dataIndex: UInt64 = 0
        var dataOverflow: UInt64 = 0
        var metadataOverflow: UInt64 = 0
    }
    var places = Places()

    init(blocks: Int) { bytes = Array(repeating: 0, count: blocks * Layout.blockSize) }
    init(bytes: [UInt8]) { self.bytes = bytes }
    init(copying other: PoolImage) {
        bytes = other.bytes
        places = other.places
        next = other.next
    }

    var blockCount: UInt64 { UInt64(bytes.count / Layout.blockSize) }
    /// The first block that the builder did not use.
    var firstFree: UInt64 { next }

    // MARK: - BlockDevice

    var size: UInt64 { UInt64(bytes.count) }
    func read(
        at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer
    ) throws(DeviceError) {
        reads += 1
        let blocks = offset / 4096..<(offset + UInt64(buffer.count) + 4095) / 4096
        guard offset + UInt64(buffer.count) <= size, !unreadable.contains(where: blocks.contains)
        else {
            throw DeviceError(
                operation: "read", path: path, offset: offset, code: 5, reason: "I/O error")
        }
        bytes.withUnsafeBytes {
            buffer.copyMemory(from: .init(rebasing: $0[Int(offset)..<Int(offset) + buffer.count]))
        }
    }
    func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        bytes.withUnsafeMutableBytes {
            UnsafeMutableRawBufferPointer(
                rebasing: $0[Int(offset)..<Int(offset) + buffer.count]
            ).copyMemory(from: buffer)
        }
    }
    func flush() throws(DeviceError) {}

    // MARK: - Editing

    func with<R>(_ block: UInt64, _ body: (UnsafeMutableRawPointer) -> R) -> R {
        bytes.withUnsafeMutableBytes { body($0.baseAddress! + Int(block) * Layout.blockSize) }
    }

    /// Changes a block and gives it the checksum that goes with it.
    func edit(_ block: UInt64, as kind: BlockKind, _ body: (UnsafeMutableRawPointer) -> Void) {
        with(block) {
            body($0)
            $0.setLE32(0, UnsafeRawPointer($0).checksum(as: kind))
        }
    }

    func value(_ block: UInt64, _ index: Int) -> UInt64 {
        with(block) { $0.le64(32 + 8 * Int($0.le32(NodeLayout.maxEntries)) + 8 * index) }
    }
    func setValue(_ block: UInt64, _ index: Int, _ value: UInt64) {
        edit(block, as: .node) {
            $0.setLE64(32 + 8 * Int($0.le32(NodeLayout.maxEntries)) + 8 * index, value)
        }
    }
    func setKey(_ block: UInt64, _ index: Int, _ key: UInt64) {
        edit(block, as: .node) { $0.setLE64(32 + 8 * index, key) }
    }
    func setSuperblock32(_ offset: Int, _ value: UInt32) {
        edit(0, as: .superblock) { $0.setLE32(offset, value) }
    }
    func setSuperblock64(_ offset: Int, _ value: UInt64) {
        edit(0, as: .superblock) { $0.setLE64(offset, value) }
    }

    /// Sets a bitmap entry and nothing else.
    func setBits(_ bitmap: UInt64, _ entry: Int, _ count: UInt8) {
        edit(bitmap, as: .bitmap) { Self.setBits($0, entry, count) }
    }
    private static func setBits(_ block: UnsafeMutableRawPointer, _ entry: Int, _ count: UInt8) {
        let place = BitmapLayout.entries + entry / 4
        let shift = UInt8(2 * (entry % 4))
        var byte = block.load(fromByteOffset: place, as: UInt8.self)
        byte &= ~(3 << shift)
        byte |= (count >> 1 & 1) << shift | (count & 1) << (shift + 1)
        block.storeBytes(of: byte, toByteOffset: place, as: UInt8.self)
    }

    /// Changes nr_free and nr_allocated as if `change` blocks had been taken.
    func takeMetadata(_ change: Int) {
        edit(places.index, as: .index) { block in
            let place = IndexBlockLayout.entries + IndexEntryLayout.freeCount
            block.setLE32(place, UInt32(Int(block.le32(place)) - change))
        }
        changeAllocated(SuperblockLayout.metadataSpaceMapRoot, change)
    }
    func takeData(_ change: Int) {
        edit(places.dataIndex, as: .node) { block in
            let place = 32 + 8 * 168 + IndexEntryLayout.freeCount
            block.setLE32(place, UInt32(Int(block.le32(place)) - change))
        }
        changeAllocated(SuperblockLayout.dataSpaceMapRoot, change)
    }
    private func changeAllocated(_ root: Int, _ change: Int) {
        edit(0, as: .superblock) { block in
            let place = root + SpaceMapRootLayout.allocatedCount
            block.setLE64(place, UInt64(Int(block.le64(place)) + change))
        }
    }

    // MARK: - Nodes and trees

    private func allocate() -> UInt64 {
        precondition(next < blockCount)
        defer { next += 1 }
        return next
    }
    private func refer(to block: UInt64) { counts[block, default: 0] += 1 }

    @discardableResult
    private func write(
        leaf: Bool, keys: ArraySlice<UInt64>, valueSize: Int, block: UInt64? = nil,
        _ value: (UnsafeMutableRawPointer, Int) -> Void
    ) -> UInt64 {
        let block = block ?? allocate()
        let capacity = NodeLayout.capacity(valueSize: valueSize)
        precondition(keys.count <= capacity)
        with(block) { node in
            node.setLE32(NodeLayout.flags, leaf ? 2 : 1)
            node.setLE32(NodeLayout.entryCount, UInt32(keys.count))
            node.setLE32(NodeLayout.maxEntries, UInt32(capacity))
            node.setLE32(NodeLayout.valueSize, UInt32(valueSize))
            for (i, key) in keys.enumerated() {
                node.setLE64(32 + 8 * i, key)
                value(node + 32 + 8 * capacity + i * valueSize, keys.startIndex + i)
            }
            node.seal(as: .node, number: MetadataBlock(block))
        }
        return block
    }

    func internalNode(_ children: [(key: UInt64, block: UInt64)]) -> UInt64 {
        for child in children { refer(to: child.block) }
        return write(leaf: false, keys: children.map(\.key)[...], valueSize: 8) {
            $0.setLE64(0, children[$1].block)
        }
    }

    typealias Entry = (key: UInt64, block: UInt64, time: UInt32)

    func mappingLeaf(_ entries: [Entry]) -> UInt64 {
        for entry in entries { dataCounts[entry.block, default: 0] += 1 }
        return write(leaf: true, keys: entries.map(\.key)[...], valueSize: 8) {
            $0.setLE64(0, entries[$1].block << 24 | UInt64(entries[$1].time))
        }
    }

    /// A tree over leaves of about `perNode` entries each, made by `leaf` from a range of the keys.
    private func tree(
        keys: [UInt64], perNode: Int, leaf: (Range<Int>) -> UInt64
    ) -> UInt64 {
        func slices(_ count: Int, _ size: Int) -> [Range<Int>] {
            let parts = max(1, (count + size - 1) / size)
            return (0..<parts).map { count * $0 / parts..<count * ($0 + 1) / parts }
        }
        var level = slices(keys.count, perNode).map {
            (key: $0.isEmpty ? 0 : keys[$0.lowerBound], block: leaf($0))
        }
        while level.count > 1 {
            level = slices(level.count, 168).map {
                (key: level[$0.lowerBound].key, block: internalNode(Array(level[$0])))
            }
        }
        return level[0].block
    }

    func mappingTree(_ entries: [Entry], perLeaf: Int = 100) -> UInt64 {
        tree(keys: entries.map(\.key), perNode: perLeaf) { mappingLeaf(Array(entries[$0])) }
    }

    private func tree<V>(
        _ entries: [(UInt64, V)], valueSize: Int, set: (UnsafeMutableRawPointer, V) -> Void
    ) -> UInt64 {
        let keys = entries.map(\.0)
        return tree(keys: keys, perNode: NodeLayout.capacity(valueSize: valueSize) * 3 / 4) {
            write(leaf: true, keys: keys[$0], valueSize: valueSize) { set($0, entries[$1].1) }
        }
    }

    func topLevel(_ devices: [Device]) -> UInt64 {
        for device in devices { refer(to: device.root) }
        return tree(devices.map { ($0.id, $0.root) }, valueSize: 8) { $0.setLE64(0, $1) }
    }

    func details(_ devices: [Device]) -> UInt64 {
        tree(devices.map { ($0.id, $0) }, valueSize: DeviceDetailsLayout.size) {
            $0.setLE64(DeviceDetailsLayout.mappedBlocks, $1.mapped)
            $0.setLE64(DeviceDetailsLayout.transactionID, $1.transaction)
            $0.setLE32(DeviceDetailsLayout.creationTime, $1.created)
            $0.setLE32(DeviceDetailsLayout.snapshottedTime, $1.snapshotted)
        }
    }

    // MARK: - Space maps and superblock

    struct Held {
        var top: UInt64
        var details: UInt64
        var time: UInt32
        var transaction: UInt64
    }

    /// Writes both space maps and the superblock.
    func finish(
        top: UInt64, details: UInt64, held: Held? = nil, time: UInt32, transaction: UInt64 = 7,
        dataBlocks: UInt64
    ) {
        let metadataBlocks = blockCount
        places.top = top
        places.details = details
        refer(to: top)
        refer(to: details)
        if let held {
            places.held = allocate()
            refer(to: places.held)
            refer(to: held.top)
            refer(to: held.details)
            let number = MetadataBlock(places.held)
            with(places.held) {
                Self.superblock($0, time: held.time, transaction: held.transaction)
                $0.setLE64(SuperblockLayout.dataMappingRoot, held.top)
                $0.setLE64(SuperblockLayout.deviceDetailsRoot, held.details)
                $0.setLE64(SuperblockLayout.metadataBlockCount, metadataBlocks)
                $0.seal(as: .superblock, number: number)
            }
        }
        let dataAllocated = writeDataMap(blocks: dataBlocks)
        let metadataAllocated = writeMetadataMap()
        with(0) {
            Self.superblock($0, time: time, transaction: transaction)
            $0.setLE64(SuperblockLayout.heldRoot, places.held)
            $0.setLE64(SuperblockLayout.dataMappingRoot, top)
            $0.setLE64(SuperblockLayout.deviceDetailsRoot, details)
            $0.setLE64(SuperblockLayout.metadataBlockCount, metadataBlocks)
            let roots = [
                (dataBlocks, dataAllocated, places.dataIndex, places.dataOverflow),
                (metadataBlocks, metadataAllocated, places.index, places.metadataOverflow),
            ]
            for (i, root) in roots.enumerated() {
                let place = SuperblockLayout.dataSpaceMapRoot + 128 * i
                $0.setLE64(place, root.0)
                $0.setLE64(place + 8, UInt64(root.1))
                $0.setLE64(place + 16, root.2)
                $0.setLE64(place + 24, root.3)
            }
            $0.seal(as: .superblock, number: MetadataBlock(0))
        }
    }

    private static func superblock(
        _ block: UnsafeMutableRawPointer, time: UInt32, transaction: UInt64
    ) {
        block.setLE64(SuperblockLayout.magic, SuperblockLayout.magicValue)
        block.setLE32(SuperblockLayout.version, 2)
        block.setLE32(SuperblockLayout.time, time)
        block.setLE64(SuperblockLayout.transactionID, transaction)
        block.setLE32(SuperblockLayout.dataBlockSize, 128)
        block.setLE32(SuperblockLayout.metadataBlockSize, 8)
    }

    private func writeDataMap(blocks: UInt64) -> Int {
        let bitmaps = Int((blocks + 16_319) / 16_320)
        places.dataBitmaps = (0..<bitmaps).map { _ in allocate() }
        for bitmap in places.dataBitmaps { refer(to: bitmap) }
        let entries = places.dataBitmaps.enumerated().map { i, block in
            (UInt64(i), bitmap(block, number: UInt64(i), counts: dataCounts))
        }
        places.dataIndex = tree(entries, valueSize: 16) { Self.indexEntry($0, $1) }
        places.dataOverflow = overflow(dataCounts)
        refer(to: places.dataIndex)
        refer(to: places.dataOverflow)
        return dataCounts.count
    }

    private func writeMetadataMap() -> Int {
        // What follows has count 1 each and so changes nothing in the overflow tree.
        places.metadataOverflow = overflow(counts)
        refer(to: places.metadataOverflow)
        let bitmaps = Int((blockCount + 16_319) / 16_320)
        places.index = allocate()
        refer(to: places.index)
        places.metadataBitmaps = (0..<bitmaps).map { _ in allocate() }
        for bitmap in places.metadataBitmaps { refer(to: bitmap) }
        let entries = places.metadataBitmaps.enumerated().map {
            bitmap($1, number: UInt64($0), counts: counts)
        }
        with(places.index) { block in
            for (i, entry) in entries.enumerated() {
                Self.indexEntry(block + IndexBlockLayout.entries + 16 * i, entry)
            }
            block.seal(as: .index, number: MetadataBlock(places.index))
        }
        return counts.count
    }

    private func overflow(_ counts: [UInt64: UInt32]) -> UInt64 {
        let many = counts.filter { $0.value > 2 }.sorted { $0.key < $1.key }
        return tree(many.map { ($0.key, $0.value) }, valueSize: 4) { $0.setLE32(0, $1) }
    }

    // MARK: - Counting again

    /// Makes both space maps what a changed tree asks for. The counts of 3 and more have to fit
    /// one leaf, as in the sample pools.
    func recount() {
        counts = [0: 1, places.index: 1]
        dataCounts = [:]
        var roots = [places.top, places.details]
        if places.held != 0 {
            refer(to: places.held)
            roots += [320, 328].map { place in with(places.held) { $0.le64(place) } }
        }
        for block in places.metadataBitmaps + places.dataBitmaps { refer(to: block) }
        for root in [places.dataIndex, places.dataOverflow, places.metadataOverflow] {
            refer(to: root)
        }
        for (i, root) in roots.enumerated() {
            refer(to: root)
            if counts[root] == 1 { count(root, isTop: i % 2 == 0, isDetails: i % 2 == 1) }
        }
        setOverflows(places.dataOverflow, dataCounts.filter { $0.value > 2 })
        setOverflows(places.metadataOverflow, counts.filter { $0.value > 2 })
        for (i, block) in places.dataBitmaps.enumerated() {
            let entry = bitmap(block, number: UInt64(i), counts: dataCounts)
            editDataIndex(i) { Self.indexEntry($0, entry) }
        }
        for (i, block) in places.metadataBitmaps.enumerated() {
            let entry = bitmap(block, number: UInt64(i), counts: counts)
            edit(places.index, as: .index) {
                Self.indexEntry($0 + IndexBlockLayout.entries + 16 * i, entry)
            }
        }
        setSuperblock64(SuperblockLayout.dataSpaceMapRoot + 8, UInt64(dataCounts.count))
        setSuperblock64(SuperblockLayout.metadataSpaceMapRoot + 8, UInt64(counts.count))
    }

    private func count(_ node: UInt64, isTop: Bool, isDetails: Bool) {
        let isLeaf = with(node) { $0.le32(NodeLayout.flags) } == 2
        guard !isLeaf || !isDetails else { return }
        for i in 0..<entries(node) {
            let value = value(node, i)
            if isLeaf && !isTop {
                dataCounts[value >> 24, default: 0] += 1
                continue
            }
            refer(to: value)
            if counts[value] == 1 {
                count(value, isTop: isTop && !isLeaf, isDetails: isDetails)
            }
        }
    }

    /// How many mappings a mapping tree has.
    func mapped(under node: UInt64) -> UInt64 {
        guard with(node, { $0.le32(NodeLayout.flags) }) != 2 else { return UInt64(entries(node)) }
        return (0..<entries(node)).reduce(0) { $0 + mapped(under: value(node, $1)) }
    }

    private struct IndexEntry { var block: UInt64, free: UInt32, hint: UInt32 }

    private static func indexEntry(_ place: UnsafeMutableRawPointer, _ entry: IndexEntry) {
        place.setLE64(0, entry.block)
        place.setLE32(8, entry.free)
        place.setLE32(12, entry.hint)
    }

    private func bitmap(
        _ block: UInt64, number: UInt64, counts: [UInt64: UInt32]
    ) -> IndexEntry {
        var entry = IndexEntry(block: block, free: 0, hint: 16_320)
        with(block) { bytes in
            for i in 0..<16_320 {
                let count = counts[number * 16_320 + UInt64(i), default: 0]
                if count == 0 {
                    entry.free += 1
                    entry.hint = min(entry.hint, UInt32(i))
                }
                Self.setBits(bytes, i, UInt8(min(count, 3)))
            }
            bytes.seal(as: .bitmap, number: MetadataBlock(block))
        }
        return entry
    }
}
