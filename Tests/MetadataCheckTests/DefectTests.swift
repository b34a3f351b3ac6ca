// One defect an image: the check has to find that one, and nothing else. Where the real
// thin_check has a say, what it says is tested along.

import Testing
import ThinMetadata

/// What thin_check of both generations, 0.9.0 and 1.1.0, says of an image.
enum ThinCheckVerdict: Sendable { case accepts, refuses, onlyOldAccepts, onlyNewAccepts }

/// One way to break a pool.
struct Defect: Sendable, CustomTestStringConvertible {
    let name: String
    let held: SamplePool.Held
    /// The findings that have to come, as "severity kind".
    let expected: [String]
    /// What thin_check says. nil: the tools cannot be given such a device.
    let thinCheck: ThinCheckVerdict?
    let dataDeviceBlocks: UInt64?
    let make: @Sendable (SamplePool) -> Void

    var testDescription: String { name }

    init(
        _ name: String, _ expected: String..., thinCheck: ThinCheckVerdict? = nil,
        held: SamplePool.Held = .none, dataDeviceBlocks: UInt64? = nil,
        _ make: @escaping @Sendable (SamplePool) -> Void
    ) {
        self.name = name
        self.held = held
        self.expected = expected
        self.thinCheck = thinCheck
        self.dataDeviceBlocks = dataDeviceBlocks
        self.make = make
    }
}

@Suite struct DefectTests {
    @Test(arguments: superblockDefects + nodeDefects + deviceDefects)
    func isFoundAlone(_ defect: Defect) throws { try verify(defect) }

    @Test(arguments: countDefects + spaceMapDefects + heldDefects)
    func isFoundAloneInSpaceMaps(_ defect: Defect) throws { try verify(defect) }

    private func verify(_ defect: Defect) throws {
        let pool = SamplePool(held: defect.held)
        defect.make(pool)
        let report = pool.image.check(dataDeviceBlocks: defect.dataDeviceBlocks)
        let found = report.findings.map { "\($0.severity.rawValue) \($0.kind.rawValue)" }
        #expect(
            found.sorted() == defect.expected.sorted(), "\(report.findings.map(\.description))")
        guard let verdict = defect.thinCheck else { return }
        if Tools.haveThinTools {
            let accepted = verdict == .accepts || verdict == .onlyOldAccepts
            #expect(try Tools.thinCheckAccepts(pool.image) == accepted, "thin_check")
        }
        if let accepted = try Tools.newThinCheckAccepts(pool.image) {
            #expect(accepted == (verdict == .accepts || verdict == .onlyNewAccepts), "thin_check 1")
        }
        // The check is the strictest of all: it has something to say wherever they have.
        #expect(!report.isClean || verdict == .accepts)
    }

    /// Every kind of finding has a defect that leads to it.
    @Test func allKindsAreCovered() {
        let all =
            superblockDefects + nodeDefects + deviceDefects + countDefects + spaceMapDefects
            + heldDefects
        let covered = Set(
            all.flatMap(\.expected).map { String($0.split(separator: " ")[1]) })
        #expect(covered == Set(CheckFinding.Kind.allCases.map(\.rawValue)))
        for severity in CheckFinding.Severity.allCases {
            #expect(all.contains { $0.expected.contains { $0.hasPrefix(severity.rawValue) } })
        }
    }
}

// MARK: - Superblock

private let superblockDefects: [Defect] = [
    Defect("superblock checksum", "damage checksum", thinCheck: .refuses) {
        $0.image.with(0) { $0.setLE32(0, $0.le32(0) ^ 1) }
    },
    Defect("blank", "damage notAPool", thinCheck: .refuses) {
        $0.image.bytes.replaceSubrange(..<4096, with: repeatElement(0, count: 4096))
    },
    Defect("foreign", "damage notAPool", thinCheck: .refuses) {
        $0.image.bytes.replaceSubrange(..<4096, with: repeatElement(7, count: 4096))
    },
    Defect("magic", "damage magic", thinCheck: .accepts) {
        $0.image.setSuperblock64(SuperblockLayout.magic, 27_022_011)
    },
    Defect("superblock blocknr", "damage blockNumber", thinCheck: .accepts) {
        $0.image.setSuperblock64(8, 1)
    },
    Defect("version 1", "damage version", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.version, 1)
    },
    Defect("version 3", "damage version", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.version, 3)
    },
    Defect("uuid", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.uuid + 8, 1)
    },
    Defect("compat flags", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.compatFlags, 4)
    },
    Defect("compat-ro flags", "damage featureFlags", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.compatReadOnlyFlags, 1)
    },
    Defect("incompat flags", "damage featureFlags", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.incompatFlags, 1)
    },
    Defect("unknown flag", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.flags, 2)
    },
    Defect("metadata block size", "damage geometry", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.metadataBlockSize, 16)
    },
    Defect("metadata nr blocks too large", "suspicious geometry", thinCheck: .accepts) {
        $0.image.setSuperblock64(SuperblockLayout.metadataBlockCount, 1025)
    },
    Defect("metadata nr blocks zero", "suspicious geometry", thinCheck: .accepts) {
        $0.image.setSuperblock64(SuperblockLayout.metadataBlockCount, 0)
    },
    Defect("metadata nr blocks from before growing", thinCheck: .accepts) {
        $0.image.setSuperblock64(SuperblockLayout.metadataBlockCount, 512)
    },
    Defect("data block size", "damage geometry", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.dataBlockSize, 129)
    },
    Defect("after the superblock's end", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.setSuperblock32(364, 1)
    },
    Defect("after a space-map root's end", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.dataSpaceMapRoot + 32, 1)
    },
    Defect(
        "data device too small", "damage blockCount", thinCheck: .accepts, dataDeviceBlocks: 39_999
    ) { _ in },
    Defect("data device larger", thinCheck: .accepts, dataDeviceBlocks: 50_000) { _ in },
    Defect("metadata device too small", "damage blockCount", thinCheck: .accepts) {
        $0.image.bytes.removeLast(4096)
    },
    Defect("metadata device larger", thinCheck: .accepts) {
        $0.image.bytes += Array(repeating: 0, count: 4096 * 100)
    },
    Defect("pool time past 24 bits", "damage time", thinCheck: .accepts) {
        $0.image.setSuperblock32(SuperblockLayout.time, 1 << 24)
    },
]

// MARK: - Nodes

private let nodeDefects: [Defect] = [
    Defect("node checksum", "damage checksum", thinCheck: .refuses) {
        $0.image.with($0.leaves[1]) { $0.setLE32(4000, 1) }
    },
    Defect("node with a bitmap's checksum", "damage checksum", thinCheck: .refuses) {
        $0.image.edit($0.leaves[1], as: .bitmap) { _ in }
    },
    Defect("node blocknr", "damage blockNumber", thinCheck: .refuses) { pool in
        pool.image.edit(pool.leaves[1], as: .node) { $0.setLE64(8, pool.leaves[0]) }
    },
    Defect("unreadable node", "damage unreadable") {
        $0.image.unreadable = [$0.leaves[1]]
    },
    Defect("node flags", "damage nodeHeader", thinCheck: .refuses) {
        $0.image.edit($0.leaves[1], as: .node) { $0.setLE32(NodeLayout.flags, 3) }
    },
    Defect("value size", "damage nodeHeader", thinCheck: .refuses) {
        $0.image.edit($0.leaves[1], as: .node) { $0.setLE32(NodeLayout.valueSize, 16) }
    },
    Defect("more entries than there is room for", "damage nodeHeader", thinCheck: .refuses) {
        $0.image.edit($0.leaves[1], as: .node) { $0.setLE32(NodeLayout.entryCount, 253) }
    },
    Defect("max_entries too large for the block", "damage maxEntries", thinCheck: .refuses) {
        $0.image.edit($0.leaves[1], as: .node) { $0.setLE32(NodeLayout.maxEntries, 255) }
    },
    Defect("max_entries not a multiple of 3", "damage maxEntries", thinCheck: .refuses) { pool in
        shrink(pool, pool.leaves[1], maxEntries: 250)
    },
    Defect("max_entries 249", "suspicious maxEntries", thinCheck: .accepts) { pool in
        shrink(pool, pool.leaves[1], maxEntries: 249)
    },
    Defect("node padding", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.edit($0.leaves[1], as: .node) { $0.setLE32(28, 1) }
    },
    Defect("garbage in unused slots", thinCheck: .accepts) {
        $0.image.edit($0.leaves[1], as: .node) {
            $0.setLE64(32 + 8 * 200, 77)
            $0.setLE64(32 + 8 * 252 + 8 * 200, 77)
        }
    },
    Defect("keys out of order", "damage keyOrder", thinCheck: .refuses) {
        $0.image.setKey($0.leaves[1], 50, 0)
    },
    Defect("a key twice", "damage keyOrder", thinCheck: .refuses) {
        $0.image.setKey($0.leaves[1], 50, 200 + 2 * 49)
    },
    Defect("internal keys out of order", "damage keyOrder", thinCheck: .refuses) {
        $0.image.setKey($0.inner6[0], 5, 0)
    },
    Defect("internal key greater than the first key", "damage keyRange", thinCheck: .refuses) {
        $0.image.setKey($0.root5Internal, 1, 201)
    },
    Defect("internal key smaller than the first key", thinCheck: .accepts) {
        $0.image.setKey($0.root5Internal, 1, 199)
    },
    Defect("root key greater than the first key", "damage keyRange", thinCheck: .onlyNewAccepts) {
        $0.image.setKey($0.root6, 0, 11)
    },
    Defect("last key in the next sibling's range", "damage keyRange", thinCheck: .refuses) {
        $0.image.setKey($0.leaves[0], 99, 200)
    },
    Defect("last key of a subtree in the next one's range", "damage keyRange", thinCheck: .refuses)
    { pool in
        let last = pool.image.value(pool.inner6[0], pool.image.entries(pool.inner6[0]) - 1)
        pool.image.setKey(last, pool.image.entries(last) - 1, 1 << 20)
    },
    Defect("leaves at different depths", "damage leafDepth", thinCheck: .onlyOldAccepts) { pool in
        // A leaf of device 6 beside its internal nodes: the rest of the subtree is not looked for.
        let image = pool.image
        let leaf = image.value(pool.inner6[1], 0)
        image.setValue(pool.root6, 1, leaf)
        image.setMapped(6, image.mapped(under: pool.root6))
        image.recount()
    },
    Defect("83 of 252 entries", "suspicious underfull", thinCheck: .refuses) { pool in
        pool.image.cut(pool.leaves[1], to: 83)
        for device in 1...4 { pool.image.setMapped(device, 283) }
        pool.image.recount()
    },
    Defect("84 of 252 entries", thinCheck: .accepts) { pool in
        pool.image.cut(pool.leaves[1], to: 84)
        for device in 1...4 { pool.image.setMapped(device, 284) }
        pool.image.recount()
    },
    Defect("internal root with a single child", "suspicious singleChildRoot", thinCheck: .accepts) {
        $0.image.cut($0.root3, to: 1)
        $0.image.setMapped(3, 100)
        $0.image.recount()
    },
    Defect(
        "internal root with a single, underfull child", "suspicious singleChildRoot",
        "suspicious underfull", thinCheck: .refuses
    ) { pool in
        pool.image.cut(pool.leaf3, to: 50)
        let leaf = pool.image.value(pool.root3, 2)
        pool.image.cut(pool.root3, to: 1)
        pool.image.setValue(pool.root3, 0, leaf)
        pool.image.setMapped(3, 50)
        pool.image.recount()
    },
    Defect("internal node without entries", "damage emptyInternalNode", thinCheck: .refuses) {
        $0.image.cut($0.root3, to: 0)
        $0.image.setMapped(3, 0)
        $0.image.recount()
    },
    Defect("pointer past the end", "damage badPointer", thinCheck: .refuses) {
        $0.image.setValue($0.root3, 2, 1024)
    },
    Defect("pointer to the superblock", "damage badPointer", thinCheck: .refuses) {
        $0.image.setValue($0.root3, 2, 0)
    },
    Defect("huge pointer", "damage badPointer", thinCheck: .refuses) {
        $0.image.setValue($0.root3, 2, .max)
    },
    Defect("node below itself", "damage countTooLow", "damage usedTwice", thinCheck: .refuses) {
        $0.image.setValue($0.inner6[0], 3, $0.root6)
    },
    Defect("a bitmap used as a node", "damage usedTwice", "damage countTooLow", thinCheck: .refuses)
    {
        $0.image.setValue($0.root3, 2, $0.image.places.dataBitmaps[0])
    },
]

/// Moves a node's values to where fewer keys leave room for them.
private func shrink(_ pool: SamplePool, _ block: UInt64, maxEntries: Int) {
    pool.image.edit(block, as: .node) {
        $0.setLE32(NodeLayout.maxEntries, UInt32(maxEntries))
        let count = Int($0.le32(NodeLayout.entryCount))
        for i in 0..<count { $0.setLE64(32 + 8 * (maxEntries + i), $0.le64(32 + 8 * (252 + i))) }
    }
}

// MARK: - Devices and mappings

private let deviceDefects: [Defect] = [
    Defect("mapped_blocks", "damage mappedBlocks", thinCheck: .onlyOldAccepts) {
        $0.image.setMapped(3, 301)
    },
    Defect("mapped_blocks of an empty device", "damage mappedBlocks", thinCheck: .onlyOldAccepts) {
        $0.image.setMapped(7, 1)
    },
    Defect("device in details only", "damage deviceSet", thinCheck: .onlyOldAccepts) {
        // Device 7 goes, with its empty root.
        $0.image.cut($0.image.places.top, to: 6)
        $0.image.recount()
    },
    Defect("device in top level only", "damage deviceSet", thinCheck: .onlyOldAccepts) {
        $0.image.cut($0.image.places.details, to: 6)
    },
    Defect("device id too large", "suspicious deviceID", thinCheck: .accepts) {
        $0.image.setKey($0.image.places.top, 6, 1 << 24)
        $0.image.setKey($0.image.places.details, 6, 1 << 24)
    },
    Defect("largest device id", thinCheck: .accepts) {
        $0.image.setKey($0.image.places.top, 6, 1 << 24 - 1)
        $0.image.setKey($0.image.places.details, 6, 1 << 24 - 1)
    },
    Defect("snapshotted_time after the pool's time", "damage time", thinCheck: .accepts) {
        $0.image.setTimes(6, created: 2, snapshotted: 4)
    },
    Defect("creation_time after snapshotted_time", "suspicious time", thinCheck: .accepts) {
        $0.image.setTimes(6, created: 3, snapshotted: 2)
    },
    Defect("device of a later transaction", "suspicious transactionID", thinCheck: .accepts) {
        $0.image.editDetails(6) { $0.setLE64(DeviceDetailsLayout.transactionID, 8) }
    },
    Defect("mapping time after the pool's time", "damage time", thinCheck: .accepts) {
        $0.image.setValue($0.root5, 0, 6000 << 24 | 4)
    },
    Defect(
        "pool time before everything", "damage time", "damage time", "damage time",
        "damage time", "damage time", thinCheck: .accepts
    ) {
        // Details of 1, 2, 5 and 7, and a mapping of 5.
        $0.image.setSuperblock32(SuperblockLayout.time, 2)
    },
    Defect("origin does not know of its snapshot", "damage sharingTime", thinCheck: .accepts) {
        $0.image.setTimes(1, created: 0, snapshotted: 0)
    },
    Defect(
        "snapshot does not know that it shares", "damage sharingTime",
        "damage sharingTime", thinCheck: .accepts
    ) {
        // It shares two leaves.
        $0.image.setTimes(3, created: 0, snapshotted: 0)
    },
    Defect(
        "mapping past the end of the data", "damage dataBlockRange", "leak leak",
        thinCheck: .onlyOldAccepts
    ) {
        $0.image.setValue($0.root5, 0, 40_000 << 24 | 3)
    },
    Defect(
        "data block mapped at two places", "damage crossMapped", "leak leak",
        "damage countTooLow", thinCheck: .onlyOldAccepts
    ) {
        $0.image.setValue($0.root5, 0, 6001 << 24 | 3)
    },
    Defect("the same with the right counts", "damage crossMapped", thinCheck: .accepts) {
        $0.image.setValue($0.root5, 0, 6001 << 24 | 3)
        $0.image.recount()
    },
]

// MARK: - Counts

private let countDefects: [Defect] = [
    Defect("data count too low", "damage countTooLow", thinCheck: .onlyOldAccepts) {
        $0.image.setBits($0.image.places.dataBitmaps[0], 300, 1)
        $0.image.cutOverflow($0.image.places.dataOverflow, removing: 300)
    },
    Defect("data block in use but free", "damage countTooLow", thinCheck: .onlyOldAccepts) {
        $0.image.setBits($0.image.places.dataBitmaps[0], 6000, 0)
        $0.image.takeData(-1)
    },
    Defect("data count too high", "leak countTooHigh", thinCheck: .onlyOldAccepts) {
        $0.image.setBits($0.image.places.dataBitmaps[0], 6000, 2)
    },
    Defect("data block leaked with 1", "leak leak", thinCheck: .onlyOldAccepts) {
        $0.image.setBits($0.image.places.dataBitmaps[0], 6500, 1)
        $0.image.takeData(1)
    },
    Defect("data block leaked with 2", "leak leak", thinCheck: .onlyOldAccepts) {
        $0.image.setBits($0.image.places.dataBitmaps[0], 6500, 2)
        $0.image.takeData(1)
    },
    Defect("neighbours leaked together", "leak leak", thinCheck: .onlyOldAccepts) {
        for i in 6400..<6500 { $0.image.setBits($0.image.places.dataBitmaps[0], i, 1) }
        $0.image.takeData(100)
    },
    Defect("data overflow count too high", "leak countTooHigh", thinCheck: .onlyOldAccepts) {
        $0.image.setOverflow($0.image.places.dataOverflow, 0, 4)
    },
    Defect(
        "one count up, one down", "damage countTooLow", "leak countTooHigh",
        thinCheck: .onlyOldAccepts
    ) {
        $0.image.setBits($0.image.places.dataBitmaps[0], 6000, 2)
        $0.image.setBits($0.image.places.dataBitmaps[0], 307, 0)
        $0.image.takeData(-1)
    },
    Defect("metadata count too low", "damage countTooLow", thinCheck: .refuses) {
        $0.image.setBits($0.image.places.metadataBitmaps[0], Int($0.root1), 1)
    },
    Defect("metadata block in use but free", "damage countTooLow", thinCheck: .refuses) {
        $0.image.setBits($0.image.places.metadataBitmaps[0], Int($0.root5), 0)
        $0.image.takeMetadata(-1)
        $0.image.setHint(to: Int($0.root5))
    },
    Defect("metadata count too high", "leak countTooHigh", thinCheck: .refuses) {
        $0.image.setBits($0.image.places.metadataBitmaps[0], Int($0.root5), 2)
    },
    Defect("metadata block leaked", "leak leak", thinCheck: .refuses) {
        $0.image.setBits($0.image.places.metadataBitmaps[0], 1000, 1)
        $0.image.takeMetadata(1)
    },
    Defect("stale overflow entry", "damage overflowEntry", thinCheck: .onlyOldAccepts) {
        $0.image.addOverflow($0.image.places.dataOverflow, 6000, 3)
    },
    Defect("stale metadata overflow entry", "damage overflowEntry", thinCheck: .onlyOldAccepts) {
        $0.image.addOverflow($0.image.places.metadataOverflow, 900, 3)
    },
    Defect("overflow entry missing", "damage overflowEntry", thinCheck: .accepts) {
        $0.image.cutOverflow($0.image.places.dataOverflow, removing: 300)
    },
    Defect(
        "overflow entry below 3", "damage overflowEntry", "damage countTooLow",
        thinCheck: .onlyOldAccepts
    ) {
        $0.image.setOverflow($0.image.places.dataOverflow, 0, 2)
    },
    Defect("overflow entry past the end", "damage overflowEntry", thinCheck: .onlyOldAccepts) {
        $0.image.addOverflow($0.image.places.dataOverflow, 40_000, 3)
    },
]

// MARK: - Space maps

private let spaceMapDefects: [Defect] = [
    Defect("nr_free too low", "suspicious freeCount", thinCheck: .accepts) {
        $0.image.editDataIndex(0) { $0.setLE32(8, $0.le32(8) - 1) }
    },
    Defect("nr_free too high", "suspicious freeCount", thinCheck: .accepts) {
        $0.image.editDataIndex(1) { $0.setLE32(8, $0.le32(8) + 1) }
    },
    Defect("nr_free without the tail", "suspicious freeCount", thinCheck: .accepts) {
        $0.image.editDataIndex(2) { $0.setLE32(8, $0.le32(8) - UInt32(3 * 16_320 - 40_000)) }
    },
    Defect("none_free_before too high", "suspicious freeHint", thinCheck: .accepts) {
        $0.image.editDataIndex(0) { $0.setLE32(12, 1) }
    },
    Defect("none_free_before too low", thinCheck: .accepts) {
        $0.image.editDataIndex(1) { $0.setLE32(12, 0) }
    },
    Defect("metadata nr_free", "suspicious freeCount", thinCheck: .accepts) {
        $0.image.edit($0.image.places.index, as: .index) { $0.setLE32(24, 5) }
    },
    Defect("metadata none_free_before", "suspicious freeHint", thinCheck: .accepts) {
        $0.image.edit($0.image.places.index, as: .index) { $0.setLE32(28, 16_321) }
    },
    Defect("data nr_allocated", "suspicious allocatedCount", thinCheck: .accepts) {
        $0.image.setSuperblock64(SuperblockLayout.dataSpaceMapRoot + 8, 1)
    },
    Defect("metadata nr_allocated", "suspicious allocatedCount", thinCheck: .accepts) {
        $0.image.setSuperblock64(SuperblockLayout.metadataSpaceMapRoot + 8, 1)
    },
    Defect("data counts past nr_blocks", "suspicious countsPastEnd", thinCheck: .accepts) {
        $0.image.setBits($0.image.places.dataBitmaps[2], 16_000, 1)
        $0.image.editDataIndex(2) { $0.setLE32(8, $0.le32(8) - 1) }
    },
    Defect("metadata counts past nr_blocks", "suspicious countsPastEnd", thinCheck: .accepts) {
        $0.image.setBits($0.image.places.metadataBitmaps[0], 1024, 1)
        $0.image.edit($0.image.places.index, as: .index) { $0.setLE32(24, $0.le32(24) - 1) }
    },
    Defect("index entry past the last", "suspicious indexTail", thinCheck: .accepts) {
        $0.image.edit($0.image.places.index, as: .index) { $0.setLE64(32, 500) }
    },
    Defect("index checksum", "damage checksum", thinCheck: .refuses) {
        $0.image.with($0.image.places.index) { $0.setLE32(4000, 1) }
    },
    Defect("index blocknr", "damage blockNumber", thinCheck: .refuses) {
        $0.image.edit($0.image.places.index, as: .index) { $0.setLE64(8, 1) }
    },
    Defect("index header", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.edit($0.image.places.index, as: .index) { $0.setLE32(4, 1) }
    },
    Defect("bitmap checksum", "damage checksum", thinCheck: .refuses) {
        $0.image.with($0.image.places.dataBitmaps[1]) { $0.setLE32(4000, 1) }
    },
    Defect("bitmap blocknr", "damage blockNumber", thinCheck: .onlyNewAccepts) {
        $0.image.edit($0.image.places.dataBitmaps[1], as: .bitmap) { $0.setLE64(8, 1) }
    },
    Defect("bitmap header", "suspicious unusedField", thinCheck: .accepts) {
        $0.image.edit($0.image.places.dataBitmaps[1], as: .bitmap) { $0.setLE32(4, 1) }
    },
    Defect("unreadable bitmap", "damage unreadable") {
        $0.image.unreadable = [$0.image.places.dataBitmaps[1]]
    },
    Defect("one bitmap twice", "damage usedTwice", "damage countTooLow", thinCheck: .refuses) {
        pool in
        pool.image.editDataIndex(1) { $0.setLE64(0, pool.image.dataBitmap0) }
    },
    Defect("bitmap missing", "damage bitmapSet", thinCheck: .accepts) {
        $0.image.edit($0.image.places.dataIndex, as: .node) {
            $0.setLE32(NodeLayout.entryCount, 2)
        }
        $0.image.setMetadataFree($0.image.places.dataBitmaps[2])
    },
    Defect("bitmap too many", "damage bitmapSet", thinCheck: .accepts) {
        $0.image.edit(900, as: .bitmap) { $0.setLE64(8, 900) }
        $0.image.setBits($0.image.places.metadataBitmaps[0], 900, 1)
        $0.image.takeMetadata(1)
        $0.image.setKey($0.image.places.dataIndex, 3, 3)
        $0.image.editDataIndex(3) { $0.setLE64(0, 900) }
        $0.image.cut($0.image.places.dataIndex, to: 4)
    },
]

// MARK: - Metadata snapshot

private let heldDefects: [Defect] = [
    Defect("snapshot's checksum", "damage checksum", thinCheck: .refuses, held: .whole) {
        $0.image.with($0.image.places.held) { $0.setLE32(4000, 1) }
    },
    Defect("snapshot's blocknr", "damage blockNumber", thinCheck: .accepts, held: .whole) {
        $0.image.edit($0.image.places.held, as: .superblock) { $0.setLE64(8, 0) }
    },
    Defect("snapshot past the end", "damage badPointer", thinCheck: .refuses, held: .whole) {
        $0.image.setSuperblock64(SuperblockLayout.heldRoot, 5000)
    },
    Defect("snapshot with a space map", "suspicious unusedField", thinCheck: .accepts, held: .whole)
    {
        $0.image.editHeld { $0.setLE64(SuperblockLayout.dataSpaceMapRoot, 1) }
    },
    Defect("snapshot of a snapshot", "suspicious unusedField", thinCheck: .accepts, held: .whole) {
        $0.image.editHeld { $0.setLE64(SuperblockLayout.heldRoot, 1) }
    },
    Defect("snapshot with another block size", "damage geometry", thinCheck: .accepts, held: .whole)
    {
        $0.image.editHeld { $0.setLE32(SuperblockLayout.dataBlockSize, 256) }
    },
    Defect("snapshot from the future", "damage time", thinCheck: .accepts, held: .whole) {
        $0.image.editHeld { $0.setLE32(SuperblockLayout.time, 4) }
    },
    Defect(
        "snapshot of a later transaction", "suspicious transactionID", thinCheck: .accepts,
        held: .whole
    ) {
        $0.image.editHeld { $0.setLE64(SuperblockLayout.transactionID, 8) }
    },
    Defect("snapshot with later mappings", "damage time", thinCheck: .accepts, held: .diverged) {
        $0.image.setValue($0.image.heldRoot5, 0, 6000 << 24 | 3)
    },
    Defect(
        "snapshot with a device less", "damage deviceSet", thinCheck: .onlyOldAccepts,
        held: .diverged
    ) { pool in
        let top = pool.image.with(pool.image.places.held) {
            $0.le64(SuperblockLayout.dataMappingRoot)
        }
        pool.image.cut(top, to: 4)
        pool.image.setBits(pool.image.places.metadataBitmaps[0], Int(pool.root6), 1)
    },
    Defect("snapshot not counted", "damage countTooLow", thinCheck: .refuses, held: .whole) {
        $0.image.setBits($0.image.places.metadataBitmaps[0], Int($0.image.places.top), 1)
    },
]
