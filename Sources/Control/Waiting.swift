// Waiting, for the threads that may: management verbs are asked for on one thread and answered on
// another.

import BlockIO
import Dispatch
import Glibc
import Synchronization

/// A value that one thread sets, once, and another waits for.
final class Latch<Value: Sendable>: Sendable {
    private let value = Mutex<Value?>(nil)
    private let semaphore = DispatchSemaphore(value: 0)

    func set(_ new: Value) {
        value.withLock { $0 = new }
        semaphore.signal()
    }

    /// Nil if nobody has set it after so many milliseconds.
    func wait(milliseconds: Int) -> Value? {
        guard semaphore.wait(timeout: .now() + .milliseconds(milliseconds)) == .success else {
            return nil
        }
        return value.withLock { $0 }
    }
}

func sleepMilliseconds(_ milliseconds: UInt32) { usleep(milliseconds * 1000) }

func monotonicMilliseconds() -> Int { Int(monotonicNanoseconds() / 1_000_000) }
