// How full a pool is, as its operator hears of it: in levels, of which each is told when it is
// reached. Data and metadata are watched alike.
//
// 1. Only the worker looks, after a commit. Whoever is refused space leaves a mark for it, which
//    takes no time, and wakes it.
// 2. A level ends only when the use is clearly below it, so that what comes and goes is told once.

import ThinMetadata

struct SpaceWatch {
    enum Level: Int, CaseIterable {
        case ample, low, scarce, full
    }
    private(set) var level = Level.ample
    /// Of what may be used.
    private(set) var percent = 0.0
    /// What was in use when somebody was refused space, and the worker has not looked since.
    private(set) var usedWhenRefused: UInt64?
    /// Metadata may be refused before the last block of it is used.
    private var fullAt = 100.0

    private static let lowAt = 80.0
    private static let scarceAt = 95.0
    private static let slack = 1.0

    /// - Returns: whether that is news for the worker.
    mutating func refuse(used: UInt64) -> Bool {
        guard level != .full, usedWhenRefused == nil else { return false }
        usedWhenRefused = used
        return true
    }

    /// - Returns: whether a higher level is reached than before.
    mutating func look(used: UInt64, of total: UInt64) -> Bool {
        let before = level
        percent = Self.percent(used, of: total)
        if let used = usedWhenRefused {
            usedWhenRefused = nil
            fullAt = min(100, Self.percent(used, of: total))
            level = .full
        }
        level = Level.allCases.last { percent >= start(of: $0) } ?? .ample
        if level != .full { fullAt = 100 }
        return level.rawValue > before.rawValue
    }

    private func start(of level: Level) -> Double {
        let start =
            switch level {
            case .ample: 0.0
            case .low: Self.lowAt
            case .scarce: Self.scarceAt
            case .full: fullAt
            }
        return level.rawValue <= self.level.rawValue ? start - Self.slack : start
    }

    /// What the metadata says may be anything.
    private static func percent(_ used: UInt64, of total: UInt64) -> Double {
        total == 0 ? 100 : 100 * Double(used) / Double(total)
    }
}

extension Pool {
    /// A write has been refused for want of a data block.
    func dataWasRefused() {
        if dataSpace.refuse(used: metadata.dataBlocksUsed) { lock.signal() }
    }

    /// A change of the map has been refused for want of metadata.
    func metadataWasRefused() {
        if metadataSpace.refuse(used: metadata.metadataBlocksUsed) { lock.signal() }
    }

    var hasRefusedSpace: Bool {
        dataSpace.usedWhenRefused != nil || metadataSpace.usedWhenRefused != nil
    }

    /// Tells what has become scarce. What is kept back is not for those who write.
    func watchSpace() {
        let spare = min(metadata.dataBlocks, UInt64(spareBlocks.count))
        if dataSpace.look(used: metadata.dataBlocksUsed, of: metadata.dataBlocks - spare),
            let problem = dataProblem
        {
            onSpaceWarning?(problem)
        }
        let reserve = min(metadata.metadataBlocks, metadata.metadataReserve)
        if metadataSpace.look(
            used: metadata.metadataBlocksUsed, of: metadata.metadataBlocks - reserve),
            let problem = metadataProblem
        {
            onSpaceWarning?(problem)
        }
    }

    /// What people should know of the pool's space. The lock is held.
    package var spaceProblems: [String] { [dataProblem, metadataProblem].compactMap { $0 } }

    private var dataProblem: String? {
        let remedy = "delete volumes, discard (fstrim) or grow \(dataDevice.path)"
        switch dataSpace.level {
        case .ample: return nil
        case .low, .scarce:
            return "\(Int(dataSpace.percent)) % of the pool's data blocks are in use: \(remedy) "
                + "before writes fail"
        case .full:
            return "the pool has no data block left, and writes to new blocks fail: \(remedy)"
        }
    }

    private var metadataProblem: String? {
        let remedy = "delete volumes, discard (fstrim) or grow \(metadataDevice.path)"
        switch metadataSpace.level {
        case .ample: return nil
        case .low, .scarce:
            return "\(Int(metadataSpace.percent)) % of the metadata that volumes may take is in "
                + "use: \(remedy) before writes fail"
        case .full:
            return "the pool has no metadata left for volumes, and writes to new blocks, new "
                + "volumes and snapshots fail: \(remedy)"
        }
    }
}
