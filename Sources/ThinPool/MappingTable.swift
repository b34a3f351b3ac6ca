// The map of one volume as the reactors read it: without a lock, without an allocation.
//
// A directory of pages; a page holds 512 consecutive virtual blocks (fewer where a test wants many
// pages). A page is either absent (ask
// the metadata), known to be all unmapped, or complete: every entry of a present page is known.
// A page with few mappings is packed: a bitmap of the blocks that had one when it was made, how
// many there are before each word of the bitmap, and their entries alone. An entry that the bitmap
// has no place for makes it a plain page.
//
// 1. Written under the pool's lock only; read by anybody who has pinned the epoch.
// 2. A page that leaves the directory is freed only once its epoch has drained.
// 3. The table is a cache: what is not in it is in the metadata, never the other way round.
// 4. Of a packed page only entries change.
// 5. Going through the table takes time for what is in it, not for what it could hold: the lock
//    is held.

import Glibc
import Synchronization
import ThinMetadata

/// What the table knows of a virtual block.
package enum TableEntry: Equatable {
    case unknown
    case unmapped
    case mapped(Mapping)
}

package final class MappingTable: @unchecked Sendable {
    /// Virtual blocks of a page, as a power of two: at most, and as a rule.
    package static let longestPageShift: UInt64 = 9

    /// Directory words: 0 absent, 1 all unmapped, else the page's address, with a bit for a packed
    /// one.
    private static let absent: UInt = 0
    private static let hole: UInt = 1
    private static let packedBit: UInt = 2
    /// Page words: the complement of the mapping, so that this, which would be the last block of
    /// a 2^40-block device at the last time, stands for "unmapped".
    private static let unmappedWord: UInt64 = 0

    let blocks: UInt64
    private let pageShift: UInt64
    private let pageCount: Int
    private let directoryBytes: Int
    private let directory: UnsafeMutablePointer<Atomic<UInt>>
    /// What is in each stretch of the directory: words that are not absent, and those of them that
    /// have a page. Under the lock.
    private let present: UnsafeMutablePointer<UInt16>
    private let paged: UnsafeMutablePointer<UInt16>
    private let stretches: Int
    /// Words that take a page of the system's memory as soon as one of them is written.
    private static let stretch = stretchBytes / MemoryLayout<Atomic<UInt>>.stride
    private static let stretchBytes = max(4096, Int(sysconf(Int32(_SC_PAGESIZE))))
    /// Bytes of the pages, and of the directory's stretches, that are present. Under the lock.
    private(set) var bytes = 0

    package init?(blocks: UInt64, pageShift: UInt64 = MappingTable.longestPageShift) {
        precondition(pageShift <= Self.longestPageShift)
        self.blocks = blocks
        self.pageShift = pageShift
        pageCount = Int((blocks + (1 << pageShift) - 1) >> pageShift)
        directoryBytes = max(pageCount, 1) * MemoryLayout<Atomic<UInt>>.stride
        // Address space only: a page of the directory takes memory when it is first written.
        let memory = mmap(
            nil, directoryBytes, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let memory, memory != MAP_FAILED else { return nil }
        directory = memory.bindMemory(to: Atomic<UInt>.self, capacity: max(pageCount, 1))
        stretches = (pageCount + Self.stretch - 1) / Self.stretch
        present = Self.zeroes(stretches)
        paged = Self.zeroes(stretches)
    }

    /// Not written, so that what a large volume does not use of them takes no memory.
    private static func zeroes(_ count: Int) -> UnsafeMutablePointer<UInt16> {
        calloc(max(count, 1), MemoryLayout<UInt16>.stride)!
            .bindMemory(to: UInt16.self, capacity: max(count, 1))
    }

    deinit {
        if bytes > 0 { removeAll { free(UnsafeMutableRawPointer(bitPattern: $0)) } }
        free(present)
        free(paged)
        munmap(directory, directoryBytes)
    }

    var pageEntries: UInt64 { 1 << pageShift }
    private var pageBytes: Int { Int(pageEntries) * MemoryLayout<Atomic<UInt64>>.stride }

    @inline(__always)
    package func lookup(_ block: UInt64) -> TableEntry {
        let word = directory[Int(block >> pageShift)].load(ordering: .acquiring)
        if word == Self.absent { return .unknown }
        if word == Self.hole { return .unmapped }
        let place = Int(block & (pageEntries - 1))
        let entry: UInt64
        if word & Self.packedBit == 0 {
            let page = UnsafeMutablePointer<Atomic<UInt64>>(bitPattern: word)!
            entry = page[place].load(ordering: .acquiring)
        } else {
            guard let slot = PackedPage(word & ~Self.packedBit).entry(place) else {
                return .unmapped
            }
            entry = slot.pointee.load(ordering: .acquiring)
        }
        return entry == Self.unmappedWord ? .unmapped : .mapped(Mapping(rawValue: ~entry))
    }

    /// The number of the page that holds `block`.
    func page(of block: UInt64) -> UInt64 { block >> pageShift }

    /// The virtual blocks of the page that holds `block`, clipped to the volume.
    package func pageRange(of block: UInt64) -> Range<UInt64> {
        let first = block & ~(pageEntries - 1)
        return first..<min(first + pageEntries, blocks)
    }

    /// Adds a page whose entries `fill` tells: it calls its argument for every mapped block, in
    /// ascending order.
    package func load<Failure: Error>(
        pageOf block: UInt64,
        fill: ((VirtualBlock, Mapping) -> Void) throws(Failure) -> Void
    ) throws(Failure) {
        let index = Int(block >> pageShift)
        precondition(directory[index].load(ordering: .relaxed) == Self.absent)
        var places: [(place: Int, word: UInt64)] = []
        places.reserveCapacity(Int(pageEntries))
        try fill { block, mapping in
            places.append((Int(block.rawValue & (pageEntries - 1)), ~mapping.rawValue))
        }
        var word = Self.hole
        if places.count > PackedPage.mostEntries(ofPageBytes: pageBytes) {
            let page = emptyPage()
            for (place, entry) in places { page[place].store(entry, ordering: .relaxed) }
            word = UInt(bitPattern: page)
        } else if !places.isEmpty {
            word = PackedPage(places).address | Self.packedBit
        }
        let stretch = index / Self.stretch
        if present[stretch] == 0 { bytes += Self.stretchBytes }
        bytes += size(word)
        present[stretch] += 1
        if word != Self.hole { paged[stretch] += 1 }
        directory[index].store(word, ordering: .releasing)
    }

    /// Publishes one entry. An absent page stays absent: the metadata knows.
    ///
    /// - Returns: the address of a page that has been replaced, to be freed once the epoch has
    ///   drained.
    func publish(_ block: UInt64, _ mapping: Mapping?) -> UInt? {
        let index = Int(block >> pageShift)
        let place = Int(block & (pageEntries - 1))
        let entry = mapping.map { ~$0.rawValue } ?? Self.unmappedWord
        let word = directory[index].load(ordering: .relaxed)
        if word == Self.absent { return nil }
        if word & (Self.hole | Self.packedBit) == 0 {
            let page = UnsafeMutablePointer<Atomic<UInt64>>(bitPattern: word)!
            page[place].store(entry, ordering: .releasing)
            return nil
        }
        var packed: PackedPage?
        if word & Self.packedBit != 0 {
            packed = PackedPage(word & ~Self.packedBit)
            if let slot = packed!.entry(place) {
                slot.pointee.store(entry, ordering: .releasing)
                return nil
            }
        }
        guard mapping != nil else { return nil }
        let page = emptyPage()
        packed?.forEach { place, entry in page[place].store(entry, ordering: .relaxed) }
        page[place].store(entry, ordering: .relaxed)
        bytes += pageBytes - size(word)
        if word == Self.hole { paged[index / Self.stretch] += 1 }
        directory[index].store(UInt(bitPattern: page), ordering: .releasing)
        return packed?.address
    }

    /// Takes every page out of the directory; `body` gets the address of each, to be freed once
    /// the epoch has drained.
    func removeAll(_ body: (UInt) -> Void) {
        for stretch in 0..<stretches where present[stretch] > 0 {
            for index in words(of: stretch) { remove(index, body) }
        }
    }

    /// Takes out what has at least `count` bytes, if there is as much, going on where the last call
    /// stopped; not the page that holds `block`. Pages go one by one; that there is none goes a
    /// stretch at a time. `body` gets the number and address of each page.
    func evict(
        bytes count: Int, keeping block: UInt64?, _ body: (_ page: UInt64, _ address: UInt) -> Void
    ) {
        let kept = block.map { Int($0 >> pageShift) }
        let goal = max(0, bytes - count)
        var looked = 0
        while bytes > goal, looked < pageCount {
            let stretch = hand / Self.stretch
            var next = hand + 1
            if paged[stretch] > 0 {
                if hand != kept, directory[hand].load(ordering: .relaxed) != Self.hole {
                    remove(hand) { body(UInt64(hand), $0) }
                }
            } else {
                let words = words(of: stretch)
                next = words.upperBound
                if present[stretch] > 0, kept.map(words.contains) != true {
                    for index in words { remove(index) { _ in } }
                }
            }
            looked += next - hand
            hand = next < pageCount ? next : 0
        }
    }
    private var hand = 0

    private func words(of stretch: Int) -> Range<Int> {
        stretch * Self.stretch..<min((stretch + 1) * Self.stretch, pageCount)
    }

    private func remove(_ index: Int, _ body: (UInt) -> Void) {
        let word = directory[index].load(ordering: .relaxed)
        if word == Self.absent { return }
        directory[index].store(Self.absent, ordering: .releasing)
        bytes -= size(word)
        let stretch = index / Self.stretch
        present[stretch] -= 1
        if word != Self.hole {
            paged[stretch] -= 1
            body(word & ~Self.packedBit)
        }
        if present[stretch] == 0 { release(stretch) }
    }

    /// Gives the memory of a stretch back whose words are all absent; they stay so.
    private func release(_ stretch: Int) {
        bytes -= Self.stretchBytes
        let memory = directory + stretch * Self.stretch
        if madvise(memory, Self.stretchBytes, MADV_DONTNEED_LOCKED) != 0 {
            madvise(memory, Self.stretchBytes, MADV_DONTNEED)
        }
    }

    private func size(_ word: UInt) -> Int {
        if word <= Self.hole { return 0 }
        return word & Self.packedBit == 0 ? pageBytes : PackedPage(word & ~Self.packedBit).size
    }

    private func emptyPage() -> UnsafeMutablePointer<Atomic<UInt64>> {
        // A page is zero, which reads as unmapped.
        let memory = aligned_alloc(64, pageBytes)!
        memset(memory, 0, pageBytes)
        return memory.bindMemory(to: Atomic<UInt64>.self, capacity: Int(pageEntries))
    }
}

/// A page with few entries: 8 words of bitmap, the number of entries before each of them in 16
/// bits, the entries.
private struct PackedPage {
    private static let words = 8
    private static let ranks = words * 8
    private static let entries = ranks + words * 2
    /// More than these would take more than half of a plain page.
    static func mostEntries(ofPageBytes bytes: Int) -> Int { max(0, bytes / 2 - entries) / 8 }
    /// What the allocator keeps for itself with each piece of memory.
    private static let overhead = 16

    private let memory: UnsafeMutableRawPointer

    @inline(__always) init(_ address: UInt) {
        memory = UnsafeMutableRawPointer(bitPattern: address)!
    }

    /// A new one with these entries, which are in ascending order.
    init(_ places: [(place: Int, word: UInt64)]) {
        memory = malloc(Self.entries + 8 * places.count)!
        memset(memory, 0, Self.entries)
        for (rank, (place, word)) in places.enumerated() {
            bitmap[place >> 6] |= 1 << UInt64(place & 63)
            entry(rank: rank).initialize(to: Atomic(word))
        }
        for word in 1..<Self.words {
            rank[word] = rank[word - 1] + UInt16(bitmap[word - 1].nonzeroBitCount)
        }
    }

    var address: UInt { UInt(bitPattern: memory) }
    var size: Int { Self.entries + 8 * count + Self.overhead }

    private var count: Int {
        Int(rank[Self.words - 1]) + bitmap[Self.words - 1].nonzeroBitCount
    }
    @inline(__always) private var bitmap: UnsafeMutablePointer<UInt64> {
        memory.assumingMemoryBound(to: UInt64.self)
    }
    @inline(__always) private var rank: UnsafeMutablePointer<UInt16> {
        (memory + Self.ranks).assumingMemoryBound(to: UInt16.self)
    }
    @inline(__always) private func entry(rank: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
        (memory + Self.entries).assumingMemoryBound(to: Atomic<UInt64>.self) + rank
    }

    /// Where the block's entry is, if it has one.
    @inline(__always) func entry(_ place: Int) -> UnsafeMutablePointer<Atomic<UInt64>>? {
        let word = bitmap[place >> 6]
        let bit = UInt64(1) << UInt64(place & 63)
        guard word & bit != 0 else { return nil }
        return entry(rank: Int(rank[place >> 6]) + (word & (bit - 1)).nonzeroBitCount)
    }

    func forEach(_ body: (_ place: Int, _ word: UInt64) -> Void) {
        for place in 0..<Self.words * 64 {
            if let slot = entry(place) { body(place, slot.pointee.load(ordering: .relaxed)) }
        }
    }
}
