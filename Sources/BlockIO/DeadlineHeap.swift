// PollQueue's timeouts, earliest first: a binary heap in memory that grows and is reused.

struct DeadlineHeap: ~Copyable {
    typealias Entry = (deadline: UInt64, tag: UInt64)

    private var entries: UnsafeMutablePointer<Entry>
    private var capacity = 16
    private var count = 0

    init() {
        entries = .allocate(capacity: capacity)
    }

    deinit {
        entries.deallocate()
    }

    var isEmpty: Bool { count == 0 }

    var first: Entry? { count == 0 ? nil : entries[0] }

    mutating func insert(_ deadline: UInt64, _ tag: UInt64) {
        if count == capacity { grow() }
        var place = count
        count += 1
        while place > 0 {
            let parent = (place - 1) / 2
            if entries[parent].deadline <= deadline { break }
            entries[place] = entries[parent]
            place = parent
        }
        entries[place] = (deadline, tag)
    }

    mutating func removeFirst() {
        precondition(count > 0, "no deadline is set")
        count -= 1
        let moved = entries[count]
        var place = 0
        while true {
            var child = place * 2 + 1
            if child >= count { break }
            if child + 1 < count && entries[child + 1].deadline < entries[child].deadline {
                child += 1
            }
            if entries[child].deadline >= moved.deadline { break }
            entries[place] = entries[child]
            place = child
        }
        entries[place] = moved
    }

    private mutating func grow() {
        let larger = UnsafeMutablePointer<Entry>.allocate(capacity: capacity * 2)
        larger.update(from: entries, count: count)
        entries.deallocate()
        entries = larger
        capacity *= 2
    }
}
