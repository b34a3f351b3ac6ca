// What the clients of a bench were told, and so what they may read: now, and after a power cut at
// any moment.
//
// Kept for units of 4 KiB. Every write has a byte of its own, so that a byte of another volume, or
// of an older life of the block, is always found out. No two changes of one unit are in flight.

import Glibc
import Simulation
import Testing
import ThinPool

final class Ledger {
    static let unit = 4096
    static let unitsPerBlock = Bench.blockSize / unit
    private static let sectorsPerUnit = unit / Bench.sector

    /// A byte that a unit was given.
    private struct Version {
        var value: UInt8
        var sent: Int
        var answered: Int?
        var failed = false
        var fua = false
        var cookie: UInt64 = 0
    }

    private struct Book {
        var blocks: Int
        var created: Bench.Change
        var asked: Int
        /// What it was a snapshot of.
        var origin: String?
        var deletionAsked: Int?
        var deletion: Bench.Change?
        /// Of each unit, oldest first, without what it held at the beginning.
        var versions: [[Version]]
        var flushes: [(sent: Int, answered: Int)] = []
    }

    private enum Sent {
        case change(String, units: Range<Int>)
        case flush(String, sent: Int)
        case read(String, units: Range<Int>, sent: Int, UnsafeMutableRawPointer)
    }

    let bench: Bench
    private var books: [String: Book] = [:]
    private var sent: [UInt64: Sent] = [:]
    private var nextValue: UInt8 = 1
    private(set) var errors: [Int32: Int] = [:]
    /// What a read got that it should not have.
    private(set) var wrongReads: [String] = []

    init(_ bench: Bench) {
        self.bench = bench
        bench.onAnswer = { [weak self] in self?.finish($0, $1, $2) }
    }

    var volumes: [String] {
        books.filter {
            $0.value.created.isDone && $0.value.created.error == nil
                && $0.value.deletionAsked == nil
        }.keys.sorted()
    }

    func blocks(_ name: String) -> Int { books[name]!.blocks }

    private func value() -> UInt8 {
        defer {
            nextValue = nextValue == 200 ? 1 : nextValue + 1
        }
        return nextValue
    }

    // MARK: - Changes of volumes

    @discardableResult
    func create(_ name: String, blocks: Int) -> Bench.Change {
        let asked = bench.recording.tick()
        let change = bench.ask(
            .create(name: name, size: UInt64(blocks * Bench.blockSize)))
        books[name] = Book(
            blocks: blocks, created: change, asked: asked,
            versions: Array(repeating: [], count: blocks * Self.unitsPerBlock))
        return change
    }

    @discardableResult
    func snapshot(_ origin: String, _ name: String) -> Bench.Change {
        let asked = bench.recording.tick()
        let change = bench.ask(.snapshot(origin: origin, name: name))
        books[name] = Book(
            blocks: books[origin]!.blocks, created: change, asked: asked, origin: origin,
            versions: Array(repeating: [], count: books[origin]!.versions.count))
        return change
    }

    @discardableResult
    func delete(_ name: String) -> Bench.Change {
        books[name]!.deletionAsked = bench.recording.tick()
        let change = bench.ask(.delete(name: name))
        books[name]!.deletion = change
        return change
    }

    // MARK: - Requests

    /// No change of any of these units is in flight.
    func isFree(_ name: String, _ units: Range<Int>) -> Bool {
        units.allSatisfy { unit in
            books[name]!.versions[unit].last.map { $0.answered != nil || $0.failed } ?? true
        }
    }

    @discardableResult
    func write(
        _ name: String, units: Range<Int>, fua: Bool = false, on reactor: Int = 0
    ) throws -> UInt64 {
        try change(.write, name, units, value: value(), fua: fua, noHole: false, reactor)
    }

    /// Zeroes; or, of whole blocks, a trim.
    @discardableResult
    func zero(
        _ name: String, units: Range<Int>, trim: Bool = false, noHole: Bool = false,
        fua: Bool = false, on reactor: Int = 0
    ) throws -> UInt64 {
        try change(
            trim ? .trim : .writeZeroes, name, units, value: 0, fua: fua, noHole: noHole, reactor)
    }

    private func change(
        _ operation: VolumeOperation, _ name: String, _ units: Range<Int>, value: UInt8,
        fua: Bool, noHole: Bool, _ reactor: Int
    ) throws -> UInt64 {
        precondition(isFree(name, units))
        let time = bench.recording.tick()
        for unit in units {
            books[name]!.versions[unit].append(Version(value: value, sent: time, fua: fua))
        }
        let offset = units.lowerBound * Self.unit
        let length = units.count * Self.unit
        let volume = try bench.volume(name)
        // It may be answered before its cookie is known.
        answeredEarly = []
        let cookie =
            operation == .write
            ? bench.sendWrite(value, volume, at: offset, length: length, fua: fua, on: reactor)
            : bench.send(
                operation, volume, at: offset, length: length, fua: fua, noHole: noHole,
                on: reactor)
        register(cookie, .change(name, units: units))
        return cookie
    }

    @discardableResult
    func flush(_ name: String, on reactor: Int = 0) throws -> UInt64 {
        let time = bench.recording.tick()
        answeredEarly = []
        let cookie = bench.send(.flush, try bench.volume(name), on: reactor)
        register(cookie, .flush(name, sent: time))
        return cookie
    }

    @discardableResult
    func read(_ name: String, units: Range<Int>, on reactor: Int = 0) throws -> UInt64 {
        let time = bench.recording.tick()
        answeredEarly = []
        let buffer = UnsafeMutableRawPointer.allocate(
            byteCount: units.count * Self.unit, alignment: 4096)
        let cookie = bench.send(
            .read, try bench.volume(name), at: units.lowerBound * Self.unit,
            length: units.count * Self.unit, buffer: buffer, on: reactor)
        register(cookie, .read(name, units: units, sent: time, buffer))
        return cookie
    }

    private var answeredEarly: [(UInt64, Int32, Int)] = []

    private func register(_ cookie: UInt64, _ request: Sent) {
        sent[cookie] = request
        for (answered, error, time) in answeredEarly where answered == cookie {
            finish(cookie, error, time)
        }
        answeredEarly = []
    }

    var inFlight: Int { sent.count }

    /// A change of a volume was told to have failed.
    var hasRefusedChange: Bool {
        books.values.contains { $0.created.error != nil || $0.deletion?.error != nil }
    }

    /// Everything that was sent is answered, and every change of a volume told.
    func settle() throws {
        try bench.settle {
            sent.isEmpty
                && books.values.allSatisfy {
                    $0.created.isDone && ($0.deletion?.isDone ?? true)
                }
        }
    }

    private func finish(_ cookie: UInt64, _ error: Int32, _ time: Int) {
        guard let request = sent.removeValue(forKey: cookie) else {
            answeredEarly.append((cookie, error, time))
            return
        }
        if error != 0 { errors[error, default: 0] += 1 }
        switch request {
        case .change(let name, let units):
            for unit in units {
                let last = books[name]!.versions[unit].count - 1
                if error == 0 {
                    books[name]!.versions[unit][last].answered = time
                } else {
                    books[name]!.versions[unit][last].failed = true
                }
            }
        case .flush(let name, let sentAt):
            if error == 0 { books[name]!.flushes.append((sentAt, time)) }
        case .read(let name, let units, let sentAt, let buffer):
            defer { buffer.deallocate() }
            guard error == 0 else { return }
            for (index, unit) in units.enumerated() {
                let allowed = allowed(name, unit, sentAt: sentAt)
                for sector in 0..<Self.sectorsPerUnit {
                    let start = buffer + index * Self.unit + sector * Bench.sector
                    let byte = start.load(as: UInt8.self)
                    if memcmp(start, start + 1, Bench.sector - 1) != 0
                        || !allowed.contains(byte)
                    {
                        wrongReads.append(
                            "unit \(unit) of \(name) read \(byte), allowed were \(allowed)")
                    }
                }
            }
        }
    }

    // MARK: - What may be read

    /// A read sent then, answered now: nothing older than what was answered before it was sent.
    private func allowed(_ name: String, _ unit: Int, sentAt time: Int) -> [UInt8] {
        allowed(name, unit, until: Int.max) { $0.answered.map { $0 < time } ?? false }
    }

    /// After a cut at `time`: nothing older than what was promised by then.
    private func allowed(_ name: String, _ unit: Int, cutAt time: Int) -> [UInt8] {
        let flushes = books[name]!.flushes
        return allowed(name, unit, until: time) { version in
            guard let answered = version.answered, answered <= time else { return false }
            return version.fua
                || flushes.contains { $0.sent > answered && $0.answered <= time }
        }
    }

    private func allowed(
        _ name: String, _ unit: Int, until: Int, isFloor: (Version) -> Bool
    ) -> [UInt8] {
        let versions = books[name]!.versions[unit].filter { $0.sent <= until }
        if let floor = versions.lastIndex(where: isFloor) {
            return versions[floor...].map(\.value)
        }
        return beginning(name, unit, until: until) + versions.map(\.value)
    }

    /// A new volume is zero; a snapshot holds what was answered before it was asked for, or
    /// something sent before it was granted.
    private func beginning(_ name: String, _ unit: Int, until: Int) -> [UInt8] {
        let book = books[name]!
        guard let origin = book.origin else { return [0] }
        return allowed(origin, unit, until: min(until, book.created.toldAt ?? Int.max)) {
            $0.answered.map { $0 < book.asked } ?? false
        }
    }

    // MARK: - Verifying

    /// What a power cut left is what the clients were promised.
    func verify(_ aftermath: Aftermath) throws {
        let time = aftermath.survivors.time
        let found = Set(aftermath.sectors.keys)
        for (name, book) in books {
            let isPromised =
                book.created.error == nil && book.created.toldAt.map { $0 <= time } ?? false
                && book.deletionAsked.map { $0 > time } ?? true
            // A change that failed may have happened all the same.
            let isGone =
                book.asked > time
                || (book.deletion?.error == nil
                    && book.deletion?.toldAt.map { $0 <= time } ?? false)
            try aftermath.require(!isPromised || found.contains(name), "volume \(name) is lost")
            try aftermath.require(!isGone || !found.contains(name), "\(name) has come back")
        }
        for (name, sectors) in aftermath.sectors {
            try aftermath.require(books[name] != nil, "volume \(name) was never asked for")
            for unit in 0..<(sectors.count / Self.sectorsPerUnit) {
                let allowed = allowed(name, unit, cutAt: time)
                for sector in
                    (unit * Self.sectorsPerUnit)..<((unit + 1) * Self.sectorsPerUnit)
                where !allowed.contains(sectors[sector]) {
                    throw ScenarioFailure(
                        "\(aftermath.survivors.what): sector \(sector) of \(name) holds "
                            + "\(sectors[sector]), allowed are \(allowed)")
                }
            }
        }
    }

    /// What the volumes hold now is what was answered; nothing is in flight.
    func verify() throws {
        for name in volumes {
            try verify(name, in: bench, "now") { unit in
                allowed(name, unit, until: Int.max) { $0.answered != nil }
            }
        }
        guard wrongReads.isEmpty else { throw ScenarioFailure(wrongReads[0]) }
    }

    /// One volume that a cut left behind.
    func verify(_ name: String, in other: Bench, cutAt time: Int, _ what: String) throws {
        try verify(name, in: other, what) { allowed(name, $0, cutAt: time) }
    }

    private func verify(
        _ name: String, in bench: Bench, _ what: String, _ allowed: (Int) -> [UInt8]
    ) throws {
        let sectors = try bench.sectors(bench.volume(name))
        for unit in 0..<(sectors.count / Self.sectorsPerUnit) {
            let allowed = allowed(unit)
            for sector in (unit * Self.sectorsPerUnit)..<((unit + 1) * Self.sectorsPerUnit)
            where sectors[sector].map({ !allowed.contains($0) }) ?? true {
                throw ScenarioFailure(
                    "\(what): sector \(sector) of \(name) holds "
                        + "\(sectors[sector].map(String.init) ?? "a torn write"), allowed are "
                        + "\(allowed)")
            }
        }
    }
}

/// Random requests and changes of volumes, for the scenarios that want many of them.
struct RandomClients {
    let ledger: Ledger
    var random: SeededRandom
    var reactors = 1
    var snapshots = true
    var deletions = true
    var discards = true
    private var nextName = 0

    init(_ ledger: Ledger, seed: UInt64, reactors: Int = 1) {
        self.ledger = ledger
        self.reactors = reactors
        random = SeededRandom(seed: seed)
    }

    /// Asks for something, and lets some of what was asked for happen: fewer things than `steps`.
    mutating func act(steps: Int = 6) throws {
        let names = ledger.volumes
        let reactor = random.below(reactors)
        if names.isEmpty { try ledger.bench.settle { !ledger.volumes.isEmpty } }
        let name = ledger.volumes[random.below(ledger.volumes.count)]
        let blocks = ledger.blocks(name)
        switch random.below(20) {
        case 0 where snapshots && names.count < 4:
            nextName += 1
            ledger.snapshot(name, "s\(nextName)")
        case 1 where deletions && names.count > 1 && ledger.inFlight == 0:
            ledger.delete(name)
        case 2...4 where discards:
            let first = random.below(blocks)
            let last = first + 1 + random.below(min(2, blocks - first))
            let units = (first * Ledger.unitsPerBlock)..<(last * Ledger.unitsPerBlock)
            if ledger.isFree(name, units) {
                let trim = random.oneIn(2)
                try ledger.zero(
                    name, units: units, trim: trim, noHole: !trim && random.oneIn(2),
                    fua: random.oneIn(6), on: reactor)
            }
        case 5...7: try ledger.flush(name, on: reactor)
        case 8: try ledger.read(name, units: range(blocks), on: reactor)
        default:
            let units = range(blocks)
            if ledger.isFree(name, units) {
                try ledger.write(name, units: units, fua: random.oneIn(8), on: reactor)
            }
        }
        for _ in 0..<random.below(steps) { ledger.bench.progress() }
        if random.oneIn(15) { ledger.bench.now += 1_100_000_000 }
    }

    /// A few units, a whole block, or some of two.
    private mutating func range(_ blocks: Int) -> Range<Int> {
        let all = blocks * Ledger.unitsPerBlock
        if random.oneIn(3) {
            let block = random.below(blocks)
            return (block * Ledger.unitsPerBlock)..<((block + 1) * Ledger.unitsPerBlock)
        }
        let first = random.below(all)
        return first..<min(all, first + 1 + random.below(Ledger.unitsPerBlock))
    }
}
