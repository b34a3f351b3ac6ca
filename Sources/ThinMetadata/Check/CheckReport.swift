// What the self-check says: findings, the figures it counted on the way, and its progress.

/// One deviation from the format, or several alike that lie side by side.
public struct CheckFinding: Sendable, Hashable, CustomStringConvertible {
    /// How bad it is.
    public enum Severity: String, Sendable, CaseIterable, Comparable {
        /// Space is lost, or will not come back when freed; no data is at risk.
        case leak
        /// Nothing is lost yet, but the writer of this was not following the format, or other
        /// software may stumble over it. Wrong sums of free blocks are here, too: they make a pool
        /// look fuller than it is.
        case suspicious
        /// Data is lost, unreachable, or will be overwritten if the pool is used as it is.
        case damage

        public static func < (a: Self, b: Self) -> Bool { a.order < b.order }
        private var order: Int { Self.allCases.firstIndex(of: self)! }
    }

    /// Which rule was broken. For scripts and tests: `what` says it to people.
    public enum Kind: String, Sendable, CaseIterable {
        // Any block
        case unreadable, checksum, blockNumber, badPointer, usedTwice, unusedField
        // Superblock
        case notAPool, magic, version, featureFlags, geometry, blockCount
        // Tree nodes
        case nodeHeader, maxEntries, keyOrder, keyRange, leafDepth, underfull, emptyInternalNode
        case singleChildRoot
        // Devices and mappings
        case deviceSet, deviceID, mappedBlocks, transactionID, time, sharingTime
        case dataBlockRange, crossMapped
        // Space maps
        case bitmapSet, leak, countTooLow, countTooHigh, overflowEntry, freeCount, freeHint
        case allocatedCount, countsPastEnd, indexTail
    }

    public var severity: Severity
    public var kind: Kind
    /// Metadata blocks that the finding is in or about.
    public var metadataBlocks: Range<UInt64>?
    /// Data blocks that it is about.
    public var dataBlocks: Range<UInt64>?
    /// The thin device that it belongs to; where several share it, one of them. Wider than a
    /// `ThinDeviceID`, as a bad key can be.
    public var device: UInt64?
    /// The (first) virtual block that it is about.
    public var virtualBlock: VirtualBlock?
    public var what: String

    public var description: String {
        var places: [String] = []
        if let device { places.append("device \(device)") }
        if let virtualBlock { places.append("virtual block \(virtualBlock.rawValue)") }
        if let dataBlocks { places.append("data \(Self.words(dataBlocks))") }
        if let metadataBlocks { places.append("metadata \(Self.words(metadataBlocks))") }
        let place = places.isEmpty ? "" : places.joined(separator: ", ") + ": "
        return "\(severity.rawValue): \(place)\(what)"
    }

    private static func words(_ blocks: Range<UInt64>) -> String {
        blocks.count == 1
            ? "block \(blocks.lowerBound)"
            : "blocks \(blocks.lowerBound) to \(blocks.upperBound - 1)"
    }
}

/// The result of a self-check.
public struct CheckReport: Sendable {
    /// The first findings, at most `MetadataCheck.findingLimit`.
    public var findings: [CheckFinding] = []
    /// All of them, also those beyond the limit.
    public var findingCount = 0
    /// How many there are of each severity.
    public var countBySeverity: [CheckFinding.Severity: Int] = [:]

    /// Thin devices (keys of the top level).
    public var devices = 0
    /// Mappings of all devices together, as their users see them.
    public var mappings: UInt64 = 0
    /// Mappings as stored: those in a leaf that several devices share count once.
    public var storedMappings: UInt64 = 0
    public var metadataBlocks: UInt64 = 0
    /// Metadata blocks that the superblock reaches, itself included.
    public var metadataBlocksUsed: UInt64 = 0
    public var dataBlocks: UInt64 = 0
    /// Data blocks that a mapping refers to.
    public var dataBlocksUsed: UInt64 = 0
    public var dataBlockSectors: UInt32 = 0
    public var transactionID: UInt64 = 0
    public var time: UInt32 = 0
    public var heldRoot: MetadataBlock?
    /// The superblock's flag: a transaction failed once and the pool waits for a check.
    /// A state, not a finding.
    public var needsCheck = false

    public init() {}

    public var isClean: Bool { findingCount == 0 }
    public var worst: CheckFinding.Severity? {
        CheckFinding.Severity.allCases.last { countBySeverity[$0, default: 0] > 0 }
    }
}

/// How far a check has come.
public struct CheckProgress: Sendable {
    public enum Phase: String, Sendable, CaseIterable {
        case superblock, spaceMaps, devices, mappings, dataCounts, metadataCounts
    }
    public var phase: Phase
    /// Metadata blocks read so far.
    public var blocksRead: UInt64
    /// How many the pool claims to use: what `blocksRead` tends to. May be wrong if the pool is.
    public var blocksExpected: UInt64
}
