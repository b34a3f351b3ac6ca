// The pool's one lock, and the condition on which its worker sleeps.
//
// Reactors take it for what changes the map or misses the mapping table, never for a mapped,
// unshared block.

import Glibc
import Synchronization

final class PoolLock: @unchecked Sendable {
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>
    private let condition: UnsafeMutablePointer<pthread_cond_t>
    /// Threads that found the lock taken and have not got it yet.
    private let waiting = Atomic<Int>(0)
    /// How often somebody found it taken.
    private let contended = Atomic<UInt64>(0)
    private static let patience = 1000

    init() {
        mutex = .allocate(capacity: 1)
        mutex.initialize(to: pthread_mutex_t())
        condition = .allocate(capacity: 1)
        condition.initialize(to: pthread_cond_t())
        var attributes = pthread_condattr_t()
        precondition(pthread_mutex_init(mutex, nil) == 0)
        pthread_condattr_init(&attributes)
        // Deadlines are of the monotonic clock: setting the wall clock must not stall commits.
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        precondition(pthread_cond_init(condition, &attributes) == 0)
        pthread_condattr_destroy(&attributes)
    }

    deinit {
        pthread_cond_destroy(condition)
        pthread_mutex_destroy(mutex)
        condition.deallocate()
        mutex.deallocate()
    }

    func lock() {
        if pthread_mutex_trylock(mutex) == 0 { return }
        waiting.wrappingAdd(1, ordering: .relaxed)
        contended.wrappingAdd(1, ordering: .relaxed)
        pthread_mutex_lock(mutex)
        waiting.wrappingSubtract(1, ordering: .relaxed)
    }
    func unlock() { pthread_mutex_unlock(mutex) }

    /// Somebody waits for the lock.
    var isAwaited: Bool { waiting.load(ordering: .relaxed) > 0 }

    var contentions: UInt64 { contended.load(ordering: .relaxed) }

    /// For background work that has more to do: gives the lock up, and takes it again when those
    /// who wait have had it. A mutex alone would hand it back at once, before they are awake.
    func letOthersIn() {
        unlock()
        var patience = Self.patience
        repeat {
            sched_yield()
            patience -= 1
        } while waiting.load(ordering: .relaxed) > 0 && patience > 0
        lock()
    }

    func withLock<Value, Failure: Error>(_ body: () throws(Failure) -> Value) throws(Failure)
        -> Value
    {
        lock()
        defer { unlock() }
        return try body()
    }

    /// Wakes whoever waits. The lock is held.
    func signal() { pthread_cond_broadcast(condition) }

    /// Waits for `signal`, or until the monotonic `deadline` in nanoseconds. The lock is held.
    func wait(until deadline: UInt64?) {
        guard let deadline else {
            pthread_cond_wait(condition, mutex)
            return
        }
        var time = timespec(
            tv_sec: Int(deadline / 1_000_000_000), tv_nsec: Int(deadline % 1_000_000_000))
        pthread_cond_timedwait(condition, mutex, &time)
    }
}
