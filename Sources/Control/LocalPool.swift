// A pool that this process has open: both devices, held exclusively, and the thread that commits.
//
// 1. The devices are locked from `init` until the object goes.
// 2. Whoever opened it to change it calls `close`: what is not committed by then is lost.

import BlockIO
import Logging
import ThinMetadata
import ThinPool

public final class LocalPool: PoolManager, @unchecked Sendable {
    public enum Purpose: Sendable {
        /// Nothing is written, no thread is started.
        case inspect
        case change
    }

    public let directory: PoolDirectory
    public let metadata: FileDevice
    public let data: FileDevice
    public let pool: Pool
    private let thread: PoolThread?
    private let purpose: Purpose
    /// Why the metadata may run out of space before it is full; nil: it cannot.
    let shortage: String?

    /// Milliseconds between two signs of life while a change takes its time.
    private static let pulse = 1000

    /// - Parameter logger: hears of the pool's failure, and of space that becomes scarce.
    public init(
        _ directory: PoolDirectory, purpose: Purpose, options: PoolOptions = PoolOptions(),
        logger: Logger? = nil
    ) throws(ControlError) {
        self.directory = directory
        self.purpose = purpose
        var options = options
        if purpose == .inspect { options.readOnly = true }
        let access: FileDevice.Access = options.readOnly ? .readOnly : .readWrite
        do throws(DeviceError) {
            metadata = try FileDevice(path: directory.metadataPath, access: access)
            data = try FileDevice(path: directory.dataPath, access: access)
        } catch { throw ControlError(error) }
        shortage = options.readOnly ? nil : Self.reserve(metadata)
        do throws(PoolError) {
            pool = try Pool(metadata: metadata, data: data, options: options)
        } catch {
            var failure = ControlError(error)
            failure.message = "cannot open the pool \(directory.path): \(failure.message)"
            throw failure
        }
        guard purpose == .change else {
            thread = nil
            return
        }
        if let logger {
            // Before there is a thread that may have something to tell.
            pool.onFailure = { error in
                logger.critical("the pool has failed and takes no more writes: \(error)")
            }
            pool.onSpaceWarning = { logger.warning("\($0)") }
        }
        thread = PoolThread(pool: pool, metadata: metadata, data: data)
        do throws(DeviceError) { try thread?.start() } catch { throw ControlError(error) }
    }

    /// Pools from before metadata files had their space from the start get it now. That there is none
    /// is no reason to refuse the pool: deleting and discarding may be what makes room.
    private static func reserve(_ metadata: FileDevice) -> String? {
        do throws(DeviceError) { try metadata.reserve() } catch {
            return "a commit may find no space, and the pool fails then: \(error)"
        }
        return nil
    }

    /// Commits, and ends the thread. The pool is of no use afterwards.
    ///
    /// - Parameter deletions: wait until deleted volumes have given back their blocks; otherwise
    ///   that goes on when the pool is next opened.
    public func close(finishingDeletions deletions: Bool = false) throws(ControlError) {
        if let failure = thread?.stop(finishingDeletions: deletions) {
            throw ControlError(
                .refused, "the pool \(directory.path) has failed: \(failure.message)")
        }
    }

    // MARK: - PoolManager

    public var isRemote: Bool { false }

    public func status() throws(ControlError) -> PoolStatus {
        var status = pool.status()
        if let shortage { status.problems.append(shortage) }
        if purpose == .inspect && status.mode == .readOnly {
            // Only this look at it is; what the next server will say is asked for.
            status.mode = status.needsCheck ? .readOnly : .writable
            status.reason = status.needsCheck ? "its metadata needs a check" : nil
        }
        return status
    }

    public func volumes() throws(ControlError) -> [VolumeInfo] {
        do throws(PoolError) { return try pool.volumeList() } catch { throw ControlError(error) }
    }

    public func change(_ change: PoolChange) throws(ControlError) {
        try self.change(change) {}
    }

    /// - Parameter pulse: called about once a second while it takes that long.
    func change(_ change: PoolChange, pulse: () -> Void) throws(ControlError) {
        guard purpose == .change else {
            throw ControlError(.refused, "the pool is open for inspection only")
        }
        let answer = Latch<PoolError?>()
        pool.request(change.volumeChange) { answer.set($0) }
        while true {
            if let error = answer.wait(milliseconds: Self.pulse) {
                if let error { throw ControlError(error) }
                return
            }
            pulse()
        }
    }

    /// Returns when deleted volumes have given back their blocks, or cannot for now; `progress` gets
    /// bytes, done and in all.
    public func finishDeletions(progress: (UInt64, UInt64) -> Void) throws(ControlError) {
        var total: UInt64 = 0
        while pool.isDeleting {
            if let failure = pool.status().failure {
                throw ControlError(.refused, "the pool \(directory.path) has failed: \(failure)")
            }
            let left = try volumes().filter { $0.state == .deleting }
                .reduce(UInt64(0)) { sum, volume in
                    // What a damaged device claims may be anything.
                    let (more, overflows) = sum.addingReportingOverflow(volume.mappedBytes)
                    return overflows ? .max : more
                }
            total = max(total, left)
            progress(total - left, total)
            sleepMilliseconds(Self.deletionPause)
        }
    }
    private static let deletionPause: UInt32 = 20

    /// - Parameter progress: false ends the check.
    /// - Returns: nil if it was ended.
    func check(while progress: (CheckAdvance) -> Bool) throws(ControlError) -> CheckResult? {
        do throws(PoolError) {
            return try pool.check { progress(CheckAdvance($0)) }.map(PoolCheck.result)
        } catch { throw ControlError(error) }
    }
}

extension PoolStatus {
    /// Why the pool failed, if it did.
    fileprivate var failure: String? { mode == .failed ? reason ?? "unknown" : nil }
}
