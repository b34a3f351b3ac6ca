// The thread that does the pool's background work on real devices.
//
// It sleeps on the pool's condition, takes one step at a time, and has the step's I/O done.

import BlockIO
import Glibc

public final class PoolThread: @unchecked Sendable {
    /// Nanoseconds between two looks at what still keeps the pool from closing.
    private static let stopPoll: UInt64 = 1_000_000

    private let pool: Pool
    private let metadata: FileDevice
    private let data: FileDevice
    private var thread = pthread_t()
    private var isStopping = false
    private var lastContentions: UInt64 = 0

    public init(pool: Pool, metadata: FileDevice, data: FileDevice) {
        self.pool = pool
        self.metadata = metadata
        self.data = data
    }

    public func start() throws(DeviceError) {
        thread = try startThread(named: "wafer-pool") { self.run() }
    }

    /// Commits what is open, finishes what was asked for, and ends the thread.
    ///
    /// - Parameter deletions: also wait until deleted volumes have given back their blocks.
    /// - Returns: the pool's failure, if it has failed.
    public func stop(finishingDeletions deletions: Bool = false) -> PoolError? {
        pool.lock.withLock {
            isStopping = true
            pool.stopsDeleting = !deletions
            pool.lock.signal()
        }
        pthread_join(thread, nil)
        return pool.lock.withLock { pool.failure }
    }

    private func run() {
        let nodes = pool.makeNodeReader()
        let devices = WorkerDevices(
            metadata: metadata, data: data, allowRing: pool.options.allowRing)
        pool.lock.lock()
        defer { pool.lock.unlock() }
        while true {
            let began = monotonicNanoseconds()
            if pool.worker.isIdle { pool.readAheadOfDeletion(nodes) }
            switch pool.nextStep(now: began) {
            case .io(let io):
                pool.lock.unlock()
                let results = devices.perform(io)
                pool.lock.lock()
                pool.stepDone(results, now: monotonicNanoseconds())
                rest(since: began)
            case .again:
                pool.lock.letOthersIn()
                rest(since: began)
            case .wait(let deadline):
                if isStopping {
                    if pool.failure != nil || pool.isAtRest { return }
                    pool.requestCommit()
                    // Reactors may still have I/O to end.
                    pool.lock.wait(until: monotonicNanoseconds() + Self.stopPoll)
                } else {
                    pool.lock.wait(until: deadline)
                }
            }
        }
    }

    /// Giving back what was deleted takes at most half of the time: on a machine with few
    /// processors it would otherwise keep one of them from those who serve. A fifth, if others want
    /// the lock.
    private func rest(since began: UInt64) {
        guard pool.worker.givesBack else { return }
        pool.worker.givesBack = false
        let now = monotonicNanoseconds()
        let contentions = pool.lock.contentions
        let share: UInt64 = contentions == lastContentions ? 1 : 4
        lastContentions = contentions
        let deadline = now + share * (now - began)
        while !isStopping, !pool.commitRequested, pool.worker.changes.isEmpty,
            !pool.worker.isQuiesced, pool.failure == nil, monotonicNanoseconds() < deadline
        {
            pool.lock.wait(until: deadline)
        }
    }
}

extension Pool {
    /// Deleted volumes that still have blocks.
    var deletionsLeft: Int { catalogue.deleting.count { !forgotten.contains($0) } }

    /// There is something left of them, and metadata space to go on.
    public var isDeleting: Bool {
        lock.withLock { deletionsLeft > 0 && !worker.deletionLacksSpace }
    }

    /// Nothing is left to do before the pool is closed. The lock is held.
    public var isAtRest: Bool {
        isReadOnly
            || (worker.isIdle && !metadata.hasChanges && !commitRequested && worker.changes.isEmpty
                && worker.current == nil && discards.isEmpty
                && (stopsDeleting || worker.deletionLacksSpace || deletionsLeft == 0))
    }
}
