// Which flushes of the data device are under way, and who may not be answered yet.
//
// A failed flush may have lost what a later one then reports as safe: the device forgets what it
// could not write, and so does the kernel. So a flush counts only when every other that was under way
// while it ran has ended well, too; flushes come from all reactors and from the commit. Under the
// pool's lock.

import BlockIO
import Glibc

struct FlushLedger {
    typealias Ticket = UInt64

    private var next: Ticket = 1
    /// Ascending.
    private var underWay: [Ticket] = []
    /// Ended, and waiting for those that began before `bound`; ascending.
    private var waiting: [(bound: Ticket, waiters: [Pool.CommitWaiter])] = []

    mutating func begin() -> Ticket {
        defer { next += 1 }
        underWay.append(next)
        return next
    }

    /// - Returns: the bound for `isSettled`.
    mutating func end(_ ticket: Ticket) -> Ticket {
        underWay.removeAll { $0 == ticket }
        return next
    }

    /// Whether all flushes that were under way at that `end` have ended.
    func isSettled(_ bound: Ticket) -> Bool { underWay.first.map { $0 >= bound } ?? true }

    mutating func wait(_ waiters: [Pool.CommitWaiter], bound: Ticket) {
        waiting.append((bound, waiters))
    }

    /// Those that need not wait any longer; all of them when the pool has failed.
    mutating func takeSettled(all: Bool) -> [Pool.CommitWaiter] {
        var settled: [Pool.CommitWaiter] = []
        while let first = waiting.first, all || isSettled(first.bound) {
            settled += first.waiters
            waiting.removeFirst()
        }
        return settled
    }
}

extension Pool {
    /// A flush of the data device has ended. `waiters` are told when it is known to count.
    /// `error`: errno, 0 for none.
    func flushEnded(
        _ ticket: FlushLedger.Ticket, error: Int32, waiters: [CommitWaiter] = []
    ) -> FlushLedger.Ticket {
        let bound = flushes.end(ticket)
        flushes.wait(waiters, bound: bound)
        if error != 0 {
            // What was not flushed is lost, whoever wrote it: nothing may be promised any more.
            fail(
                PoolError(
                    .failed,
                    "the flush of the data device failed: \(SystemError.words(error))"))
        }
        tell(flushes.takeSettled(all: failure != nil), failure)
        lock.signal()
        return bound
    }
}
