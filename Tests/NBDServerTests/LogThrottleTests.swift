// What strangers can write into the log.

import NBDServer
import Testing

@Suite struct LogThrottleTests {
    private static let second: UInt64 = 1_000_000_000

    @Test func someLinesThenACountOfTheRest() {
        let throttle = LogThrottle()
        let start = 1000 * Self.second
        let allowed = (0..<25).filter { throttle.admit(at: start + UInt64($0)).isAllowed }
        #expect(allowed == Array(0..<10))
        let later = throttle.admit(at: start + 10 * Self.second)
        #expect(later.isAllowed && later.missing == 15)
        #expect(throttle.admit(at: start + 11 * Self.second).missing == 0)
    }

    /// Two reactors: the second looked at the clock first.
    @Test func anEarlierTimeAfterALaterOne() {
        let throttle = LogThrottle()
        let start = 1000 * Self.second
        #expect(throttle.admit(at: start).isAllowed)
        #expect(throttle.admit(at: start - 1).isAllowed)
    }
}
