// What waits for its turn, first in first out, in memory that grows and is reused.

public struct Fifo<Element: BitwiseCopyable>: ~Copyable {
    private var slots: UnsafeMutablePointer<Element>
    private var capacity: Int  // a power of two
    private var head = 0
    public private(set) var count = 0

    public init(capacity: Int) {
        precondition(capacity.nonzeroBitCount == 1, "places are found by a mask")
        slots = .allocate(capacity: capacity)
        self.capacity = capacity
    }

    deinit {
        slots.deallocate()
    }

    public var isEmpty: Bool { count == 0 }

    public mutating func append(_ element: Element) {
        if count == capacity { grow() }
        slots[(head + count) & (capacity - 1)] = element
        count += 1
    }

    public mutating func removeFirst() -> Element {
        precondition(count > 0, "nothing is waiting")
        let first = slots[head]
        head = (head + 1) & (capacity - 1)
        count -= 1
        return first
    }

    private mutating func grow() {
        let larger = UnsafeMutablePointer<Element>.allocate(capacity: capacity * 2)
        for index in 0..<count {
            larger[index] = slots[(head + index) & (capacity - 1)]
        }
        slots.deallocate()
        slots = larger
        capacity *= 2
        head = 0
    }
}
