// Checking a pool while it is open, served or not: the strict check of the metadata on the last
// committed state, and the catalogue against the devices.
//
// 1. The committed state that is checked is kept whole meanwhile: what later ones give up is not
//    used again. But not at the cost of those who write: a check that keeps too much ends without
//    a result.

import ThinMetadata

public struct PoolCheckReport: Sendable {
    public var metadata: CheckReport
    /// What the catalogue says and the devices do not bear out.
    public var catalogue: [String]
    public var isClean: Bool { metadata.isClean && catalogue.isEmpty }
}

extension Pool {
    /// Checks the last committed state; the pool goes on meanwhile. Takes time in proportion to the
    /// metadata in use, on the calling thread.
    ///
    /// - Throws: `PoolError` if the pool has failed, or if it changes so fast that it needs the
    ///   blocks that the check keeps.
    public func check() throws(PoolError) -> PoolCheckReport { try check { _ in true }! }

    /// The same, as long as `progress` says true; otherwise nil.
    public func check(while progress: (CheckProgress) -> Bool) throws(PoolError)
        -> PoolCheckReport?
    {
        lock.lock()
        if let failure {
            lock.unlock()
            throw failure
        }
        let pin = metadata.pinCommitted()
        let pinned = metadata
        let superblock = committedSuperblock
        let catalogueProblems: [String]
        do throws(MetadataError) { catalogueProblems = try checkCatalogue() } catch {
            metadata.unpinCommitted(pin)
            lock.unlock()
            throw PoolError(error)
        }
        lock.unlock()
        var check = MetadataCheck(
            device: metadataDevice, superblock: superblock,
            dataDeviceBlocks: dataDevice.size / blockSize)
        let report = check.run { lock.withLock { pinned.holds(pin) } && progress($0) }
        let isWhole = lock.withLock {
            defer {
                pinned.unpinCommitted(pin)
                // Blocks have come back.
                resume(&metadataWaiters)
            }
            return pinned.holds(pin)
        }
        guard isWhole else {
            throw PoolError(
                .changesTooFast,
                "the pool changes too fast to be checked while it is served: try again when less "
                    + "is written to it, or stop its server first")
        }
        return report.map { PoolCheckReport(metadata: $0, catalogue: catalogueProblems) }
    }

    /// Ends checks that keep more metadata blocks than are left to those who write.
    func breakPinsInNeed() {
        let free = metadata.metadataBlocksFree
        let left = free - min(free, metadata.metadataReserve)
        if metadata.metadataBlocksPinned > left { metadata.breakPins() }
    }

    private func checkCatalogue() throws(MetadataError) -> [String] {
        var found = problems
        for volume in volumesByName.values.sorted(by: { $0.name < $1.name }) {
            let end = VirtualBlock(volume.table.blocks)
            if let last = try metadata.lastMapped(volume.id), last >= end {
                found.append(
                    "volume \"\(volume.name)\" ends before block \(end.rawValue), but block "
                        + "\(last.rawValue) of its thin device \(volume.id.rawValue) is mapped")
            }
        }
        return found
    }
}
