// A table of slots that never move: an index names a slot for as long as it is taken, and its
// address stays good for an I/O in flight. Grows by a chunk at a new high-water mark, so a steady
// load allocates nothing.

struct SlotTable<Element: BitwiseCopyable>: ~Copyable {
    private static var chunkSlots: Int { 1024 }
    private static var maxChunks: Int { 4096 }

    private let chunks: UnsafeMutablePointer<UnsafeMutablePointer<Element>>
    private var chunkCount = 0
    /// Free slots, most recently used last.
    private var free: UnsafeMutablePointer<Int32>
    private var freeCount = 0
    private let initial: Element

    init(_ initial: Element) {
        self.initial = initial
        chunks = .allocate(capacity: Self.maxChunks)
        free = .allocate(capacity: 1)
    }

    deinit {
        for i in 0..<chunkCount { chunks[i].deallocate() }
        chunks.deallocate()
        free.deallocate()
    }

    @inline(__always)
    subscript(index: Int32) -> UnsafeMutablePointer<Element> {
        chunks[Int(index) >> 10] + (Int(index) & 1023)
    }

    mutating func take() -> Int32 {
        if freeCount == 0 { grow() }
        freeCount -= 1
        return free[freeCount]
    }

    mutating func give(_ index: Int32) {
        free[freeCount] = index
        freeCount += 1
    }

    private mutating func grow() {
        precondition(chunkCount < Self.maxChunks, "the server bounds its requests")
        let chunk = UnsafeMutablePointer<Element>.allocate(capacity: Self.chunkSlots)
        chunk.initialize(repeating: initial, count: Self.chunkSlots)
        chunks[chunkCount] = chunk
        chunkCount += 1
        let larger = UnsafeMutablePointer<Int32>.allocate(capacity: chunkCount * Self.chunkSlots)
        free.deallocate()
        free = larger
        let first = Int32((chunkCount - 1) * Self.chunkSlots)
        for i in 0..<Int32(Self.chunkSlots) {
            free[Int(i)] = first + Int32(Self.chunkSlots) - 1 - i
        }
        freeCount = Self.chunkSlots
    }
}

/// A first-in-first-out queue of slot indexes that keeps its memory.
struct IndexQueue: ~Copyable {
    private var ring: UnsafeMutablePointer<Int32>
    private var capacity = 64
    private var head = 0
    private(set) var count = 0

    init() { ring = .allocate(capacity: capacity) }
    deinit { ring.deallocate() }

    var isEmpty: Bool { count == 0 }

    /// The value that is popped after so many others.
    subscript(place: Int) -> Int32 { ring[(head + place) % capacity] }

    mutating func append(_ value: Int32) {
        if count == capacity {
            let larger = UnsafeMutablePointer<Int32>.allocate(capacity: capacity * 2)
            for i in 0..<count { larger[i] = ring[(head + i) % capacity] }
            ring.deallocate()
            ring = larger
            capacity *= 2
            head = 0
        }
        ring[(head + count) % capacity] = value
        count += 1
    }

    mutating func popFirst() -> Int32? {
        if count == 0 { return nil }
        let value = ring[head]
        head = (head + 1) % capacity
        count -= 1
        return value
    }
}
