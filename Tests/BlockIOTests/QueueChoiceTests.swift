// Which kind of queue makeIOQueue gives, and the reason it tells. One test at a time, because one
// of them changes the environment that the others read.

import Foundation
import Testing

@testable import BlockIO

@Suite(.serialized) struct QueueChoiceTests {
    @Test func theChoiceIsExplained() throws {
        let (off, offReason) = try makeIOQueue(entries: 64, allowRing: false)
        #expect(off.name == "poll")
        #expect(offReason != nil)
        let (best, bestReason) = try makeIOQueue(entries: 64)
        #expect((best.name == "io_uring") == (bestReason == nil))
    }

    @Test func theEnvironmentForcesTheFallback() throws {
        setenv("WAFER_IO", "poll", 1)
        defer { unsetenv("WAFER_IO") }
        let (queue, reason) = try makeIOQueue(entries: 64)
        #expect(queue.name == "poll")
        #expect(reason?.contains("WAFER_IO") == true)
    }

    @Test(.enabled(if: QueueKind.available.contains(.ring), "this machine has no io_uring"))
    func theRingAcceptsAnyNumberOfEntries() throws {
        for entries in [0, 1, 3, 100_000] {
            let queue = try RingQueue(entries: entries)
            queue.timeout(nanoseconds: 0, tag: 1)
            var delivered = 0
            while delivered == 0 { try queue.run(wait: true) { _, _ in delivered += 1 } }
        }
    }
}
