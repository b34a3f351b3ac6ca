// Keeps what strangers can cause from filling the log: some lines, then one that counts the rest.

import Synchronization

package final class LogThrottle: Sendable {
    private struct State {
        var windowEnd: UInt64 = 0
        var said = 0
        var unsaid = 0
    }
    private let state = Mutex(State())

    private static let window: UInt64 = 10_000_000_000
    private static let linesInWindow = 10

    package init() {}

    /// Whether a line may be written at this time (nanoseconds); `missing`: so many were not,
    /// before it. Threads look at the clock before they come here, so one that comes later may bring
    /// an earlier time.
    package func admit(at now: UInt64) -> (isAllowed: Bool, missing: Int) {
        state.withLock { state in
            if now >= state.windowEnd {
                state.windowEnd = now + Self.window
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
