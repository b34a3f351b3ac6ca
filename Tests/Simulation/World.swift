// One simulated history: a pool on two disks, two reactors, clients that check every byte they
// read, and a scheduler that decides what happens next.
//
// Everything the server does to a pool happens here but the sockets: the engines, the worker with
// its commits, catalogue changes, snapshots, deletions and discards, power cuts and reopening.

import BlockIO
import Glibc
import ThinMetadata
import ThinPool

/// What a history may do, drawn from its seed so that seeds differ in kind, not only in order.
public struct WorldOptions {
    public var dataBlocks = 64
    public var metadataBlocks = 512
    public var blockSectors: UInt32 = 128
    public var operations = 120
    public var reactors = 2
    public var cacheBlocks = 64
    public var tablePages = 8
    public var powerCuts = true
    public var snapshots = true
    public var discards = true
    public var deletions = true
    public var grows = true
    public var passDiscardsDown = true

    public init() {}

    public init(drawnFrom random: inout SeededRandom) {
        dataBlocks = [12, 24, 48, 96][random.below(4)]
        metadataBlocks = [96, 256, 1024][random.below(3)]
        operations = 40 + random.below(160)
        reactors = 1 + random.below(3)
        cacheBlocks = [8, 32, 256][random.below(3)]
        tablePages = [1, 4, 64][random.below(3)]
        powerCuts = !random.oneIn(3)
        snapshots = !random.oneIn(4)
        discards = !random.oneIn(4)
        deletions = !random.oneIn(3)
        grows = random.oneIn(2)
        passDiscardsDown = !random.oneIn(4)
    }
}

/// What went wrong, in words; the seed is the caller's to add.
public struct WorldFailure: Error, CustomStringConvertible {
    public let description: String
    public init(description: String) { self.description = description }
}

public struct WorldCounts: Sendable {
    public var requests = 0
    public var powerCuts = 0
    public var reopens = 0
    public var snapshots = 0
    public var deletions = 0
    public var commits = 0
    public var outOfSpace = 0
    public init() {}
}

public final class World {
    public let metadataDisk: SimulatedDisk
    public let dataDisk: SimulatedDisk
    public private(set) var counts = WorldCounts()

    private let options: WorldOptions
    private var random: SeededRandom
    private var time: UInt64 = 1
    private var clock: UInt64 = 1_000_000_000
    private var nextValue: UInt64 = 1
    private var nextName = 1

    private var pool: Pool!
    private var reactors: [Reactor] = []
    private var models: [String: VolumeModel] = [:]
    private var requests: [UInt64: Sent] = [:]
    private var nextCookie: UInt64 = 1
    private var changes: [Change] = []

    private var workerIO: [(index: Int, io: WorkerIO)] = []
    private var workerResults: [Int32] = []

    private final class Reactor {
        let io: SimulatedDataIO
        var engine: VolumeIO!
        var isAwake = false
        init(io: SimulatedDataIO) { self.io = io }
    }

    private struct Sent {
        var operation: VolumeOperation
        var volume: Volume
        var model: VolumeModel
        var sectors: Range<Int>
        /// The sectors that it changes: of a trim, those of whole blocks.
        var changed: Range<Int>
        var value: UInt64
        var fua: Bool
        var sentAt: UInt64
        var buffer: UnsafeMutableRawPointer?
    }

    private final class Change {
        let change: VolumeChange
        let sentAt: UInt64
        var result: PoolError??
        init(_ change: VolumeChange, sentAt: UInt64) {
            self.change = change
            self.sentAt = sentAt
        }
    }

    public init(options: WorldOptions, random: SeededRandom) throws {
        self.options = options
        self.random = random
        metadataDisk = SimulatedDisk(
            path: "simulated metadata", size: options.metadataBlocks * Layout.blockSize)
        dataDisk = SimulatedDisk(
            path: "simulated data", size: options.dataBlocks * Int(options.blockSectors) * 512)
        // Nobody may ever read what the disk held before.
        dataDisk.fill(0xEE)
        try ThinMetadata.format(
            metadataDisk, dataBlockSectors: options.blockSectors,
            dataBlocks: UInt64(options.dataBlocks))
        try open()
    }

    private var blockSize: Int { Int(options.blockSectors) * 512 }
    private var sectorsPerBlock: Int { Int(options.blockSectors) }

    // MARK: - A history

    /// Runs the history; at its end everything is read back and the pool is closed cleanly.
    public func run() throws {
        for _ in 0..<options.operations {
            try act()
            for _ in 0..<random.below(8) { try progress() }
        }
        try settle()
        try verifyAll()
        try close()
        try open()
        try verifyAll()
        try close()
    }

    private func act() throws {
        switch random.below(100) {
        case 0..<6 where models.count < 6:
            ask(.create(name: name(), size: randomSize()))
        case 6..<14 where options.snapshots && models.count < 8:
            if let origin = randomModel() {
                ask(.snapshot(origin: origin.name, name: name()))
            }
        case 14..<18 where options.deletions:
            if let model = randomModel() { try delete(model) }
        case 18..<20:
            try settle()
            try verifyAll()
            try close()
            if options.grows && random.oneIn(2) { grow() }
            try open()
            counts.reopens += 1
        case 20..<23 where options.powerCuts:
            try cutPower()
        case 23..<26:
            clock += 1_100_000_000
        default:
            if let model = randomModel() { try send(to: model) }
        }
    }

    private func name() -> String {
        nextName += 1
        return "v\(nextName)"
    }

    private func randomSize() -> UInt64 {
        let blocks = 1 + random.below(12)
        // Some volumes end inside a block.
        let tail = random.oneIn(3) ? 1 + random.below(sectorsPerBlock - 1) : 0
        return UInt64(blocks * sectorsPerBlock - tail) * 512
    }

    private func randomModel() -> VolumeModel? {
        let names = models.keys.sorted()
        return names.isEmpty ? nil : models[names[random.below(names.count)]]
    }

    // MARK: - Clients

    private func send(to model: VolumeModel) throws {
        let range = randomRange(model)
        let reactor = random.below(reactors.count)
        switch random.below(10) {
        case 0..<3:
            try submit(.read, model, range, reactor: reactor)
        case 3..<7:
            try submit(.write, model, range, reactor: reactor, fua: random.oneIn(8))
        case 7 where options.discards:
            try submit(
                random.oneIn(2) ? .trim : .writeZeroes, model, range, reactor: reactor,
                fua: random.oneIn(8), noHole: random.oneIn(3))
        default:
            try submit(.flush, model, 0..<0, reactor: reactor)
        }
    }

    /// Often one or more whole blocks, often a few sectors.
    private func randomRange(_ model: VolumeModel) -> Range<Int> {
        let blocks = (model.sectors + sectorsPerBlock - 1) / sectorsPerBlock
        if random.oneIn(2) {
            let first = random.below(blocks)
            let count = 1 + random.below(min(3, blocks - first))
            return (first * sectorsPerBlock)..<min(
                (first + count) * sectorsPerBlock, model.sectors)
        }
        let first = random.below(model.sectors)
        return first..<min(first + 1 + random.below(2 * sectorsPerBlock), model.sectors)
    }

    private func submit(
        _ operation: VolumeOperation, _ model: VolumeModel, _ range: Range<Int>, reactor: Int,
        fua: Bool = false, noHole: Bool = false
    ) throws {
        let changes = operation != .read && operation != .flush
        if changes, range.contains(where: { model.busy[$0] }) { return }
        guard let volume = pool.open(exportNamed: model.name) else {
            if model.isGoing { return }
            throw WorldFailure(description: "volume \(model.name) is gone")
        }
        var sent = Sent(
            operation: operation, volume: volume, model: model, sectors: range, changed: range,
            value: 0, fua: fua, sentAt: time)
        time += 1
        if operation == .read || operation == .write {
            sent.buffer = UnsafeMutableRawPointer.allocate(
                byteCount: range.count * 512, alignment: 4096)
        }
        if operation == .write {
            sent.value = nextValue
            nextValue += 1
            let words = sent.buffer!.bindMemory(to: UInt64.self, capacity: range.count * 64)
            for i in 0..<(range.count * 64) { words[i] = sent.value }
        } else if operation == .trim {
            // Only whole blocks; the volume's end ends a block too.
            let first = (range.lowerBound + sectorsPerBlock - 1) / sectorsPerBlock
            var last = range.upperBound / sectorsPerBlock * sectorsPerBlock
            if range.upperBound == model.sectors { last = model.sectors }
            let start = first * sectorsPerBlock
            sent.changed = start < last ? start..<last : 0..<0
        }
        if operation == .trim || operation == .writeZeroes { sent.value = 0 }
        if changes { model.begin(sent.changed, value: sent.value) }
        let cookie = nextCookie
        nextCookie += 1
        requests[cookie] = sent
        counts.requests += 1
        let request = VolumeRequest(
            operation: operation, volume: volume, offset: UInt64(range.lowerBound) * 512,
            length: UInt64(range.count) * 512, buffer: sent.buffer, fua: fua, noHole: noHole,
            cookie: cookie)
        try turn(reactors[reactor]) { $0.submit(request) }
    }

    private func turn(_ reactor: Reactor, _ body: (VolumeIO) -> Void) throws {
        reactor.isAwake = false
        reactor.engine.beginTurn()
        body(reactor.engine)
        reactor.engine.endTurn()
        var finished: [(UInt64, Int32)] = []
        reactor.engine.takeFinished { finished.append(($0, $1)) }
        for (cookie, error) in finished { try finish(cookie, error) }
    }

    private func finish(_ cookie: UInt64, _ error: Int32) throws {
        guard let sent = requests.removeValue(forKey: cookie) else {
            throw WorldFailure(description: "request \(cookie) was answered twice")
        }
        defer { sent.buffer?.deallocate() }
        pool.close(sent.volume)
        time += 1
        if error != 0 {
            guard error == ENOSPC, sent.operation != .read, sent.operation != .flush else {
                throw WorldFailure(
                    description: "\(sent.operation) of \(sent.model.name) \(sent.sectors) failed "
                        + "with \(error)")
            }
            counts.outOfSpace += 1
            sent.model.fail(sent.changed, value: sent.value)
            return
        }
        switch sent.operation {
        case .read:
            try check(sent) { model, sector, value in
                model.allows(sector, value, sentAt: sent.sentAt)
            }
        case .write, .trim, .writeZeroes:
            sent.model.acknowledge(
                sent.changed, value: sent.value, at: time, isDurable: sent.fua)
        case .flush:
            sent.model.flushed(sentAt: sent.sentAt)
        case .cache:
            break
        }
    }

    private func check(_ sent: Sent, _ allowed: (VolumeModel, Int, UInt64) -> Bool) throws {
        let words = sent.buffer!.assumingMemoryBound(to: UInt64.self)
        for (i, sector) in sent.sectors.enumerated() {
            let value = words[i * 64]
            for word in 1..<64 where words[i * 64 + word] != value {
                throw WorldFailure(
                    description: "sector \(sector) of \(sent.model.name) is torn: "
                        + "\(value) and \(words[i * 64 + word])")
            }
            guard allowed(sent.model, sector, value) else {
                throw WorldFailure(
                    description: "sector \(sector) of \(sent.model.name) reads \(value); allowed "
                        + "are \(sent.model.describe(sector)), sent at \(sent.sentAt)")
            }
        }
    }

    // MARK: - Management

    private func ask(_ change: VolumeChange) {
        let record = Change(change, sentAt: time)
        time += 1
        changes.append(record)
        if case .delete(let name) = change { models[name]?.isGoing = true }
        nonisolated(unsafe) let unsafeRecord = record
        pool.request(change) { unsafeRecord.result = .some($0) }
    }

    private func delete(_ model: VolumeModel) throws {
        if model.isGoing || requests.values.contains(where: { $0.model === model }) { return }
        ask(.delete(name: model.name))
    }

    /// Takes note of the changes that have been told done.
    private func noteChanges() throws {
        var open: [Change] = []
        defer { changes = open }
        for change in changes {
            guard let result = change.result else {
                open.append(change)
                continue
            }
            time += 1
            if let error = result {
                switch error.kind {
                case .outOfSpace, .inUse, .noSuchVolume: break
                default: throw WorldFailure(description: "\(change.change): \(error)")
                }
                if case .delete(let name) = change.change { models[name]?.isGoing = false }
                continue
            }
            happened(change)
            // What it holds is decided: it is read once, and may never change again by itself.
            if case .snapshot(_, let name) = change.change, let model = models[name] {
                try verify(model, afterCut: false)
            }
        }
    }

    private func happened(_ change: Change) {
        switch change.change {
        case .create(let name, let size):
            models[name] = VolumeModel(name: name, sectors: Int(size / 512))
        case .snapshot(let origin, let name):
            guard let source = models[origin] else { return }
            models[name] = VolumeModel(snapshotOf: source, name: name, askedAt: change.sentAt)
            counts.snapshots += 1
        case .delete(let name):
            models[name] = nil
            counts.deletions += 1
        case .adopt, .forget:
            break
        }
    }

    // MARK: - The scheduler

    /// One thing that was waiting happens.
    @discardableResult
    private func progress() throws -> Bool {
        var choices: [() throws -> Void] = []
        for reactor in reactors {
            if reactor.isAwake { choices.append { try self.turn(reactor) { _ in } } }
            if !reactor.io.pending.isEmpty {
                choices.append {
                    guard let index = reactor.io.next() else { return }
                    let (tag, result) = reactor.io.complete(index)
                    try self.turn(reactor) { $0.complete(tag: tag, result: result) }
                }
            }
        }
        choices.append { try self.stepWorker() }
        try choices[random.below(choices.count)]()
        try noteChanges()
        return choices.count > 1 || workerIsBusy
    }

    private var workerIsBusy = false

    private func stepWorker() throws {
        if !workerIO.isEmpty {
            let (index, io) = workerIO.remove(at: random.below(workerIO.count))
            workerResults[index] = perform(io)
            workerIsBusy = true
            if workerIO.isEmpty { pool.stepDone(workerResults, now: clock) }
            return
        }
        switch pool.nextStep(now: clock) {
        case .io(let io):
            workerIO = io.enumerated().map { ($0, $1) }
            workerResults = Array(repeating: 0, count: io.count)
            workerIsBusy = true
        case .again:
            workerIsBusy = true
        case .wait:
            workerIsBusy = false
        }
    }

    private func perform(_ io: WorkerIO) -> Int32 {
        switch io {
        case .flushData: try! dataDisk.flush()
        case .flushMetadata: try! metadataDisk.flush()
        case .writeMetadata(let transaction, let index):
            write { transaction.copyBlock(index, to: $0) }
        case .writeSuperblock(let transaction):
            write {
                transaction.copySuperblock(to: $0)
                return MetadataBlock(0)
            }
            metadataDisk.makeDurable(at: 0, length: Layout.blockSize)
            counts.commits += 1
        case .writeData(let offset, let bytes): try! dataDisk.write(at: offset, from: bytes)
        case .discardData(let offset, let length): dataDisk.discard(at: offset, length: length)
        }
        return 0
    }

    private func write(_ body: (UnsafeMutableRawPointer) -> MetadataBlock) {
        let buffer = UnsafeMutableRawPointer.allocate(
            byteCount: Layout.blockSize, alignment: 4096)
        defer { buffer.deallocate() }
        let number = body(buffer)
        try! metadataDisk.write(
            at: number.rawValue * UInt64(Layout.blockSize),
            from: UnsafeRawBufferPointer(start: buffer, count: Layout.blockSize))
    }

    /// Runs until every request and change has been answered.
    private func settle() throws {
        var idle = 0
        while !requests.isEmpty || !changes.isEmpty {
            if try progress() {
                idle = 0
            } else {
                idle += 1
                clock += 200_000_000
                if idle > 1000 {
                    throw WorldFailure(
                        description: "\(requests.count) requests and \(changes.count) changes are "
                            + "never answered")
                }
            }
        }
    }

    // MARK: - Opening, closing, cutting

    private func open() throws {
        var poolOptions = PoolOptions()
        poolOptions.cacheBlocks = options.cacheBlocks
        poolOptions.tablePages = options.tablePages
        poolOptions.passDiscardsDown = options.passDiscardsDown
        pool = try Pool(metadata: metadataDisk, data: dataDisk, options: poolOptions)
        let status = pool.status()
        guard status.mode == .writable, status.problems.isEmpty else {
            throw WorldFailure(description: "the pool opens \(status.mode): \(status.problems)")
        }
        reactors = (0..<options.reactors).map { _ in
            let io = SimulatedDataIO(disk: dataDisk) { [unowned self] in random.below($0) }
            let reactor = Reactor(io: io)
            nonisolated(unsafe) weak let box = reactor
            reactor.engine = VolumeIO(pool: pool, io: io) { box?.isAwake = true }
            return reactor
        }
        workerIO = []
        let names = pool.volumeNames()
        for name in models.keys where !names.contains(name) {
            throw WorldFailure(description: "volume \(name) is lost")
        }
        for name in names where models[name] == nil {
            throw WorldFailure(description: "volume \(name) has come back")
        }
    }

    /// As the server stops: everything is answered, committed, and the worker is at rest.
    private func close() throws {
        try settle()
        for _ in 0..<100_000 {
            clock += 100_000_000
            while try progress() {}
            if pool.isAtRest { break }
        }
        guard pool.isAtRest else {
            throw WorldFailure(description: "the pool does not come to rest")
        }
        for reactor in reactors { reactor.engine.close() }
        reactors = []
        pool = nil
        // A clean stop flushes; what is still in the caches was flushed by the commit or is data
        // that nobody was promised.
        try metadataDisk.flush()
        try dataDisk.flush()
    }

    private func grow() {
        dataDisk.grow(to: dataDisk.bytes.count + (1 + random.below(8)) * blockSize)
        if random.oneIn(2) {
            metadataDisk.grow(
                to: metadataDisk.bytes.count + (1 + random.below(64)) * Layout.blockSize)
        }
    }

    private func cutPower() throws {
        counts.powerCuts += 1
        for (_, io) in workerIO where random.oneIn(2) {
            if case .flushData = io { continue }
            if case .flushMetadata = io { continue }
            if case .writeSuperblock(let transaction) = io {
                // In flight: old or new, by sector, but not promised.
                write {
                    transaction.copySuperblock(to: $0)
                    return MetadataBlock(0)
                }
                continue
            }
            _ = perform(io)
        }
        workerIO = []
        for reactor in reactors { reactor.io.abandon() }
        metadataDisk.cutPower(&random)
        dataDisk.cutPower(&random)
        for sent in requests.values {
            if sent.operation != .read && sent.operation != .flush {
                sent.model.fail(sent.changed, value: sent.value)
            }
            sent.buffer?.deallocate()
        }
        requests = [:]
        reactors = []
        pool = nil
        // Changes in flight may have happened.
        let probe = try Pool(metadata: metadataDisk, data: dataDisk)
        let names = Set(probe.volumeNames())
        for change in changes {
            switch change.change {
            case .create(let name, _), .snapshot(_, let name):
                if names.contains(name) { happened(change) }
            case .delete(let name):
                if names.contains(name) { models[name]?.isGoing = false } else { happened(change) }
            case .adopt, .forget: break
            }
        }
        changes = []
        try open()
        try verifyAll(afterCut: true)
    }

    /// Reads every sector of every volume, with nothing else going on.
    private func verifyAll(afterCut: Bool = false) throws {
        for name in models.keys.sorted() {
            let model = models[name]!
            try verify(model, afterCut: afterCut)
        }
    }

    private func verify(_ model: VolumeModel, afterCut: Bool) throws {
        guard let volume = pool.open(exportNamed: model.name) else {
            throw WorldFailure(description: "volume \(model.name) cannot be opened")
        }
        defer { pool.close(volume) }
        guard Int(volume.size / 512) == model.sectors else {
            throw WorldFailure(description: "volume \(model.name) has size \(volume.size)")
        }
        let bytes = model.sectors * 512
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 4096)
        defer { buffer.deallocate() }
        let reactor = reactors[random.below(reactors.count)]
        let request = VolumeRequest(
            operation: .read, volume: volume, offset: 0, length: UInt64(bytes), buffer: buffer,
            cookie: UInt64.max)
        var answer: Int32?
        func run(_ body: (VolumeIO) -> Void) throws {
            reactor.engine.beginTurn()
            body(reactor.engine)
            reactor.engine.endTurn()
            var others: [(UInt64, Int32)] = []
            reactor.engine.takeFinished { cookie, error in
                if cookie == UInt64.max { answer = error } else { others.append((cookie, error)) }
            }
            for (cookie, error) in others { try finish(cookie, error) }
        }
        try run { $0.submit(request) }
        while answer == nil {
            guard !reactor.io.pending.isEmpty else {
                throw WorldFailure(description: "a read of \(model.name) is never answered")
            }
            let (tag, result) = reactor.io.complete(random.below(reactor.io.pending.count))
            try run { $0.complete(tag: tag, result: result) }
        }
        guard answer == 0 else {
            throw WorldFailure(description: "\(model.name) cannot be read: \(answer!)")
        }
        let sent = Sent(
            operation: .read, volume: volume, model: model, sectors: 0..<model.sectors,
            changed: 0..<0, value: 0, fua: false, sentAt: time, buffer: buffer)
        try check(sent) { model, sector, value in
            afterCut
                ? model.allowsAfterCut(sector, value) : model.allowsNow(sector, value)
        }
        if afterCut {
            model.isUndecided = false
            let words = buffer.assumingMemoryBound(to: UInt64.self)
            for sector in 0..<model.sectors {
                model.settle(sector, words[sector * 64], at: time)
            }
        } else if model.isUndecided {
            let words = buffer.assumingMemoryBound(to: UInt64.self)
            model.decide { words[$0 * 64] }
        }
    }
}
