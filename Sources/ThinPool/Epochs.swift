// Who might still touch a block or a table page that the map no longer shows.
//
// A reactor pins the epoch before it reads the mapping table, and stays pinned until the last I/O
// that it started under that pin has ended. What the map gives up is stamped with the epoch of
// that moment; it is free once no reactor is pinned at the stamp or before.
//
// 1. A reader publishes its pin before it loads a mapping (a full fence lies between).
// 2. The pool unpublishes a mapping before it takes a stamp, and takes the stamp before it looks
//    at the pins. So a reader either shows up in the pins or sees the new mapping.

import Synchronization

package final class Epochs: @unchecked Sendable {
    package static let idle = UInt64.max
    static let maxReaders = 512
    /// Slots lie two cache lines apart, so that reactors do not share one.
    private static let stride = 16

    private let current = Atomic<UInt64>(1)
    private let slots: UnsafeMutablePointer<Atomic<UInt64>>
    /// Under the pool's lock.
    private var taken = [Bool](repeating: false, count: Epochs.maxReaders)

    package init() {
        slots = .allocate(capacity: Self.maxReaders * Self.stride)
        for i in 0..<(Self.maxReaders * Self.stride) {
            (slots + i).initialize(to: Atomic<UInt64>(Self.idle))
        }
    }

    deinit { slots.deallocate() }

    /// A reader's slot. The pool's lock is held.
    package func register() -> Int {
        guard let free = taken.firstIndex(of: false) else {
            preconditionFailure("more than \(Self.maxReaders) reactors")
        }
        taken[free] = true
        return free
    }

    func unregister(_ reader: Int) {
        publish(reader, Self.idle)
        taken[reader] = false
    }

    package var now: UInt64 { current.load(ordering: .sequentiallyConsistent) }

    /// Pins `epoch` (or nothing: `idle`) for a reader; loads that follow are ordered after it.
    package func publish(_ reader: Int, _ epoch: UInt64) {
        slots[reader * Self.stride].store(epoch, ordering: .sequentiallyConsistent)
        atomicMemoryFence(ordering: .sequentiallyConsistent)
    }

    /// The stamp of what was unpublished just before the call.
    func retire() -> UInt64 {
        current.wrappingAdd(1, ordering: .sequentiallyConsistent).oldValue
    }

    /// True once nobody can touch what was stamped with `stamp`.
    func hasDrained(_ stamp: UInt64) -> Bool {
        atomicMemoryFence(ordering: .sequentiallyConsistent)
        for reader in 0..<Self.maxReaders where taken[reader] {
            if slots[reader * Self.stride].load(ordering: .sequentiallyConsistent) <= stamp {
                return false
            }
        }
        return true
    }
}

/// The pins of one reactor: how many I/Os are in flight from which epoch on.
///
/// A ring of (epoch, count). When it is full a new I/O joins the youngest entry, whose older epoch
/// only delays what waits for it.
package struct EpochPins: ~Copyable {
    private static let capacity = 256

    private struct State {
        var head = 0
        var used = 0
    }
    // Behind pointers, as in SlotTable.
    private let state: UnsafeMutablePointer<State>
    private let epochs: UnsafeMutablePointer<UInt64>
    private let counts: UnsafeMutablePointer<UInt32>

    package init() {
        state = .allocate(capacity: 1)
        state.initialize(to: State())
        epochs = .allocate(capacity: Self.capacity)
        counts = .allocate(capacity: Self.capacity)
        epochs.initialize(repeating: 0, count: Self.capacity)
        counts.initialize(repeating: 0, count: Self.capacity)
    }

    deinit {
        state.deallocate()
        epochs.deallocate()
        counts.deallocate()
    }

    /// The oldest epoch with I/O in flight, or `Epochs.idle`.
    var oldest: UInt64 {
        state.pointee.used == 0 ? Epochs.idle : epochs[state.pointee.head]
    }

    /// Counts one I/O in `epoch`; give the result back to `leave`.
    package func enter(_ epoch: UInt64) -> UInt16 {
        if state.pointee.used > 0 {
            let last = (state.pointee.head + state.pointee.used - 1) % Self.capacity
            if epochs[last] == epoch || state.pointee.used == Self.capacity {
                counts[last] += 1
                return UInt16(last)
            }
        }
        let slot = (state.pointee.head + state.pointee.used) % Self.capacity
        state.pointee.used += 1
        epochs[slot] = epoch
        counts[slot] = 1
        return UInt16(slot)
    }

    package func leave(_ pin: UInt16) {
        precondition(counts[Int(pin)] > 0, "an I/O left twice: its block could be reused too early")
        counts[Int(pin)] -= 1
        while state.pointee.used > 0, counts[state.pointee.head] == 0 {
            state.pointee.head = (state.pointee.head + 1) % Self.capacity
            state.pointee.used -= 1
        }
    }
}
