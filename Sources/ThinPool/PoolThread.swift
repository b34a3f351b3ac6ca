// The thread that does the pool's background work on real devices.
//
// It sleeps on the pool's condition, takes one step at a time, and does the step's I/Os together:
// the data flush runs while metadata blocks are written.

import BlockIO
import Glibc
import Synchronization
import ThinMetadata

public final class PoolThread: @unchecked Sendable {
    /// Metadata blocks in flight at once.
    private static let batchBlocks = 256
    private static let queueEntries = 512
    /// Nanoseconds between two looks at what still keeps the pool from closing.
    private static let stopPoll: UInt64 = 1_000_000

    private let pool: Pool
    private let metadata: FileDevice
    private let data: FileDevice
    private var thread = pthread_t()
    private var isStopping = false
    private var isDraining = false
    private var lastContentions: UInt64 = 0
    private var queue: (any IOQueue)?
    private let buffer: UnsafeMutableRawPointer
    private let vectors: UnsafeMutablePointer<iovec>

    public init(pool: Pool, metadata: FileDevice, data: FileDevice) {
        self.pool = pool
        self.metadata = metadata
        self.data = data
        buffer = aligned_alloc(4096, Self.batchBlocks * Layout.blockSize)!
        vectors = .allocate(capacity: Self.batchBlocks)
    }

    deinit {
        free(buffer)
        vectors.deallocate()
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
            isDraining = deletions
            pool.stopsDeleting = !deletions
            pool.lock.signal()
        }
        pthread_join(thread, nil)
        return pool.lock.withLock { pool.failure }
    }

    private func run() {
        let nodes = pool.makeNodeReader()
        queue = try? makeIOQueue(
            entries: Self.queueEntries, allowRing: pool.options.allowRing
        ).0
        pool.lock.lock()
        defer { pool.lock.unlock() }
        while true {
            let began = monotonicNanoseconds()
            if pool.worker.isIdle { pool.readAheadOfDeletion(nodes) }
            switch pool.nextStep(now: began) {
            case .io(let io):
                pool.lock.unlock()
                let results = perform(io)
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
            monotonicNanoseconds() < deadline
        {
            pool.lock.wait(until: deadline)
        }
    }

    // MARK: - I/O

    private func perform(_ io: [WorkerIO]) -> [Int32] {
        var results = [Int32](repeating: 0, count: io.count)
        guard let queue else {
            for (index, operation) in io.enumerated() { results[index] = performAlone(operation) }
            return results
        }
        var writes: [(index: Int, transaction: FrozenTransaction, block: Int)] = []
        var outstanding = 0
        for (index, operation) in io.enumerated() {
            let tag = UInt64(index)
            switch operation {
            case .flushData:
                queue.flush(data.fileDescriptor, tag: tag)
                outstanding += 1
            case .flushMetadata:
                queue.flush(metadata.fileDescriptor, tag: tag)
                outstanding += 1
            case .writeMetadata(let transaction, let block):
                writes.append((index, transaction, block))
            case .writeSuperblock, .writeData, .discardData:
                results[index] = performAlone(operation)
            }
        }
        // The flush of the data device is under way while the blocks are written in batches.
        var next = 0
        repeat {
            var inBatch = 0
            var runs: [(offset: UInt64, start: Int, count: Int, index: Int)] = []
            while next < writes.count, inBatch < Self.batchBlocks {
                let (index, transaction, block) = writes[next]
                let number = transaction.copyBlock(
                    block, to: buffer + inBatch * Layout.blockSize)
                let offset = number.rawValue * UInt64(Layout.blockSize)
                if let last = runs.last,
                    last.offset + UInt64(last.count * Layout.blockSize) == offset
                {
                    runs[runs.count - 1].count += 1
                } else {
                    runs.append((offset, inBatch, 1, index))
                }
                inBatch += 1
                next += 1
            }
            for (number, run) in runs.enumerated() {
                vectors[number] = iovec(
                    iov_base: buffer + run.start * Layout.blockSize,
                    iov_len: run.count * Layout.blockSize)
                queue.write(
                    metadata.fileDescriptor, at: run.offset, vectors: vectors + number, count: 1,
                    tag: UInt64(io.count + number))
            }
            outstanding += runs.count
            // The buffer is used again only when every write of the batch is done.
            var writing = runs.count
            let isLast = next == writes.count
            while isLast ? outstanding > 0 : writing > 0 {
                do throws(DeviceError) {
                    try queue.run(wait: true) { tag, result in
                        outstanding -= 1
                        if tag < UInt64(io.count) {
                            if result < 0 { results[Int(tag)] = -result }
                        } else {
                            writing -= 1
                            let run = runs[Int(tag) - io.count]
                            if Int(result) != run.count * Layout.blockSize {
                                results[run.index] = finish(run, result)
                            }
                        }
                    }
                } catch {
                    // The kernel lost our ring: nothing is known of what was in flight.
                    return [Int32](repeating: EIO, count: io.count)
                }
            }
        } while next < writes.count
        return results
    }

    /// A run that was written short is written again in full.
    private func finish(
        _ run: (offset: UInt64, start: Int, count: Int, index: Int), _ result: Int32
    ) -> Int32 {
        if result < 0 && result != -EAGAIN && result != -EINTR { return -result }
        do throws(DeviceError) {
            try metadata.write(
                at: run.offset,
                from: UnsafeRawBufferPointer(
                    start: buffer + run.start * Layout.blockSize,
                    count: run.count * Layout.blockSize))
            return 0
        } catch { return error.code == 0 ? EIO : error.code }
    }

    private func performAlone(_ operation: WorkerIO) -> Int32 {
        do throws(DeviceError) {
            switch operation {
            case .flushData: try data.flush()
            case .flushMetadata: try metadata.flush()
            case .writeMetadata(let transaction, let index):
                let number = transaction.copyBlock(index, to: buffer)
                try metadata.write(
                    at: number.rawValue * UInt64(Layout.blockSize),
                    from: UnsafeRawBufferPointer(start: buffer, count: Layout.blockSize))
            case .writeSuperblock(let transaction):
                transaction.copySuperblock(to: buffer)
                try metadata.write(
                    at: 0, from: UnsafeRawBufferPointer(start: buffer, count: Layout.blockSize))
                try metadata.flush()
            case .writeData(let offset, let bytes):
                try data.write(at: offset, from: bytes)
            case .discardData(let offset, let length):
                try data.discard(at: offset, length: length)
            }
            return 0
        } catch { return error.code == 0 ? EIO : error.code }
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
