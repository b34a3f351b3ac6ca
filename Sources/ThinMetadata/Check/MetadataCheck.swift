// The self-check: reads everything that a superblock reaches and compares it with everything the
// format demands, which is more than thin_check looks at.
//
// It shares nothing with the code that writes the metadata but the layout, so that the two cannot
// make the same mistake. No content makes it fail: what it cannot read or understand is a finding,
// and it goes on with the rest. Then it draws no conclusions from what is missing: reference counts
// are only called too low, never too high.
//
// Memory: up to 10 bytes per metadata block, 60 per tree node, 2 per mapped data block.

import BlockIO

public struct MetadataCheck {
    /// How many findings a report holds; further ones are only counted.
    public static let findingLimit = 1000

    private let device: any BlockDevice
    private let superblock: [UInt8]?
    private let dataDeviceBlocks: UInt64?

    /// - Parameters:
    ///   - superblock: The sealed superblock of the state to check; nil takes block 0. Blocks of
    ///     that state must not be written while the check runs.
    ///   - dataDeviceBlocks: How many whole data blocks the data device has, if that is known.
    public init(
        device: any BlockDevice, superblock: [UInt8]? = nil, dataDeviceBlocks: UInt64? = nil
    ) {
        precondition(superblock == nil || superblock!.count == Layout.blockSize)
        self.device = device
        self.superblock = superblock
        self.dataDeviceBlocks = dataDeviceBlocks
    }

    /// Checks the pool. Takes time in proportion to the metadata in use.
    public mutating func run() -> CheckReport { run { _ in true }! }

    /// The same, as long as `progress` says true; otherwise nil.
    public mutating func run(while progress: (CheckProgress) -> Bool) -> CheckReport? {
        withoutActuallyEscaping(progress) { progress in
            let examination = Examination(
                device: device, dataDeviceBlocks: dataDeviceBlocks, progress: progress)
            return examination.run(superblock)
        }
    }

    /// One run: what the parts of the check share.
    final class Examination {
        let log = FindingLog()
        let reader: BlockReader
        let claims: BlockClaims
        let dataDeviceBlocks: UInt64?
        var report = CheckReport()
        /// False once mappings may have been missed: then the data blocks' counts are lower bounds.
        var sawAllMappings = true
        private let progress: (CheckProgress) -> Bool
        private var blocksExpected: UInt64 = 0

        init(
            device: any BlockDevice, dataDeviceBlocks: UInt64?,
            progress: @escaping (CheckProgress) -> Bool
        ) {
            self.dataDeviceBlocks = dataDeviceBlocks
            self.progress = progress
            reader = BlockReader(device: device, log: log)
            claims = BlockClaims(blockCount: max(1, reader.blockCount), log: log)
        }

        func run(_ given: [UInt8]?) -> CheckReport? {
            begin(.superblock)
            if let superblock = checkMainSuperblock(given) {
                blocksExpected = superblock.metadataMap.allocatedCount
                let end = superblock.metadataMap.blockCount
                if (1...claims.blockCount).contains(end) { claims.spaceMapEnd = end }
                describe(superblock)
                check(superblock)
            }
            reader.progress = { true }
            guard !reader.isEnded else { return nil }
            report.findings = log.findings
            report.findingCount = log.count
            report.countBySeverity = log.countBySeverity
            return report
        }

        private func check(_ superblock: Superblock) {
            let held = checkHeldSuperblock(superblock)
            begin(.spaceMaps)
            let metadataMap = readMetadataMap(superblock)
            let dataMap = readDataMap(superblock)
            begin(.devices)
            var devices = readDevices(superblock, held)
            begin(.mappings)
            let mappings = readMappings(of: devices, superblock)
            devices.rootNodes = mappings.rootNodes
            guard !reader.isEnded else { return }
            check(devices, mappings.forest)
            begin(.dataCounts)
            checkDataCounts(dataMap, mappings.counts)
            begin(.metadataCounts)
            checkMetadataCounts(metadataMap)
            report.metadataBlocksUsed = claims.used
            report.dataBlocksUsed = mappings.counts.used
        }

        private func describe(_ superblock: Superblock) {
            report.metadataBlocks = superblock.metadataMap.blockCount
            report.dataBlocks = superblock.dataMap.blockCount
            report.dataBlockSectors = superblock.dataBlockSectors
            report.transactionID = superblock.transactionID
            report.time = superblock.time
            report.heldRoot = superblock.heldRoot == 0 ? nil : MetadataBlock(superblock.heldRoot)
            report.needsCheck = superblock.needsCheck
        }

        private func begin(_ phase: CheckProgress.Phase) {
            reader.progress = { [unowned self] in
                progress(
                    CheckProgress(
                        phase: phase, blocksRead: reader.blocksRead, blocksExpected: blocksExpected)
                )
            }
            reader.report()
        }
    }
}
