// Checking a pool while it is open, served or not: the strict check of the metadata on the last
// committed state, and the catalogue against the devices.

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
    public func check(progress: (CheckProgress) -> Void = { _ in }) throws(PoolError)
        -> PoolCheckReport
    {
        lock.lock()
        if let failure {
            lock.unlock()
            throw failure
        }
        metadata.pinCommitted()
        let pinned = metadata
        let superblock = committedSuperblock
        let catalogueProblems: [String]
        do throws(MetadataError) { catalogueProblems = try checkCatalogue() } catch {
            metadata.unpinCommitted()
            lock.unlock()
            throw PoolError(error)
        }
        lock.unlock()
        var check = MetadataCheck(
            device: metadataDevice, superblock: superblock,
            dataDeviceBlocks: dataDevice.size / blockSize)
        let report = check.run(progress: progress)
        lock.withLock {
            pinned.unpinCommitted()
            // Blocks have come back.
            resume(&spaceWaiters)
        }
        return PoolCheckReport(metadata: report, catalogue: catalogueProblems)
    }

    private func checkCatalogue() throws(MetadataError) -> [String] {
        var found = problems
        for volume in volumesByName.values.sorted(by: { $0.name < $1.name }) {
            let end = VirtualBlock(volume.table.blocks)
            var beyond: VirtualBlock?
            var next = end
            let limit = VirtualBlock(UInt64.max)
            while next < limit, beyond == nil {
                next = try metadata.visitLeaf(volume.id, from: next, limit: limit) { block, _ in
                    beyond = beyond ?? block
                }
            }
            if let beyond {
                found.append(
                    "volume \"\(volume.name)\" ends before block \(end.rawValue), but block "
                        + "\(beyond.rawValue) of its thin device \(volume.id.rawValue) is mapped")
            }
        }
        return found
    }
}
