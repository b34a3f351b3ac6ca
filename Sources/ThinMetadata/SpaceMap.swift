// One space map in memory: the index as an array, and the bitmaps that were needed so far.
//
// 1. A block's count is 0, 1, 2, or "3 or more", whose exact value is in the overflow tree
//    (ReferenceCounts.swift). This file knows the two bits only.
// 2. A block is allocatable if its count is 0 and it is not busy. Busy: reserved for a mapping to
//    come, or freed so lately that the committed state may still use it. A busy block's count is 0.
// 3. A bitmap with changes, with busy blocks, or frozen in a transaction not yet durable stays in
//    memory; one that growth added comes into it, all zero, when it is asked for. Others may be
//    given up: reading them again gives the same.
// 4. nr_free and none_free_before on the device are hints: no tool verifies them and some write
//    them wrong. They are replaced by what the bitmap says when it is loaded, and no "no space" is
//    said before every bitmap has been loaded once.
// 5. nr_free counts the entries past the device's end in the last bitmap too; `freeBlocks` does not.

import BlockIO

import Glibc

/// A bitmap: its index entry, its contents if loaded, and its state.
struct BitmapSlot {
    /// Where it is on the device; 0: nowhere yet, all counts are 0.
    var block: UInt64 = 0
    /// 4096 bytes as on the device, then as many with a busy bit in the low bit of each entry.
    var page: UnsafeMutableRawPointer?
    var freeCount: UInt32 = 0
    var noneFreeBefore: UInt32 = 0
    var busyCount: UInt32 = 0
    /// Contents differ from the last frozen transaction's.
    var isDirty = false
    /// The index entry differs from the last frozen transaction's, the contents do not.
    var isEntryDirty = false
    var isFrozen = false
    /// The entry's numbers were compared with the contents once.
    var isVerified = false
    var isReferenced = false
}

final class SpaceMap {
    private static let perPage = UInt64(BitmapLayout.entriesPerBitmap)
    private static let words = BitmapLayout.entriesPerBitmap / 32
    /// The low bit of each entry of a word.
    private static let lowBits: UInt64 = 0x5555_5555_5555_5555
    private static let busyOffset = Layout.blockSize

    let device: any BlockDevice
    private(set) var blockCount: UInt64
    /// Root of the index tree (data) or the index block (metadata).
    var indexRoot: UInt64
    var overflowRoot: UInt64
    private(set) var slots: UnsafeMutablePointer<BitmapSlot>
    private(set) var slotCount: Int
    private var slotCapacity: Int
    /// Blocks with count 0, busy ones included.
    private(set) var freeBlocks: UInt64 = 0
    private(set) var busyBlocks: UInt64 = 0
    private(set) var dirtyPages: [Int] = []
    /// Pages whose index entry alone changed.
    private(set) var dirtyEntries: [Int] = []
    /// One past the block allocated last: the next search starts here.
    private var cursor: UInt64 = 0
    private var unverified: Int
    private(set) var loadedPages = 0
    private var hand = 0

    /// - Parameter entries: block, nr_free, none_free_before of each bitmap.
    init(
        _ device: any BlockDevice, blockCount: UInt64, indexRoot: UInt64, overflowRoot: UInt64,
        entries: [(block: UInt64, freeCount: UInt32, noneFreeBefore: UInt32)]
    ) throws(MetadataError) {
        assert(entries.count == Self.pages(for: blockCount))
        self.device = device
        self.blockCount = blockCount
        self.indexRoot = indexRoot
        self.overflowRoot = overflowRoot
        slotCount = entries.count
        slotCapacity = max(8, slotCount)
        slots = .allocate(capacity: slotCapacity)
        unverified = slotCount
        for (index, entry) in entries.enumerated() {
            let limit = UInt32(Self.perPage)
            (slots + index).initialize(
                to: BitmapSlot(
                    block: entry.block, freeCount: min(entry.freeCount, limit),
                    noneFreeBefore: min(entry.noneFreeBefore, limit)))
            let tail = UInt32(Self.perPage) - UInt32(usable(index))
            freeBlocks += UInt64(max(slots[index].freeCount, tail) - tail)
        }
        // Its nr_free is the one that tools get wrong: without the entries past the end.
        if slotCount > 0 { _ = try page(slotCount - 1) }
    }

    deinit {
        for index in 0..<slotCount { slots[index].page?.deallocate() }
        slots.deallocate()
    }

    static func pages(for blocks: UInt64) -> Int { Int((blocks + perPage - 1) / perPage) }

    var allocatedBlocks: UInt64 { blockCount - freeBlocks }
    var availableBlocks: UInt64 { freeBlocks - busyBlocks }

    /// Entries of this bitmap that stand for blocks.
    private func usable(_ index: Int) -> Int {
        Int(min(Self.perPage, blockCount - UInt64(index) * Self.perPage))
    }

    // MARK: Bitmaps

    /// The bitmap's contents, loaded if they are not in memory.
    @inline(__always) func page(_ index: Int) throws(MetadataError) -> UnsafeMutableRawPointer {
        slots[index].isReferenced = true
        if let page = slots[index].page { return page }
        return try load(index)
    }

    @inline(never) private func load(
        _ index: Int
    ) throws(MetadataError) -> UnsafeMutableRawPointer {
        let page = UnsafeMutableRawPointer.allocate(
            byteCount: 2 * Layout.blockSize, alignment: Layout.blockSize)
        memset(page, 0, 2 * Layout.blockSize)
        let slot = slots + index
        // Dirty or frozen without contents in memory: it is new, and not on the device yet.
        if slot.pointee.block != 0, !slot.pointee.isDirty, !slot.pointee.isFrozen {
            do {
                try readBlock(device, slot.pointee.block, into: page)
                try verifyHeader(page, .bitmap, slot.pointee.block)
            } catch {
                page.deallocate()
                throw error
            }
        }
        slot.pointee.page = page
        loadedPages += 1
        if !slot.pointee.isVerified { correctEntry(index, page) }
        return page
    }

    /// Invariant 4: makes the entry's numbers agree with the contents.
    private func correctEntry(_ index: Int, _ page: UnsafeMutableRawPointer) {
        let slot = slots + index
        let usable = usable(index)
        clearTail(page, from: usable)
        var free = 0
        var first = BitmapLayout.entriesPerBitmap
        for word in 0..<Self.words {
            let mask = Self.zeroEntries(page, word)
            free += mask.nonzeroBitCount
            if mask != 0 && first == BitmapLayout.entriesPerBitmap {
                first = 32 * word + mask.trailingZeroBitCount / 2
            }
        }
        let tail = BitmapLayout.entriesPerBitmap - usable
        let claimed = max(Int(slot.pointee.freeCount), tail) - tail
        freeBlocks = freeBlocks - UInt64(claimed) + UInt64(free - tail)
        if slot.pointee.freeCount != UInt32(free) || slot.pointee.noneFreeBefore > UInt32(first) {
            slot.pointee.freeCount = UInt32(free)
            slot.pointee.noneFreeBefore = min(slot.pointee.noneFreeBefore, UInt32(first))
            if !slot.pointee.isDirty && !slot.pointee.isEntryDirty {
                slot.pointee.isEntryDirty = true
                dirtyEntries.append(index)
            }
        }
        slot.pointee.isVerified = true
        unverified -= 1
    }

    /// Counts past the device's end mean nothing, and would become leaks when the device grows.
    private func clearTail(_ page: UnsafeMutableRawPointer, from usable: Int) {
        guard usable < BitmapLayout.entriesPerBitmap else { return }
        let word = usable / 32
        let offset = BitmapLayout.entries + 8 * word
        let kept = (UInt64(1) << UInt64(2 * (usable % 32))) - 1
        page.setLE64(offset, page.le64(offset) & kept)
        let rest = offset + 8
        memset(page + rest, 0, Layout.blockSize - rest)
    }

    /// The entries of a word with count 0, as a mask of their low bits.
    @inline(__always) private static func zeroEntries(
        _ page: UnsafeMutableRawPointer, _ word: Int
    ) -> UInt64 {
        let bits = page.le64(BitmapLayout.entries + 8 * word)
        return ~(bits | bits >> 1) & lowBits
    }

    /// Gives up loaded bitmaps that nothing holds until at most `bound` are in memory.
    func trim(bound: Int) {
        var patience = trimPatience
        while loadedPages > bound && patience > 0 {
            patience -= 1
            hand = hand + 1 < slotCount ? hand + 1 : 0
            let slot = slots + hand
            guard let page = slot.pointee.page, !slot.pointee.isDirty, !slot.pointee.isFrozen,
                slot.pointee.busyCount == 0
            else { continue }
            if slot.pointee.isReferenced {
                slot.pointee.isReferenced = false
            } else {
                page.deallocate()
                slot.pointee.page = nil
                loadedPages -= 1
                patience = trimPatience
            }
        }
    }

    // MARK: Counts

    /// 0, 1, 2, or 3 for "3 or more".
    @inline(__always) func shortCount(_ block: UInt64) throws(MetadataError) -> UInt32 {
        assert(block < blockCount)
        let (index, entry) = Self.place(block)
        let page = try page(index)
        let bits = page.le64(BitmapLayout.entries + 8 * (entry >> 5)) >> UInt64(2 * (entry & 31))
        // Bit 0 is the high bit of the count, bit 1 the low one.
        return UInt32(truncatingIfNeeded: (bits & 1) << 1 | (bits >> 1) & 1)
    }

    func setShortCount(_ block: UInt64, _ count: UInt32) throws(MetadataError) {
        assert(block < blockCount && count <= 3)
        let (index, entry) = Self.place(block)
        let page = try page(index)
        let slot = slots + index
        let offset = BitmapLayout.entries + 8 * (entry >> 5)
        let shift = UInt64(2 * (entry & 31))
        let word = page.le64(offset)
        let wasFree = word >> shift & 3 == 0
        let bits = UInt64(count >> 1 | (count & 1) << 1)
        page.setLE64(offset, word & ~(3 << shift) | bits << shift)
        if wasFree && count != 0 {
            slot.pointee.freeCount -= 1
            freeBlocks -= 1
            if slot.pointee.noneFreeBefore == UInt32(entry) { slot.pointee.noneFreeBefore += 1 }
        } else if !wasFree && count == 0 {
            slot.pointee.freeCount += 1
            freeBlocks += 1
            slot.pointee.noneFreeBefore = min(slot.pointee.noneFreeBefore, UInt32(entry))
        }
        if !slot.pointee.isDirty {
            slot.pointee.isDirty = true
            dirtyPages.append(index)
        }
    }

    @inline(__always) private static func place(_ block: UInt64) -> (index: Int, entry: Int) {
        let (index, entry) = block.quotientAndRemainder(dividingBy: perPage)
        return (Int(index), Int(entry))
    }

    // MARK: Busy blocks

    func isBusy(_ block: UInt64) -> Bool {
        let (index, entry) = Self.place(block)
        guard let page = slots[index].page else { return false }
        let word = page.le64(Self.busyOffset + 8 * (entry >> 5))
        return word >> UInt64(2 * (entry & 31)) & 1 == 1
    }

    func setBusy(_ block: UInt64, _ busy: Bool) throws(MetadataError) {
        let (index, entry) = Self.place(block)
        let page = try page(index)
        let offset = Self.busyOffset + 8 * (entry >> 5)
        let mask = UInt64(1) << UInt64(2 * (entry & 31))
        let word = page.le64(offset)
        precondition((word & mask != 0) != busy, "block \(block) is busy already, or not busy")
        page.setLE64(offset, word ^ mask)
        if busy {
            slots[index].busyCount += 1
            busyBlocks += 1
        } else {
            slots[index].busyCount -= 1
            busyBlocks -= 1
        }
    }

    // MARK: Search

    /// An allocatable block, searched for from the last one on and then from the start; nil if
    /// there is none. The caller makes it busy or gives it a count.
    func findFree() throws(MetadataError) -> UInt64? {
        if availableBlocks == 0 { try verifyAll() }
        guard availableBlocks > 0 else { return nil }
        if let block = try search(from: cursor, to: blockCount) { return block }
        if let block = try search(from: 0, to: cursor) { return block }
        // Entries that claimed to be full may be wrong.
        guard unverified > 0 else { return nil }
        try verifyAll()
        return try search(from: 0, to: blockCount)
    }

    private func verifyAll() throws(MetadataError) {
        guard unverified > 0 else { return }
        for index in 0..<slotCount where !slots[index].isVerified { _ = try page(index) }
    }

    private func search(from: UInt64, to: UInt64) throws(MetadataError) -> UInt64? {
        guard from < to else { return nil }
        let first = Int(from / Self.perPage)
        let last = Int((to - 1) / Self.perPage)
        for index in first...last {
            let slot = slots + index
            let tail = BitmapLayout.entriesPerBitmap - usable(index)
            guard Int(slot.pointee.freeCount) - tail > Int(slot.pointee.busyCount) else { continue }
            let base = UInt64(index) * Self.perPage
            let page = try page(index)
            let start = max(Int(slot.pointee.noneFreeBefore), index == first ? Int(from - base) : 0)
            let end = min(usable(index), index == last ? Int(to - base) : usable(index))
            if let entry = Self.firstFree(page, start, end) {
                cursor = base + UInt64(entry) + 1
                if cursor >= blockCount { cursor = 0 }
                return base + UInt64(entry)
            }
        }
        return nil
    }

    private static func firstFree(
        _ page: UnsafeMutableRawPointer, _ start: Int, _ end: Int
    ) -> Int? {
        guard start < end else { return nil }
        var word = start >> 5
        var mask = ~UInt64(0) << UInt64(2 * (start & 31))
        while 32 * word < end {
            let free = zeroEntries(page, word) & ~page.le64(busyOffset + 8 * word) & mask
            if free != 0 {
                let entry = 32 * word + free.trailingZeroBitCount / 2
                return entry < end ? entry : nil
            }
            mask = ~0
            word += 1
        }
        return nil
    }

    // MARK: Growth

    /// More blocks, all with count 0. New bitmaps get their place at the next freeze. The search
    /// goes on in the new area.
    func grow(to blocks: UInt64) throws(MetadataError) {
        assert(blocks > blockCount)
        // The old last bitmap's tail must be known to be clear before it gets a meaning.
        if slotCount > 0 && !slots[slotCount - 1].isVerified { _ = try page(slotCount - 1) }
        let pages = Self.pages(for: blocks)
        if pages > slotCapacity {
            let larger = UnsafeMutablePointer<BitmapSlot>.allocate(capacity: pages)
            larger.moveInitialize(from: slots, count: slotCount)
            slots.deallocate()
            slots = larger
            slotCapacity = pages
        }
        for index in slotCount..<pages {
            (slots + index).initialize(
                to: BitmapSlot(freeCount: UInt32(Self.perPage), isDirty: true, isVerified: true))
            dirtyPages.append(index)
        }
        slotCount = pages
        freeBlocks += blocks - blockCount
        cursor = blockCount
        blockCount = blocks
    }

    // MARK: Freezing

    /// Takes the list of bitmaps with changes, ascending; the bitmaps stay marked as dirty.
    func takeDirtyPages() -> [Int] {
        let taken = dirtyPages.sorted()
        dirtyPages.removeAll(keepingCapacity: true)
        return taken
    }

    func takeDirtyEntries() -> [Int] {
        let taken = dirtyEntries.sorted()
        dirtyEntries.removeAll(keepingCapacity: true)
        for index in taken { slots[index].isEntryDirty = false }
        return taken
    }

    func setBlock(_ index: Int, _ block: UInt64) { slots[index].block = block }

    /// A copy of the contents for the frozen transaction; from here on the bitmap is clean and
    /// held until `unfreeze`.
    func freezePage(_ index: Int, into memory: UnsafeMutableRawPointer) {
        let slot = slots + index
        if let page = slot.pointee.page {
            memcpy(memory, page, Layout.blockSize)
        } else {
            assert(slot.pointee.isDirty)
            memset(memory, 0, Layout.blockSize)
        }
        // A bitmap read from another program's image may carry something here.
        memory.setLE32(4, 0)
        slot.pointee.isDirty = false
        slot.pointee.isFrozen = true
    }

    func unfreeze(_ index: Int) { slots[index].isFrozen = false }

    /// Writes the 16-byte index entry.
    func writeEntry(_ index: Int, to memory: UnsafeMutableRawPointer) {
        memory.setLE64(IndexEntryLayout.block, slots[index].block)
        memory.setLE32(IndexEntryLayout.freeCount, slots[index].freeCount)
        memory.setLE32(IndexEntryLayout.noneFreeBefore, slots[index].noneFreeBefore)
    }
}
