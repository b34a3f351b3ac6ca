// Signals as something that an IOQueue can wait for.

import CLinux
import Glibc

/// A signalfd: has `fileDescriptor` polled by a queue and gives the signals with `take`.
public final class SignalEvent: Sendable {
    private let descriptor: OwnedDescriptor

    public var fileDescriptor: Int32 { descriptor.raw }

    /// Blocks `signals` in the calling thread. Make it before starting other threads, which
    /// inherit that; a thread that does not would take the signal away.
    public init(_ signals: [Int32]) throws(DeviceError) {
        let raw = clinux_signal_create(signals, Int32(signals.count))
        guard raw >= 0 else {
            throw DeviceError(
                operation: "set up", path: "signalfd", code: -raw, reason: SystemError.words(-raw))
        }
        descriptor = OwnedDescriptor(raw)
    }

    /// The number of a signal that has come, or nil.
    public func take() -> Int32? {
        let signal = clinux_signal_take(descriptor.raw)
        return signal > 0 ? signal : nil
    }
}
