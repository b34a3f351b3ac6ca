// What a client may see: for every sector of a volume the values it can have now, and those it can
// have after a power cut.
//
// A write fills its sectors with its own number, so a value tells which write it came from, and a
// value from another volume or an older life of the block is always found out.
//
// A change takes effect at one moment between its being sent (`begun`) and its answer (`ended`). So
// one that had ended before an acknowledged other one began is superseded by it; changes that were
// under way at the same time may have happened in either order.

/// One volume as its clients know it.
final class VolumeModel {
    /// A value that a sector was given.
    struct Version {
        var value: UInt64
        /// Which change it is: when it was sent.
        var begun: UInt64
        /// When it was over, whatever became of it; nil: it may still take effect.
        var ended: UInt64?
        var isAcknowledged = false
        /// It survives a power cut, or something newer does.
        var isDurable = false
    }

    let name: String
    let sectors: Int
    /// In the order of their beginning. None is forgotten while a read might still return it.
    private(set) var versions: [[Version]]
    /// A snapshot whose sectors have not been read yet.
    private(set) var isUndecided = false
    /// The versions of such a snapshot's origin when it was granted.
    private var originAtGrant: [[Version]] = []
    /// Its deletion has been asked for.
    var isGoing = false
    /// Whether it can be written, and since when that is known.
    enum Access {
        case writable(since: UInt64)
        case readOnly(since: UInt64)
        /// A change has been asked for, or may have been made.
        case unknown
    }
    var access = Access.writable(since: 0)

    /// Whether a change that was sent at `time` may be refused; whether it may be done.
    func mayRefuse(sentAt time: UInt64) -> Bool {
        if case .writable(let since) = access { time < since } else { true }
    }
    func mayChange(sentAt time: UInt64) -> Bool {
        if case .readOnly(let since) = access { time < since } else { true }
    }

    /// It is a snapshot, or one of it has been asked for.
    var hasRelatives = false
    /// For every block that anybody has asked to change, the value of the only write that has; nil:
    /// there were others, or it is no write.
    private var soleWriters: [Int: UInt64?] = [:]

    init(name: String, sectors: Int) {
        self.name = name
        self.sectors = sectors
        let zero = Version(
            value: 0, begun: 0, ended: 0, isAcknowledged: true, isDurable: true)
        versions = Array(repeating: [zero], count: sectors)
    }

    /// A snapshot asked for at `time` and granted now: every sector has the value that was newest
    /// then, or one that came while it was being taken.
    init(snapshotOf origin: VolumeModel, name: String, askedAt time: UInt64, now: UInt64) {
        self.name = name
        sectors = origin.sectors
        isUndecided = true
        hasRelatives = true
        originAtGrant = origin.versions
        soleWriters = origin.soleWriters.mapValues { _ in nil }
        versions = origin.versions.map { all in
            // Which of them it is, is decided but not known. Not even a power cut leaves an older
            // one: the snapshot's commit covers what is in it.
            all.filter { version in !all.contains { $0.supersedes(version, by: time) } }
                .map {
                    var version = $0
                    version.ended = now
                    version.isAcknowledged = true
                    version.isDurable = true
                    return version
                }
        }
    }

    private init(copying other: VolumeModel) {
        name = other.name
        sectors = other.sectors
        versions = other.versions
        soleWriters = other.soleWriters
        isUndecided = other.isUndecided
        hasRelatives = other.hasRelatives
        access = other.access
        originAtGrant = other.originAtGrant
    }

    func copy() -> VolumeModel { VolumeModel(copying: self) }

    // MARK: - Changes

    func begin(_ range: Range<Int>, value: UInt64, at time: UInt64) {
        // A snapshot that could not be read before: which of its versions it has stays open.
        isUndecided = false
        originAtGrant = []
        for s in range { versions[s].append(Version(value: value, begun: time)) }
    }

    /// A change of these blocks is about to be sent.
    func touch(_ blocks: Range<Int>, value: UInt64?) {
        for block in blocks {
            soleWriters[block] = .some(soleWriters[block] == nil ? value : nil)
        }
    }

    /// Nobody but the write of this value has ever been asked to change the block: it has none yet.
    func isSoleWriter(_ block: Int, value: UInt64) -> Bool { soleWriters[block] == .some(value) }

    /// Somebody has been asked to change the block, or the volume's origin's.
    func isTouched(_ block: Int) -> Bool { soleWriters.keys.contains(block) }

    /// The change that began at `begun` is over.
    func end(
        _ range: Range<Int>, begun: UInt64, at time: UInt64, isAcknowledged: Bool, isDurable: Bool
    ) {
        for s in range {
            guard let i = versions[s].lastIndex(where: { $0.begun == begun }) else { continue }
            versions[s][i].ended = time
            versions[s][i].isAcknowledged = isAcknowledged
            versions[s][i].isDurable = isDurable && isAcknowledged
        }
    }

    /// A flush that was sent at `time` is acknowledged: what was acknowledged before is durable.
    func flushed(sentAt time: UInt64) {
        for s in versions.indices {
            for i in versions[s].indices where versions[s][i].isAcknowledged {
                if let ended = versions[s][i].ended, ended < time {
                    versions[s][i].isDurable = true
                }
            }
        }
    }

    // MARK: - What is allowed

    /// What a read that was sent at `time` may return.
    func allows(_ sector: Int, _ value: UInt64, sentAt time: UInt64) -> Bool {
        let all = versions[sector]
        return all.contains { version in
            version.value == value && !all.contains { $0.supersedes(version, by: time) }
        }
    }

    /// What may be there when unflushed writes have been lost.
    func allowsAfterCut(_ sector: Int, _ value: UInt64) -> Bool {
        let all = versions[sector]
        return all.contains { version in
            version.value == value
                && !all.contains { $0.isDurable && $0.supersedes(version, by: .max) }
        }
    }

    /// What the sector may have been between `time` and now; `afterCut`: or in the last committed
    /// state.
    func possible(_ sector: Int, sentAt time: UInt64, afterCut: Bool) -> Set<UInt64> {
        Set(
            versions[sector].map(\.value).filter {
                allows(sector, $0, sentAt: time) || afterCut && allowsAfterCut(sector, $0)
            })
    }

    // MARK: - What turned out

    /// The sector was read with nothing in flight: now there is one truth. If it is not `durable`,
    /// a power cut may still bring another back.
    func settle(_ sector: Int, _ value: UInt64, at time: UInt64, isDurable: Bool) {
        let truth = Version(
            value: value, begun: time, ended: time, isAcknowledged: true, isDurable: isDurable)
        if isDurable {
            versions[sector] = [truth]
            return
        }
        let all = versions[sector]
        var possible = all.filter { version in
            !all.contains { $0.isDurable && $0.supersedes(version, by: .max) }
        }
        if possible.count == 1 {
            possible[0].ended = time
            versions[sector] = possible
            return
        }
        for i in possible.indices { possible[i].ended = min(possible[i].ended ?? time, time - 1) }
        versions[sector] = possible + [truth]
    }

    /// The snapshot has been read for the first time, before anybody wrote to it. It has to be one
    /// point in time over all sectors: whatever was acknowledged before the newest write in it was
    /// sent is in it too.
    ///
    /// - Returns: a sector that is older than the newest write in the snapshot allows.
    func decide(at time: UInt64, _ value: (Int) -> UInt64) -> Int? {
        isUndecided = false
        let origin = originAtGrant
        originAtGrant = []
        var newest: UInt64 = 0
        for s in origin.indices where value(s) != 0 {
            // A replayed write is there twice: the earlier of the two says less.
            let matching = origin[s].filter { $0.value == value(s) }
            newest = max(newest, matching.map(\.begun).min() ?? 0)
        }
        var tooOld: Int?
        for s in origin.indices {
            let isAllowed = origin[s].contains { version in
                version.value == value(s)
                    && !origin[s].contains { $0.supersedes(version, by: newest) }
            }
            if !isAllowed && tooOld == nil { tooOld = s }
        }
        for s in 0..<sectors { settle(s, value(s), at: time, isDurable: true) }
        return tooOld
    }

    func describe(_ sector: Int) -> String {
        versions[sector].map {
            "\($0.value)@\($0.begun)-\($0.ended.map { "\($0)" } ?? "")"
                + "\($0.isAcknowledged ? "" : "?")\($0.isDurable ? "!" : "")"
        }.joined(separator: " ")
    }
}

extension VolumeModel.Version {
    /// Whether this one, acknowledged before `time`, came after the other was over.
    func supersedes(_ other: Self, by time: UInt64) -> Bool {
        guard isAcknowledged, let ended, ended < time, let otherEnded = other.ended else {
            return false
        }
        return otherEnded < begun
    }
}
