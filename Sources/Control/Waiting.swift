// Waiting, for the threads that may: management verbs are asked for on one thread and answered on
// another.

import Glibc
import Synchronization

/// A value that one thread sets, once, and another waits for.
final class Latch<Value: Sendable>: @unchecked Sendable {
    private let value = Mutex<Value?>(nil)
    private let semaphore: UnsafeMutablePointer<sem_t>

    init() {
        semaphore = .allocate(capacity: 1)
        precondition(sem_init(semaphore, 0, 0) == 0)
    }

    deinit {
        sem_destroy(semaphore)
        semaphore.deallocate()
    }

    func set(_ new: Value) {
        value.withLock { $0 = new }
        sem_post(semaphore)
    }

    /// Nil if nobody has set it after so many milliseconds.
    func wait(milliseconds: Int) -> Value? {
        var deadline = timespec()
        clock_gettime(CLOCK_MONOTONIC, &deadline)
        let nanoseconds = deadline.tv_nsec + (milliseconds % 1000) * 1_000_000
        deadline.tv_sec += milliseconds / 1000 + nanoseconds / 1_000_000_000
        deadline.tv_nsec = nanoseconds % 1_000_000_000
        while sem_clockwait(semaphore, CLOCK_MONOTONIC, &deadline) != 0 {
            if errno != EINTR { return nil }
        }
        return value.withLock { $0 }
    }
}

func sleepMilliseconds(_ milliseconds: UInt32) { usleep(milliseconds * 1000) }

func monotonicMilliseconds() -> Int {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}
