// The map of one volume as the reactors read it: without a lock, without an allocation.
//
// A directory of pages; a page holds 512 consecutive virtual blocks. A page is either absent (ask
// the metadata), known to be all unmapped, or complete: every entry of a present page is known.
//
// 1. Written under the pool's lock only; read by anybody who has pinned the epoch.
// 2. A page that leaves the directory is freed only once its epoch has drained.
// 3. The table is a cache: what is not in it is in the metadata, never the other way round.

import Glibc
import Synchronization
import ThinMetadata

/// What the table knows of a virtual block.
enum TableEntry: Equatable {
    case unknown
    case unmapped
    case mapped(Mapping)
}

final class MappingTable: @unchecked Sendable {
    static let pageEntries: UInt64 = 512
    static let pageBytes = 4096
    private static let pageShift: UInt64 = 9

    /// Directory words: 0 absent, 1 all unmapped, else the page's address.
    private static let absent: UInt = 0
    private static let hole: UInt = 1
    /// Page words: the complement of the mapping, so that this, which would be the last block of
    /// a 2^40-block device at the last time, stands for "unmapped".
    private static let unmappedWord: UInt64 = 0

    let blocks: UInt64
    private let pageCount: Int
    private let directoryBytes: Int
    private let directory: UnsafeMutablePointer<Atomic<UInt>>
    /// Pages that are present, oldest first. Under the lock.
    private(set) var pages = 0

    init?(blocks: UInt64) {
        self.blocks = blocks
        pageCount = Int((blocks + Self.pageEntries - 1) >> Self.pageShift)
        directoryBytes = max(pageCount, 1) * MemoryLayout<Atomic<UInt>>.stride
        // Address space only: a page of the directory takes memory when it is first written.
        let memory = mmap(
            nil, directoryBytes, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let memory, memory != MAP_FAILED else { return nil }
        directory = memory.bindMemory(to: Atomic<UInt>.self, capacity: max(pageCount, 1))
    }

    deinit {
        removeAll { free(UnsafeMutableRawPointer(bitPattern: $0)) }
        munmap(directory, directoryBytes)
    }

    @inline(__always)
    func lookup(_ block: UInt64) -> TableEntry {
        let word = directory[Int(block >> Self.pageShift)].load(ordering: .acquiring)
        if word == Self.absent { return .unknown }
        if word == Self.hole { return .unmapped }
        let page = UnsafeMutablePointer<Atomic<UInt64>>(bitPattern: word)!
        let entry = page[Int(block & (Self.pageEntries - 1))].load(ordering: .acquiring)
        return entry == Self.unmappedWord ? .unmapped : .mapped(Mapping(rawValue: ~entry))
    }

    /// The virtual blocks of the page that holds `block`, clipped to the volume.
    func pageRange(of block: UInt64) -> Range<UInt64> {
        let first = block & ~(Self.pageEntries - 1)
        return first..<min(first + Self.pageEntries, blocks)
    }

    /// Adds a page whose entries `fill` tells: it calls its argument for every mapped block.
    func load<Failure: Error>(
        pageOf block: UInt64,
        fill: ((VirtualBlock, Mapping) -> Void) throws(Failure) -> Void
    ) throws(Failure) {
        let index = Int(block >> Self.pageShift)
        precondition(directory[index].load(ordering: .relaxed) == Self.absent)
        var page: UnsafeMutablePointer<Atomic<UInt64>>?
        do {
            try fill { block, mapping in
                if page == nil { page = Self.emptyPage() }
                page![Int(block.rawValue & (Self.pageEntries - 1))]
                    .store(~mapping.rawValue, ordering: .relaxed)
            }
        } catch {
            free(page)
            throw error
        }
        if page != nil { pages += 1 }
        directory[index].store(
            page.map { UInt(bitPattern: $0) } ?? Self.hole, ordering: .releasing)
    }

    /// Publishes one entry. An absent page stays absent: the metadata knows.
    func publish(_ block: UInt64, _ mapping: Mapping?) {
        let index = Int(block >> Self.pageShift)
        var word = directory[index].load(ordering: .relaxed)
        if word == Self.absent { return }
        if word == Self.hole {
            guard mapping != nil else { return }
            word = UInt(bitPattern: Self.emptyPage())
            pages += 1
            directory[index].store(word, ordering: .releasing)
        }
        let page = UnsafeMutablePointer<Atomic<UInt64>>(bitPattern: word)!
        page[Int(block & (Self.pageEntries - 1))].store(
            mapping.map { ~$0.rawValue } ?? Self.unmappedWord, ordering: .releasing)
    }

    /// Takes every page out of the directory; `body` gets the address of each, to be freed once
    /// the epoch has drained.
    func removeAll(_ body: (UInt) -> Void) {
        guard pages > 0 || pageCount > 0 else { return }
        for index in 0..<pageCount {
            let word = directory[index].load(ordering: .relaxed)
            if word == Self.absent { continue }
            directory[index].store(Self.absent, ordering: .releasing)
            if word != Self.hole { body(word) }
        }
        pages = 0
    }

    /// Takes up to `count` pages out, going on where the last call stopped; not the one that holds
    /// `block`.
    func evict(_ count: Int, keeping block: UInt64?, _ body: (UInt) -> Void) {
        let kept = block.map { Int($0 >> Self.pageShift) }
        var left = count
        var looked = 0
        while left > 0, looked < pageCount {
            let word = directory[hand].load(ordering: .relaxed)
            if word != Self.absent, word != Self.hole, hand != kept {
                directory[hand].store(Self.absent, ordering: .releasing)
                body(word)
                pages -= 1
                left -= 1
            }
            hand = (hand + 1) % pageCount
            looked += 1
        }
    }
    private var hand = 0

    private static func emptyPage() -> UnsafeMutablePointer<Atomic<UInt64>> {
        // A page is zero, which reads as unmapped.
        let memory = aligned_alloc(64, pageBytes)!
        memset(memory, 0, pageBytes)
        return memory.bindMemory(to: Atomic<UInt64>.self, capacity: Int(pageEntries))
    }
}
