// How another thread wakes one that waits in its IOQueue.

import CLinux
import Glibc

/// An eventfd: the waiting thread has `fileDescriptor` polled by its queue, calls `clear` when the
/// poll completes, looks at what it was woken for, and polls again.
public final class WakeEvent: Sendable {
    private let descriptor: OwnedDescriptor

    public var fileDescriptor: Int32 { descriptor.raw }

    public init() throws(DeviceError) {
        let raw = clinux_event_create()
        guard raw >= 0 else {
            throw DeviceError(
                operation: "set up", path: "eventfd", code: -raw, reason: SystemError.words(-raw))
        }
        descriptor = OwnedDescriptor(raw)
    }

    /// From any thread. Calls before the next `clear` count as one.
    public func signal() {
        clinux_event_signal(descriptor.raw)
    }

    public func clear() {
        clinux_event_clear(descriptor.raw)
    }
}
