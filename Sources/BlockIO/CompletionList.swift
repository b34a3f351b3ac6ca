// Completions waiting to be delivered, first in first out, in memory that grows and is reused.

struct CompletionList: ~Copyable {
    typealias Completion = (tag: UInt64, result: Int32)

    private var slots: UnsafeMutablePointer<Completion>
    private var capacity: Int  // a power of two
    private var head = 0
    private(set) var count = 0

    init(capacity: Int) {
        precondition(capacity.nonzeroBitCount == 1, "places are found by a mask")
        slots = .allocate(capacity: capacity)
        self.capacity = capacity
    }

    deinit {
        slots.deallocate()
    }

    var isEmpty: Bool { count == 0 }

    mutating func append(_ tag: UInt64, _ result: Int32) {
        if count == capacity { grow() }
        slots[(head + count) & (capacity - 1)] = (tag, result)
        count += 1
    }

    mutating func removeFirst() -> Completion {
        precondition(count > 0, "no completion is waiting")
        let first = slots[head]
        head = (head + 1) & (capacity - 1)
        count -= 1
        return first
    }

    private mutating func grow() {
        let larger = UnsafeMutablePointer<Completion>.allocate(capacity: capacity * 2)
        for index in 0..<count {
            larger[index] = slots[(head + index) & (capacity - 1)]
        }
        slots.deallocate()
        slots = larger
        capacity *= 2
        head = 0
    }
}
