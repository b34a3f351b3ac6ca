// Both space maps: what they record, and how that compares with what the trees refer to.

import BlockIO

extension MetadataCheck {
    /// Reference counts as the pointers give them.
    protocol ExpectedCounts {
        func count(of block: UInt64) -> UInt64
        /// Whether the 32 blocks from `block`, a multiple of 32, have none.
        func isUnused32(from block: UInt64) -> Bool
    }

    struct BitmapEntry {
        /// Which bitmap: it covers the blocks from `number * 16320`.
        var number: UInt64
        /// Where it is.
        var block: UInt64
        var freeCount: UInt32
        var noneFreeBefore: UInt32
        /// Where this entry is.
        var from: UInt64
    }

    /// The counts of 3 and more.
    struct OverflowCounts {
        static let countBits: UInt64 = 24
        static let maxPacked: UInt64 = (1 << countBits) - 1

        /// `block << 24 | count`, ascending; a count that does not fit is in `large`.
        var packed: [UInt64] = []
        var large: [UInt64: UInt64] = [:]
        /// All of the tree could be read.
        var isComplete = false

        /// The position of the first entry for `block` or a later one.
        func position(of block: UInt64) -> Int {
            var low = 0
            var high = packed.count
            while low < high {
                let middle = (low + high) / 2
                if packed[middle] >> Self.countBits < block {
                    low = middle + 1
                } else {
                    high = middle
                }
            }
            return low
        }

        func count(at position: Int) -> (block: UInt64, count: UInt64) {
            let block = packed[position] >> Self.countBits
            let count = packed[position] & Self.maxPacked
            return (block, count == Self.maxPacked ? large[block] ?? count : count)
        }
    }

    struct SpaceMap {
        var isMetadata: Bool
        var root: Superblock.SpaceMapRoot
        var bitmaps: [BitmapEntry] = []
        /// All bitmaps were found.
        var hasAllBitmaps = true
        var overflow = OverflowCounts()

        /// What its blocks are, in words.
        var blocks: String { isMetadata ? "metadata" : "data" }
    }
}

extension MetadataCheck.BlockClaims: MetadataCheck.ExpectedCounts {
    func count(of block: UInt64) -> UInt64 {
        block < UInt64(counts.count) ? UInt64(counts[Int(block)]) : 0
    }
    func isUnused32(from block: UInt64) -> Bool {
        (block..<block + 32).allSatisfy { count(of: $0) == 0 }
    }
}

extension MetadataCheck.DataBlockCounts: MetadataCheck.ExpectedCounts {}

// MARK: - Reading

extension MetadataCheck.Examination {
    typealias SpaceMap = MetadataCheck.SpaceMap
    private static var perBitmap: UInt64 { UInt64(BitmapLayout.entriesPerBitmap) }

    func readMetadataMap(_ superblock: Superblock) -> SpaceMap {
        var map = SpaceMap(isMetadata: true, root: superblock.metadataMap)
        map.root.blockCount = min(map.root.blockCount, Layout.maxMetadataBlocks)
        map.hasAllBitmaps = false
        let block = map.root.bitmapRoot
        if claims.claim(block, as: .index, from: 0) == .first {
            reader.withBlock(block) { bytes in
                guard let bytes,
                    reader.verify(bytes, as: .index, number: block, role: .index)
                else {
                    claims.isComplete = false
                    return
                }
                map.hasAllBitmaps = true
                readIndexBlock(bytes, &map)
            }
        }
        claimBitmaps(&map)
        map.overflow = readOverflow(map, .metadataOverflow)
        return map
    }

    private func readIndexBlock(_ bytes: UnsafeRawPointer, _ map: inout SpaceMap) {
        let block = map.root.bitmapRoot
        checkUnusedWord(bytes, block: block)
        let needed = (map.root.blockCount + Self.perBitmap - 1) / Self.perBitmap
        for number in 0..<Int(needed) {
            let entry = bytes + IndexBlockLayout.entries + number * IndexEntryLayout.size
            map.bitmaps.append(bitmapEntry(entry, number: UInt64(number), from: block))
        }
        let end = IndexBlockLayout.entries + Int(needed) * IndexEntryLayout.size
        if !isZero(bytes, end..<Layout.blockSize) {
            log.add(
                .suspicious, .indexTail, block: block,
                "the metadata index is not zero after its \(needed) entries")
        }
    }

    private func bitmapEntry(
        _ bytes: UnsafeRawPointer, number: UInt64, from: UInt64
    ) -> MetadataCheck.BitmapEntry {
        MetadataCheck.BitmapEntry(
            number: number, block: bytes.le64(IndexEntryLayout.block),
            freeCount: bytes.le32(IndexEntryLayout.freeCount),
            noneFreeBefore: bytes.le32(IndexEntryLayout.noneFreeBefore), from: from)
    }

    func readDataMap(_ superblock: Superblock) -> SpaceMap {
        var map = SpaceMap(isMetadata: false, root: superblock.dataMap)
        map.root.blockCount = min(map.root.blockCount, Mapping.maxBlock + 1)
        let forest = MetadataCheck.TreeForest(
            kind: .dataIndex, reader: reader, claims: claims, log: log)
        var entries: [MetadataCheck.BitmapEntry] = []
        forest.visitLeaf = { [self] bytes, node in
            let values = NodeLayout.keys + 8 * Int(bytes.le32(NodeLayout.maxEntries))
            for i in 0..<Int(node.entryCount) {
                entries.append(
                    bitmapEntry(
                        bytes + values + i * IndexEntryLayout.size,
                        number: bytes.le64(NodeLayout.keys + 8 * i), from: UInt64(node.block)))
            }
        }
        _ = forest.grow(roots: [(map.root.bitmapRoot, 0)])
        entries.sort { $0.number < $1.number }
        map.hasAllBitmaps = forest.isComplete
        let needed = (map.root.blockCount + Self.perBitmap - 1) / Self.perBitmap
        checkBitmapSet(entries, needed: needed, &map)
        map.bitmaps = entries
        claimBitmaps(&map)
        map.overflow = readOverflow(map, .dataOverflow)
        return map
    }

    /// All of the numbers below `needed`, and no others.
    private func checkBitmapSet(
        _ entries: [MetadataCheck.BitmapEntry], needed: UInt64, _ map: inout SpaceMap
    ) {
        var next: UInt64 = 0
        func missing(_ end: UInt64) {
            map.hasAllBitmaps = false
            log.add(
                .damage, .bitmapSet, block: map.root.bitmapRoot,
                "no index entry for data bitmaps \(next) to \(end - 1)")
        }
        for entry in entries {
            guard entry.number < needed else {
                log.add(
                    .damage, .bitmapSet, block: entry.from,
                    "an index entry for data bitmap \(entry.number), of \(needed)")
                continue
            }
            if entry.number > next && map.hasAllBitmaps { missing(entry.number) }
            next = entry.number + 1
        }
        if next < needed && map.hasAllBitmaps { missing(needed) }
    }

    /// Counts the pointers to the bitmaps and keeps those that lead somewhere.
    private func claimBitmaps(_ map: inout SpaceMap) {
        let role: MetadataCheck.Role = map.isMetadata ? .metadataBitmap : .dataBitmap
        let all = map.bitmaps.count
        map.bitmaps = map.bitmaps.filter {
            claims.claim($0.block, as: role, from: $0.from) == .first
        }
        if map.bitmaps.count < all { map.hasAllBitmaps = false }
    }

    private func readOverflow(
        _ map: SpaceMap, _ kind: MetadataCheck.TreeKind
    ) -> MetadataCheck.OverflowCounts {
        typealias Overflow = MetadataCheck.OverflowCounts
        var overflow = Overflow()
        let forest = MetadataCheck.TreeForest(
            kind: kind, reader: reader, claims: claims, log: log)
        let end = map.root.blockCount
        forest.visitLeaf = { [self] bytes, node in
            let values = NodeLayout.keys + 8 * Int(bytes.le32(NodeLayout.maxEntries))
            for i in 0..<Int(node.entryCount) {
                let block = bytes.le64(NodeLayout.keys + 8 * i)
                let count = UInt64(bytes.le32(values + 4 * i))
                guard block < end else {
                    log.add(
                        .damage, .overflowEntry, block: UInt64(node.block),
                        "a reference count for \(map.blocks) block \(block), past the end")
                    continue
                }
                if count < 3 {
                    log.add(
                        .damage, .overflowEntry, block: UInt64(node.block),
                        "\(map.blocks) block \(block) has the count \(count) here, where only "
                            + "counts from 3 belong")
                }
                overflow.packed.append(block << Overflow.countBits | min(count, Overflow.maxPacked))
                if count >= Overflow.maxPacked { overflow.large[block] = count }
            }
        }
        _ = forest.grow(roots: [(map.root.refCountRoot, 0)])
        overflow.packed.sort()
        overflow.isComplete = forest.isComplete
        return overflow
    }

    private func checkUnusedWord(_ bytes: UnsafeRawPointer, block: UInt64) {
        if bytes.le32(4) != 0 {
            log.add(
                .suspicious, .unusedField, block: block, "the unused word of the header is not zero"
            )
        }
    }
}

// MARK: - Comparing

extension MetadataCheck.Examination {
    func checkDataCounts(_ map: SpaceMap, _ counts: MetadataCheck.DataBlockCounts) {
        compare(map, counts, isExact: sawAllMappings)
    }

    func checkMetadataCounts(_ map: SpaceMap) {
        compare(map, claims, isExact: claims.isComplete)
    }

    private func compare(
        _ map: SpaceMap, _ expected: some MetadataCheck.ExpectedCounts, isExact: Bool
    ) {
        let bitmaps = map.bitmaps.sorted { $0.block < $1.block }
        let role: MetadataCheck.Role = map.isMetadata ? .metadataBitmap : .dataBitmap
        var allocated: UInt64 = 0
        var isComplete = map.hasAllBitmaps
        reader.forEach(bitmaps.map(\.block)) { position, bytes in
            let entry = bitmaps[position]
            guard let bytes,
                reader.verify(bytes, as: .bitmap, number: entry.block, role: role)
            else {
                isComplete = false
                return
            }
            checkUnusedWord(bytes, block: entry.block)
            var comparison = MetadataCheck.BitmapComparison(
                map: map, entry: entry, isExact: isExact, log: log)
            comparison.compare(bytes, expected)
            allocated += comparison.allocated
        }
        if isComplete && allocated != map.root.allocatedCount {
            log.add(
                .suspicious, .allocatedCount, block: 0,
                "nr_allocated of the \(map.blocks) space map is \(map.root.allocatedCount), its "
                    + "bitmaps have \(allocated)")
        }
    }
}

extension MetadataCheck {
    /// One bitmap against the expected counts.
    struct BitmapComparison {
        /// Neighbouring blocks with the same wrong count: one finding.
        private struct Mismatch {
            var blocks: Range<UInt64>
            var recorded: UInt64
            var expected: UInt64
        }

        let map: SpaceMap
        let entry: BitmapEntry
        /// Whether the expected counts are exact, not lower bounds.
        let isExact: Bool
        let log: FindingLog

        private(set) var allocated: UInt64 = 0
        private var free: UInt32 = 0
        private var freePastEnd: UInt32 = 0
        private var firstFree = UInt32(BitmapLayout.entriesPerBitmap)
        private var usedPastEnd: UInt64 = 0
        private var mismatch: Mismatch?
        private var overflowPosition = 0

        init(map: SpaceMap, entry: BitmapEntry, isExact: Bool, log: FindingLog) {
            self.map = map
            self.entry = entry
            self.isExact = isExact
            self.log = log
        }

        mutating func compare(_ bytes: UnsafeRawPointer, _ expected: some ExpectedCounts) {
            let entries = UInt64(BitmapLayout.entriesPerBitmap)
            // Bitmaps past the end are reported and left alone.
            guard entry.number < (map.root.blockCount + entries - 1) / entries else { return }
            let first = entry.number * entries
            overflowPosition = map.overflow.position(of: first)
            for word in 0..<UInt64(BitmapLayout.entriesPerBitmap / 32) {
                let bits = bytes.le64(BitmapLayout.entries + 8 * Int(word))
                let block = first + 32 * word
                if bits == 0 && block + 32 <= map.root.blockCount && nextOverflow >= block + 32
                    && expected.isUnused32(from: block)
                {
                    firstFree = min(firstFree, UInt32(32 * word))
                    free += 32
                    flushMismatch()
                } else {
                    compareWord(bits, from: block, index: UInt32(32 * word), expected)
                }
            }
            flushMismatch()
            checkEntry()
        }

        private var nextOverflow: UInt64 {
            overflowPosition < map.overflow.packed.count
                ? map.overflow.packed[overflowPosition] >> OverflowCounts.countBits : .max
        }

        @inline(__always) private mutating func compareWord(
            _ bits: UInt64, from first: UInt64, index: UInt32, _ expected: some ExpectedCounts
        ) {
            for i in 0..<UInt64(32) {
                // The lower bit of the two is the count's high one.
                let value = (bits >> (2 * i) & 1) << 1 | (bits >> (2 * i + 1) & 1)
                let block = first + i
                if value == 0 {
                    firstFree = min(firstFree, index + UInt32(i))
                    free += 1
                }
                guard block < map.root.blockCount else {
                    if value == 0 { freePastEnd += 1 } else { usedPastEnd += 1 }
                    continue
                }
                if value != 0 { allocated += 1 }
                guard let recorded = recordedCount(of: block, bitmapValue: value) else { continue }
                let wanted = expected.count(of: block)
                if recorded != wanted { note(block, recorded: recorded, expected: wanted) }
            }
        }

        /// The count in both places, or nil if it is not known.
        @inline(__always) private mutating func recordedCount(
            of block: UInt64, bitmapValue: UInt64
        ) -> UInt64? {
            guard nextOverflow <= block else {
                guard bitmapValue == 3 else { return bitmapValue }
                if map.overflow.isComplete {
                    report(.damage, .overflowEntry, block..<block + 1) {
                        "the bitmap has 3 or more, but there is no count in the overflow tree"
                    }
                }
                return nil
            }
            let count = map.overflow.count(at: overflowPosition).count
            while nextOverflow <= block { overflowPosition += 1 }
            guard bitmapValue != 3 else { return count }
            report(.damage, .overflowEntry, block..<block + 1) {
                "stale count \(count) in the overflow tree, the bitmap has \(bitmapValue)"
            }
            return bitmapValue
        }

        private mutating func note(_ block: UInt64, recorded: UInt64, expected: UInt64) {
            if let last = mismatch, last.blocks.upperBound == block, last.recorded == recorded,
                last.expected == expected
            {
                mismatch!.blocks = last.blocks.lowerBound..<block + 1
            } else {
                flushMismatch()
                mismatch = Mismatch(
                    blocks: block..<block + 1, recorded: recorded, expected: expected)
            }
        }

        private mutating func flushMismatch() {
            guard let found = mismatch else { return }
            mismatch = nil
            let (recorded, expected) = (found.recorded, found.expected)
            if recorded < expected {
                report(.damage, .countTooLow, found.blocks) {
                    recorded == 0
                        ? "free by the space map, but referred to \(expected) times"
                        : "reference count \(recorded), but referred to \(expected) times"
                }
            } else if isExact && expected == 0 {
                report(.leak, .leak, found.blocks) {
                    "reference count \(recorded), but nothing refers to it"
                }
            } else if isExact {
                report(.leak, .countTooHigh, found.blocks) {
                    "reference count \(recorded), but referred to only \(expected) times"
                }
            }
        }

        private func report(
            _ severity: CheckFinding.Severity, _ kind: CheckFinding.Kind, _ blocks: Range<UInt64>,
            _ what: () -> String
        ) {
            log.add(
                severity, kind, metadataBlocks: map.isMetadata ? blocks : nil,
                dataBlocks: map.isMetadata ? nil : blocks, what())
        }

        /// What the index says of the bitmap.
        private func checkEntry() {
            let name = "\(map.blocks) bitmap \(entry.number)"
            if usedPastEnd > 0 {
                log.add(
                    .suspicious, .countsPastEnd, block: entry.block,
                    "\(name) has \(usedPastEnd) counts past the end of the device")
            }
            if entry.freeCount != free {
                let leavesOutTail = freePastEnd > 0 && entry.freeCount == free - freePastEnd
                log.add(
                    .suspicious, .freeCount, block: entry.from,
                    leavesOutTail
                        ? "nr_free of \(name) leaves out the entries past the device's end: when it "
                            + "grows, its new blocks cannot be used (thin_restore before 1.0.10 "
                            + "writes this)"
                        : "nr_free of \(name) is \(entry.freeCount), it has \(free) zero entries")
            }
            if entry.noneFreeBefore > firstFree {
                log.add(
                    .suspicious, .freeHint, block: entry.from,
                    "none_free_before of \(name) is \(entry.noneFreeBefore), but entry \(firstFree) "
                        + "is free")
            }
        }
    }
}
