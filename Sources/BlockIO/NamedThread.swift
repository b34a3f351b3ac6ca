// Threads with names, which ps and debuggers show.

import CLinux
import Glibc

private final class ThreadBody: Sendable {
    let name: String
    let run: @Sendable () -> Void
    init(_ name: String, _ run: @escaping @Sendable () -> Void) {
        self.name = name
        self.run = run
    }
}

/// A thread that is to be joined or detached. The kernel keeps 15 bytes of its name.
package func startThread(
    named name: String, _ body: @escaping @Sendable () -> Void
) throws(DeviceError) -> pthread_t {
    var thread = pthread_t()
    let argument = Unmanaged.passRetained(ThreadBody(name, body))
    let code = pthread_create(
        &thread, nil,
        { argument in
            let thread = Unmanaged<ThreadBody>.fromOpaque(argument!).takeRetainedValue()
            clinux_name_thread(thread.name)
            thread.run()
            return nil
        }, argument.toOpaque())
    guard code == 0 else {
        argument.release()
        throw DeviceError(
            operation: "start", path: "the thread \(name)", code: code,
            reason: SystemError.words(code))
    }
    return thread
}
