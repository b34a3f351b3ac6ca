// The pool's background work as a state machine: commits, catalogue changes, discards passed down,
// deletions. It does no I/O: it says which I/Os to do and is told how they ended, so that a thread
// or a simulator can drive it.
//
//          ┌──────────────────────────── idle ◄───────────────────────────┐
//          │ freeze                        │ change of the catalogue       │
//          ▼                               ▼                               │
//     writeBlocks (data flush ∥ blocks)   writeCatalogue                   │
//          ▼                               ▼                               │
//     flushMetadata                       (a snapshot holds its origin and │
//          ▼                               waits; then) applied to the     │
//     writeSuperblock (FUA) ───────────────── open transaction ────────────┘
//
// 1. The superblock is written alone, after the data device and every block it refers to have been
//    flushed. An error anywhere before it means that it is not written.
// 2. The next transaction is open from the freeze on; nobody waits for a commit but who asked to.
// 3. A change of the catalogue and what it describes are in one transaction.

import BlockIO
import Glibc
import ThinMetadata

/// An I/O of the background work.
public enum WorkerIO {
    case flushData
    case flushMetadata
    /// Block `index` of the transaction.
    case writeMetadata(FrozenTransaction, index: Int)
    /// Block 0, on stable storage when it completes.
    case writeSuperblock(FrozenTransaction)
    case writeData(at: UInt64, from: UnsafeRawBufferPointer)
    case discardData(at: UInt64, length: UInt64)
}

public enum WorkerStep {
    /// Do these in any order, then call `stepDone` with one result each: 0 or errno.
    case io([WorkerIO])
    /// Call `nextStep` again at once; others may take the lock in between.
    case again
    /// Nothing to do until the pool signals, or until the time comes.
    case wait(until: UInt64?)
}

final class WorkerState {
    enum Activity {
        case idle
        case writeCatalogue
        case flushOnly
        case writeBlocks(FrozenTransaction)
        case flushMetadata(FrozenTransaction)
        case writeSuperblock(FrozenTransaction)
        case discard([DataBlock])
    }
    var activity = Activity.idle
    var hasIOInFlight = false
    /// The data device's flush of this step, and what has to have ended for it to count.
    var flushTicket: FlushLedger.Ticket = 0
    var flushBound: FlushLedger.Ticket = 0
    /// The transaction being committed, and who waits for it.
    var committing: UInt64 = 0
    var waiters: [Pool.CommitWaiter] = []
    var lastCommit: UInt64 = 0
    var discardRefused = false
    /// No metadata space to go on deleting, until something is committed.
    var deletionLacksSpace = false
    /// The last step gave back what was deleted: it may wait if there is anything else to do.
    var givesBack = false
    /// A commit was done since a discard or a slice of a deletion had its turn.
    var owesOthers = false

    var changes: [CatalogueChange] = []
    var current: PreparedChange?
    var isQuiesced = false
    /// `current` waits for the next commit to give metadata space back.
    var appliesAfterCommit = false

    var isIdle: Bool { if case .idle = activity { return true } else { return false } }

    func takeWaiters() -> [Pool.CommitWaiter] {
        defer { waiters = [] }
        return waiters
    }
}

extension Pool {
    /// What the background has to do next. The lock is held. `now`: monotonic nanoseconds.
    public func nextStep(now: UInt64) -> WorkerStep {
        precondition(!worker.hasIOInFlight, "one step at a time")
        if failure != nil { return afterFailure() }
        if hasRefusedSpace { watchSpace() }
        switch worker.activity {
        case .flushMetadata: return inFlight([.flushMetadata])
        case .writeSuperblock(let transaction):
            // A flush that began before ours may still fail, and with it what ours was to cover.
            guard flushes.isSettled(worker.flushBound) else { return .wait(until: nil) }
            return inFlight([.writeSuperblock(transaction)])
        default: break
        }
        if worker.current == nil, !worker.changes.isEmpty {
            if let io = prepareNext() {
                worker.activity = .writeCatalogue
                return inFlight(io)
            }
            return .again
        }
        if worker.isQuiesced {
            worker.isQuiesced = false
            apply()
            return .again
        }
        let due = metadata.hasChanges ? worker.lastCommit + options.commitInterval : UInt64.max
        if (commitRequested || now >= due) && !isReadOnly {
            // One piece of other work after each commit, however many commits are wanted.
            if worker.owesOthers, let step = otherWork() { return step }
            worker.owesOthers = true
            return startCommit(now: now)
        }
        if commitRequested {
            // Read-only: there is nothing to commit.
            commitRequested = false
            let waiters = commitWaiters
            commitWaiters = []
            tell(waiters, nil)
        }
        if let step = otherWork() { return step }
        return .wait(until: due == UInt64.max ? nil : due)
    }

    private func otherWork() -> WorkerStep? {
        worker.owesOthers = false
        return discards.isEmpty ? deletionStep() : startDiscards()
    }

    /// The I/Os of the last step are done. The lock is held.
    public func stepDone(_ results: [Int32], now: UInt64) {
        let activity = worker.activity
        worker.activity = .idle
        switch activity {
        case .flushOnly:
            worker.flushBound = flushEnded(
                worker.flushTicket, error: results[0], waiters: worker.takeWaiters())
        case .writeBlocks:
            worker.flushBound = flushEnded(worker.flushTicket, error: results[0])
        default: break
        }
        worker.hasIOInFlight = false
        if failure != nil {
            // If this was the superblock, the state that is read back is the new one.
            rollBack()
            return
        }
        let error = results.first { $0 != 0 }.map { SystemError.words($0) }
        switch activity {
        case .idle:
            preconditionFailure("no I/O was asked for")
        case .writeCatalogue:
            catalogueWritten(error)
        case .discard(let blocks):
            for result in results where result == EOPNOTSUPP || result == ENOTTY {
                worker.discardRefused = true
            }
            metadata.makeAvailable(blocks)
            refillSpareBlocks()
            resume(&spaceWaiters)
        case .flushOnly:
            break
        case .writeBlocks(let transaction):
            guard check(error, "commit, before its superblock was written,") else { return }
            worker.activity = .flushMetadata(transaction)
        case .flushMetadata(let transaction):
            guard check(error, "flush of the metadata device") else { return }
            worker.activity = .writeSuperblock(transaction)
        case .writeSuperblock(let transaction):
            guard check(error, "write of the superblock") else { return }
            committed(transaction)
        }
    }

    private func check(_ error: String?, _ what: String) -> Bool {
        guard let error else { return true }
        fail(PoolError(.failed, "the \(what) failed: \(error)"))
        return false
    }

    private func inFlight(_ io: [WorkerIO]) -> WorkerStep {
        worker.hasIOInFlight = true
        return .io(io)
    }

    private func afterFailure() -> WorkerStep {
        let error = failure!
        if let current = worker.current {
            worker.current = nil
            worker.activity = .idle
            current.bytes.deallocate()
            current.change.completion?(error)
        }
        let changes = worker.changes
        worker.changes = []
        for change in changes { change.completion?(error) }
        return .wait(until: nil)
    }

    // MARK: - Commit

    private func startCommit(now: UInt64) -> WorkerStep {
        commitRequested = false
        worker.lastCommit = now
        worker.waiters = commitWaiters
        commitWaiters = []
        guard metadata.hasChanges else {
            // Nothing to commit, but whoever waits also wants the data on stable storage.
            if worker.waiters.isEmpty { return .again }
            worker.activity = .flushOnly
            worker.flushTicket = flushes.begin()
            return inFlight([.flushData])
        }
        let transaction: FrozenTransaction
        do throws(MetadataError) { transaction = try metadata.freeze() } catch {
            fail(PoolError(error))
            return .again
        }
        worker.committing = openSequence
        openSequence += 1
        worker.activity = .writeBlocks(transaction)
        worker.flushTicket = flushes.begin()
        var io: [WorkerIO] = [.flushData]
        io.reserveCapacity(transaction.blocks + 1)
        for index in 0..<transaction.blocks {
            io.append(.writeMetadata(transaction, index: index))
        }
        return inFlight(io)
    }

    private func committed(_ transaction: FrozenTransaction) {
        let freed = metadata.committed(transaction)
        breakPinsInNeed()
        committedSuperblock.withUnsafeMutableBytes {
            transaction.copySuperblock(to: $0.baseAddress!)
        }
        durableSequence.store(worker.committing, ordering: .releasing)
        worker.deletionLacksSpace = false
        if freed.unshared { lastUnshared = epochs.retire() }
        if !freed.discarded.isEmpty || !freed.replaced.isEmpty {
            let stamp = epochs.retire()
            if !freed.discarded.isEmpty {
                addDrain(stamp, .blocks(freed.discarded, discard: true))
            }
            if !freed.replaced.isEmpty {
                addDrain(stamp, .blocks(freed.replaced, discard: false))
            }
            processDrains()
        }
        tell(worker.takeWaiters(), nil)
        // Before anybody else has what has come back.
        if worker.appliesAfterCommit { apply() }
        resume(&spaceWaiters)
        // Metadata blocks have come back too.
        resume(&metadataWaiters)
        watchSpace()
    }

    // MARK: - Discards

    private func startDiscards() -> WorkerStep {
        if !spaceWaiters.isEmpty {
            // Somebody waits for a block: passing it down is worth less than that.
            metadata.makeAvailable(discards.takeAll())
            refillSpareBlocks()
            resume(&spaceWaiters)
            return .again
        }
        worker.givesBack = true
        let runs = discards.take(runs: options.bounds.discardsPerStep)
        let blocks = runs.flatMap { $0 }
        worker.activity = .discard(blocks)
        return inFlight(
            runs.map { run in
                .discardData(
                    at: run.first!.rawValue * blockSize, length: UInt64(run.count) * blockSize)
            })
    }

    // MARK: - Deletion

    var nextDeletion: UInt32? {
        catalogue.deleting.first(where: { !forgotten.contains($0) })
    }

    /// One slice of the oldest deletion, or nil if there is none.
    private func deletionStep() -> WorkerStep? {
        guard !isReadOnly, !stopsDeleting, !worker.deletionLacksSpace,
            let id = nextDeletion
        else { return nil }
        if metadata.discardedBlocks >= options.bounds.deletionBatch {
            requestCommit()
            return .again
        }
        worker.givesBack = true
        do throws(MetadataError) {
            if try metadata.deleteSlice(ThinDeviceID(id), budget: options.bounds.deletionSlice) {
                forgotten.insert(id)
                enqueue(.forget(id), completion: nil)
            }
            endOperation()
        } catch {
            if case .outOfMetadataSpace = error {
                // The next commit gives back what the slices so far have freed; without one there is
                // nothing to be had, and it is tried again after some other commit.
                guard commitGivesBack else {
                    worker.deletionLacksSpace = true
                    return nil
                }
                requestCommit()
                return .again
            }
            fail(PoolError(error))
        }
        return .again
    }
}
