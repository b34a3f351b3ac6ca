// What a check says, on its way and at its end.

import ThinMetadata

/// How far a check has come.
public struct CheckAdvance: Codable, Sendable, Equatable {
    /// What is being looked at, in words.
    public var phase: String
    public var blocksRead: UInt64
    public var blocksExpected: UInt64
}

/// What a check found.
public struct CheckResult: Codable, Sendable, Equatable {
    /// In words, the worst first; possibly cut short.
    public var findings: [String]
    /// All of them.
    public var findingCount: Int
    /// "leak", "suspicious" or "damage"; nil if there is nothing.
    public var worst: String?
    public var devices: Int
    public var mappings: UInt64
    public var metadataBlocksUsed: UInt64
    public var dataBlocksUsed: UInt64
    public var needsCheck: Bool

    public var isClean: Bool { findingCount == 0 }
}

extension CheckAdvance {
    init(_ progress: CheckProgress) {
        let phase =
            switch progress.phase {
            case .superblock: "superblock"
            case .spaceMaps: "space maps"
            case .devices: "devices"
            case .mappings: "mappings"
            case .dataCounts: "data block counts"
            case .metadataCounts: "metadata block counts"
            }
        self.init(
            phase: phase, blocksRead: progress.blocksRead, blocksExpected: progress.blocksExpected)
    }
}
