// What a client may see: for every sector of a volume the values it can have now, and those it can
// have after a power cut.
//
// A write fills its sectors with its own number, so a value tells which write it came from, and a
// value from another volume or an older life of the block is always found out.

/// One volume as its clients know it.
final class VolumeModel {
    /// A value that a sector was given.
    struct Version {
        var value: UInt64
        /// When the change was acknowledged; nil: it is in flight, or failed, and may or may not
        /// have happened.
        var acknowledged: UInt64?
        /// It failed: it will never be acknowledged.
        var failed = false
    }

    let name: String
    let sectors: Int
    /// Oldest first. None is forgotten while a read might still return it.
    var versions: [[Version]]
    /// The version that a power cut certainly leaves behind, or something newer.
    var durable: [Int]
    /// Sectors that a change in flight covers: nobody else changes them meanwhile.
    var busy: [Bool]
    /// A snapshot whose sectors have not been read yet.
    var isUndecided = false
    /// Its deletion has been asked for.
    var isGoing = false

    init(name: String, sectors: Int) {
        self.name = name
        self.sectors = sectors
        versions = Array(repeating: [Version(value: 0, acknowledged: 0)], count: sectors)
        durable = Array(repeating: 0, count: sectors)
        busy = Array(repeating: false, count: sectors)
    }

    func begin(_ range: Range<Int>, value: UInt64) {
        for s in range {
            busy[s] = true
            versions[s].append(Version(value: value, acknowledged: nil))
        }
    }

    func acknowledge(_ range: Range<Int>, value: UInt64, at time: UInt64, isDurable: Bool) {
        for s in range {
            busy[s] = false
            guard let i = versions[s].lastIndex(where: { $0.value == value }) else { continue }
            versions[s][i].acknowledged = time
            if isDurable { durable[s] = i }
        }
    }

    func fail(_ range: Range<Int>, value: UInt64) {
        for s in range {
            busy[s] = false
            guard let i = versions[s].lastIndex(where: { $0.value == value }) else { continue }
            versions[s][i].failed = true
        }
    }

    /// A flush that was sent at `time` is acknowledged: what was acknowledged before is durable.
    func flushed(sentAt time: UInt64) {
        for s in 0..<sectors {
            if let i = versions[s].lastIndex(where: { $0.acknowledged.map { $0 <= time } ?? false }),
                i > durable[s]
            {
                durable[s] = i
            }
        }
    }

    /// What a read may return: the newest acknowledged value, or one that is still undecided.
    func allowsNow(_ sector: Int, _ value: UInt64) -> Bool {
        allows(sector, value, from: versions[sector].lastIndex { $0.acknowledged != nil } ?? 0)
    }

    /// What a read that was sent at `time` may return.
    func allows(_ sector: Int, _ value: UInt64, sentAt time: UInt64) -> Bool {
        allows(
            sector, value,
            from: versions[sector].lastIndex { $0.acknowledged.map { $0 <= time } ?? false } ?? 0)
    }

    func allowsAfterCut(_ sector: Int, _ value: UInt64) -> Bool {
        allows(sector, value, from: durable[sector])
    }

    private func allows(_ sector: Int, _ value: UInt64, from: Int) -> Bool {
        versions[sector][from...].contains { $0.value == value }
    }

    /// The sector was read with nothing in flight: now there is one truth.
    func settle(_ sector: Int, _ value: UInt64, at time: UInt64) {
        versions[sector] = [Version(value: value, acknowledged: time)]
        durable[sector] = 0
        busy[sector] = false
    }

    func describe(_ sector: Int) -> String {
        versions[sector].map {
            "\($0.value)\($0.acknowledged.map { "@\($0)" } ?? ($0.failed ? "!" : "?"))"
        }.joined(separator: " ")
    }
}

extension VolumeModel {
    /// A snapshot asked for at `time` and granted now: every sector has the value that was newest
    /// then, or one that came while it was being taken.
    convenience init(snapshotOf origin: VolumeModel, name: String, askedAt time: UInt64) {
        self.init(name: name, sectors: origin.sectors)
        isUndecided = true
        for s in 0..<sectors {
            let all = origin.versions[s]
            let first = all.lastIndex { $0.acknowledged.map { $0 <= time } ?? false } ?? 0
            // Not even a power cut leaves an older one: the snapshot's commit covers this one.
            versions[s] = all[first...].enumerated().map { i, version in
                var version = version
                // It never changes: which of them it is, is decided but not known.
                if i > 0 { version.acknowledged = nil }
                return version
            }
        }
    }

    /// The snapshot has been read for the first time, before anybody wrote to it.
    func decide(_ value: (Int) -> UInt64) {
        isUndecided = false
        for s in 0..<sectors where versions[s].count > 1 {
            versions[s] = [Version(value: value(s), acknowledged: 0)]
            durable[s] = 0
        }
    }
}
