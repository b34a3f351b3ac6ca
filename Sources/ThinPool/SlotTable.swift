// A table of slots that never move: an index names a slot for as long as it is taken, and its
// address stays good for an I/O in flight. Grows by a chunk at a new high-water mark, so a steady
// load allocates nothing.
//
// What changes is behind a pointer and the methods do not mutate: so a class can hold these in
// `let`s, and the compiler does not check each access for overlaps at run time.

struct SlotTable<Element: BitwiseCopyable>: ~Copyable {
    private static var chunkSlots: Int { 1024 }
    /// 2^25 slots. A reactor has as many requests at most as all connections have slots for, and of
    /// steps few more.
    private static var maxChunks: Int { 32_768 }

    private struct State {
        var chunkCount = 0
        /// Free slots, most recently used last.
        var free: UnsafeMutablePointer<Int32>
        var freeCount = 0
    }

    private let chunks: UnsafeMutablePointer<UnsafeMutablePointer<Element>>
    private let state: UnsafeMutablePointer<State>
    private let initial: Element

    init(_ initial: Element) {
        self.initial = initial
        chunks = .allocate(capacity: Self.maxChunks)
        state = .allocate(capacity: 1)
        state.initialize(to: State(free: .allocate(capacity: 1)))
    }

    deinit {
        for i in 0..<state.pointee.chunkCount { chunks[i].deallocate() }
        chunks.deallocate()
        state.pointee.free.deallocate()
        state.deallocate()
    }

    @inline(__always)
    subscript(index: Int32) -> UnsafeMutablePointer<Element> {
        chunks[Int(index) >> 10] + (Int(index) & 1023)
    }

    @inline(__always)
    var taken: Int { state.pointee.chunkCount * Self.chunkSlots - state.pointee.freeCount }

    @inline(__always)
    func take() -> Int32 {
        if state.pointee.freeCount == 0 { grow() }
        state.pointee.freeCount -= 1
        return state.pointee.free[state.pointee.freeCount]
    }

    @inline(__always)
    func give(_ index: Int32) {
        state.pointee.free[state.pointee.freeCount] = index
        state.pointee.freeCount += 1
    }

    @inline(never)
    private func grow() {
        let count = state.pointee.chunkCount
        precondition(count < Self.maxChunks, "the server bounds its requests")
        let chunk = UnsafeMutablePointer<Element>.allocate(capacity: Self.chunkSlots)
        chunk.initialize(repeating: initial, count: Self.chunkSlots)
        chunks[count] = chunk
        let free = UnsafeMutablePointer<Int32>.allocate(capacity: (count + 1) * Self.chunkSlots)
        let first = Int32(count * Self.chunkSlots)
        for i in 0..<Int32(Self.chunkSlots) {
            free[Int(i)] = first + Int32(Self.chunkSlots) - 1 - i
        }
        state.pointee.free.deallocate()
        state.pointee = State(chunkCount: count + 1, free: free, freeCount: Self.chunkSlots)
    }
}

/// A first-in-first-out queue of slot indexes that keeps its memory.
struct IndexQueue: ~Copyable {
    private struct State {
        var ring: UnsafeMutablePointer<Int32>
        /// A power of two.
        var capacity: Int
        var head = 0
        var count = 0
    }
    private let state: UnsafeMutablePointer<State>

    init() {
        let capacity = 64
        state = .allocate(capacity: 1)
        state.initialize(to: State(ring: .allocate(capacity: capacity), capacity: capacity))
    }

    deinit {
        state.pointee.ring.deallocate()
        state.deallocate()
    }

    @inline(__always)
    var isEmpty: Bool { state.pointee.count == 0 }
    var count: Int { state.pointee.count }

    /// The value that is popped after so many others.
    subscript(place: Int) -> Int32 {
        state.pointee.ring[(state.pointee.head + place) & (state.pointee.capacity - 1)]
    }

    @inline(__always)
    func append(_ value: Int32) {
        if state.pointee.count == state.pointee.capacity { grow() }
        let place = (state.pointee.head + state.pointee.count) & (state.pointee.capacity - 1)
        state.pointee.ring[place] = value
        state.pointee.count += 1
    }

    @inline(__always)
    func popFirst() -> Int32? {
        if state.pointee.count == 0 { return nil }
        let value = state.pointee.ring[state.pointee.head]
        state.pointee.head = (state.pointee.head + 1) & (state.pointee.capacity - 1)
        state.pointee.count -= 1
        return value
    }

    @inline(never)
    private func grow() {
        let old = state.pointee
        let larger = UnsafeMutablePointer<Int32>.allocate(capacity: old.capacity * 2)
        for i in 0..<old.count { larger[i] = old.ring[(old.head + i) & (old.capacity - 1)] }
        old.ring.deallocate()
        state.pointee = State(ring: larger, capacity: old.capacity * 2, count: old.count)
    }
}
