// PollQueue's operations that would block: for each descriptor a list of those that wait to read
// and one of those that wait to write, oldest first. The memory grows and is reused.

struct WaitingOperation {
    enum Kind { case receive, send, accept, poll }
    enum Direction: CaseIterable { case input, output }

    var kind: Kind
    var fd: Int32
    var tag: UInt64
    /// receive: the buffer; send: the msghdr.
    var memory: UnsafeMutableRawPointer?
    var length = 0
    /// The next in the same list, or in the list of free slots.
    fileprivate var next = WaitingOperations.none

    init(
        kind: Kind, fd: Int32, tag: UInt64, memory: UnsafeMutableRawPointer? = nil, length: Int = 0
    ) {
        self.kind = kind
        self.fd = fd
        self.tag = tag
        self.memory = memory
        self.length = length
    }

    var direction: Direction { kind == .send ? .output : .input }
}

struct WaitingOperations: ~Copyable {
    /// The index that ends a list.
    fileprivate static let none: Int32 = -1

    private struct List {
        var first = WaitingOperations.none
        var last = WaitingOperations.none
    }

    private var slots: UnsafeMutablePointer<WaitingOperation>
    private var slotCount = 64
    private var free = none
    /// Two lists a descriptor: input, output.
    private var lists: UnsafeMutablePointer<List>
    private var descriptorCount = 64
    private var count = 0

    init() {
        slots = .allocate(capacity: slotCount)
        lists = .allocate(capacity: descriptorCount * 2)
        lists.initialize(repeating: List(), count: descriptorCount * 2)
        addFree(0..<slotCount)
    }

    deinit {
        slots.deallocate()
        lists.deallocate()
    }

    var isEmpty: Bool { count == 0 }

    func first(_ fd: Int32, _ direction: WaitingOperation.Direction) -> WaitingOperation? {
        guard fd >= 0, fd < descriptorCount else { return nil }
        let index = lists[Self.place(fd, direction)].first
        return index == Self.none ? nil : slots[Int(index)]
    }

    mutating func append(_ operation: WaitingOperation) {
        if operation.fd >= descriptorCount { growLists(past: Int(operation.fd)) }
        if free == Self.none { growSlots() }
        let index = free
        free = slots[Int(index)].next
        slots[Int(index)] = operation
        slots[Int(index)].next = Self.none
        let place = Self.place(operation.fd, operation.direction)
        if lists[place].first == Self.none {
            lists[place].first = index
        } else {
            slots[Int(lists[place].last)].next = index
        }
        lists[place].last = index
        count += 1
    }

    mutating func removeFirst(_ fd: Int32, _ direction: WaitingOperation.Direction) {
        let place = Self.place(fd, direction)
        let index = lists[place].first
        precondition(index != Self.none, "no operation waits")
        lists[place].first = slots[Int(index)].next
        slots[Int(index)].next = free
        free = index
        count -= 1
    }

    private static func place(_ fd: Int32, _ direction: WaitingOperation.Direction) -> Int {
        Int(fd) * 2 + (direction == .input ? 0 : 1)
    }

    private mutating func addFree(_ range: Range<Int>) {
        for index in range {
            var slot = WaitingOperation(kind: .poll, fd: -1, tag: 0)
            slot.next = free
            slots[index] = slot
            free = Int32(index)
        }
    }

    private mutating func growSlots() {
        let larger = UnsafeMutablePointer<WaitingOperation>.allocate(capacity: slotCount * 2)
        larger.update(from: slots, count: slotCount)
        slots.deallocate()
        slots = larger
        addFree(slotCount..<slotCount * 2)
        slotCount *= 2
    }

    private mutating func growLists(past fd: Int) {
        var larger = descriptorCount
        while larger <= fd { larger *= 2 }
        let grown = UnsafeMutablePointer<List>.allocate(capacity: larger * 2)
        grown.initialize(repeating: List(), count: larger * 2)
        grown.update(from: lists, count: descriptorCount * 2)
        lists.deallocate()
        lists = grown
        descriptorCount = larger
    }
}
