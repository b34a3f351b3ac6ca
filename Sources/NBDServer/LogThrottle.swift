// Keeps what strangers can cause from filling the log: some lines, then one that counts the rest.

import Synchronization

final class LogThrottle: Sendable {
    private struct State {
        var windowStart: UInt64 = 0
        var said = 0
        var unsaid = 0
    }
    private let state = Mutex(State())

    private static let window: UInt64 = 10_000_000_000
    private static let linesInWindow = 10

    /// Whether a line may be written at this time (nanoseconds); `missing`: so many were not,
    /// before it.
    func admit(at now: UInt64) -> (isAllowed: Bool, missing: Int) {
        state.withLock { state in
            if now - state.windowStart >= Self.window {
                state.windowStart = now
                state.said = 0
            }
            guard state.said < Self.linesInWindow else {
                state.unsaid += 1
                return (false, 0)
            }
            state.said += 1
            let missing = state.unsaid
            state.unsaid = 0
            return (true, missing)
        }
    }
}
