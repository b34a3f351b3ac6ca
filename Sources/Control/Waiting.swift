// Waiting, for the threads that may: management verbs are asked for on one thread and answered on
// another.

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

func monotonicMilliseconds() -> Int {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}

private final class ThreadBody: Sendable {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
}

/// A thread that is to be joined or detached; nil: the system gives no more of them.
func startThread(_ body: @escaping @Sendable () -> Void) -> pthread_t? {
    var thread = pthread_t()
    let argument = Unmanaged.passRetained(ThreadBody(body))
    let code = pthread_create(
        &thread, nil,
        { argument in
            Unmanaged<ThreadBody>.fromOpaque(argument!).takeRetainedValue().run()
            return nil
        }, argument.toOpaque())
    guard code == 0 else {
        argument.release()
        return nil
    }
    return thread
}
