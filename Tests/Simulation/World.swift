// One simulated history: a pool on two disks, reactors with the server's real connections, clients
// that check every byte they read, and a scheduler that decides what happens next.
//
// Everything the server does to a pool happens here but the system calls: handshakes, requests,
// the engines, the worker with its commits, catalogue changes, snapshots, deletions and discards,
// checks of the pool while it is served, power cuts, killed servers and reopening.

import BlockIO
import Glibc
import NBDProtocol
import ThinMetadata
import ThinPool

public final class World {
    public internal(set) var metadataDisk: SimulatedDisk
    public internal(set) var dataDisk: SimulatedDisk
    public internal(set) var counts = WorldCounts()
    /// A write of the metadata was lost: what is on the disk is not to be trusted any more.
    public internal(set) var isDamaged = false

    let options: WorldOptions
    var random: SeededRandom
    let meter: IOMeter
    /// Counts what clients see happen: the order of sending and answering.
    var time: UInt64 = 1
    /// The pool's monotonic clock, nanoseconds.
    var clock: UInt64 = 1_000_000_000
    var nextValue: UInt64 = 1
    /// Names sort by age.
    private var nextName = 1000

    var pool: Pool!
    var reactors: [SimulatedReactor] = []
    var clients: [SimulatedClient] = []
    /// Connections that have not been accepted yet.
    var arrivals: [(reactor: Int, wire: Wire)] = []
    /// Of those who are no clients and may still be there.
    var visitors: [Wire] = []
    /// Thin devices that another program has made and that nobody has adopted yet.
    var strangers = Set<UInt32>()
    /// Clients whose connection is broken, and which come again when the server has let go of it.
    var broken: [SimulatedClient] = []
    var models: [String: VolumeModel] = [:]
    var changes: [Change] = []
    /// Changes that were told to have failed, by a pool that then failed itself: they may be there.
    var uncertain: [Change] = []
    /// Queries of the map that are not answered yet.
    var queries: [AskedExtents] = []
    let worker = SimulatedWorker()
    /// When the pool failed, if it has.
    var failedAt: UInt64?
    /// Faults that had struck, or other damage that was done, when the pool was last opened.
    var struckAtOpen = 0
    var hasRot = false
    /// Why the pool failed with no fault in sight, and whatever else may never happen.
    var wrong: WorldFailure?
    var clientsMade = 0
    /// The server takes no connections: they wait for the next one.
    var isHandingOver = false
    /// Faults of the metadata disk when the pool failed.
    var metadataStruckAtFailure = 0
    /// The pool is open read-only.
    var isReadOnly = false
    /// The power is to go when the present step is over.
    var isCutDue = false
    var hasFlooded = false
    /// The block that has rotted, and what was in it.
    var rotten: (block: Int, old: [UInt8])?

    /// Called after every step.
    var probe: ((World) throws -> Void)?
    /// Looks at the metadata that the first crash has left.
    var inspect: (([UInt8]) throws -> Void)?
    /// What happens, in words: to follow a failure.
    public var log: ((String) -> Void)?
    func note(_ words: @autoclosure () -> String) {
        if let log { log("\(time): \(words())") }
    }

    final class Change {
        let change: VolumeChange
        let sentAt: UInt64
        var result: PoolError??
        init(_ change: VolumeChange, sentAt: UInt64) {
            self.change = change
            self.sentAt = sentAt
        }
    }

    public init(options: WorldOptions, random: SeededRandom, meter: IOMeter = IOMeter()) throws {
        self.options = options
        self.random = random
        self.meter = meter
        metadataDisk = SimulatedDisk(
            path: "simulated metadata", size: options.metadataBlocks * Layout.blockSize)
        let dataSize = options.dataBlocks * Int(options.blockSectors) * 512
        // Nobody may ever read what the disk held before.
        dataDisk =
            options.dataInMemory
            ? SimulatedDisk(path: "simulated data", size: dataSize, isSparse: true)
            : SimulatedDisk(
                path: "simulated data", bytes: [UInt8](repeating: 0xEE, count: dataSize))
        try ThinMetadata.format(
            metadataDisk, dataBlockSectors: options.blockSectors,
            dataBlocks: UInt64(options.dataBlocks))
        for disk in [metadataDisk, dataDisk] {
            disk.meter = meter
            disk.random = SeededRandom(seed: self.random.next())
        }
        try open()
    }

    var blockSize: Int { Int(options.blockSectors) * 512 }
    var sectorsPerBlock: Int { Int(options.blockSectors) }
    /// An error may be some fault's doing.
    var isTroubled: Bool { meter.struck > struckAtOpen || failedAt != nil || hasRot || isDamaged }

    // MARK: - A history

    /// Runs the history; at its end everything is read back and the pool is closed cleanly.
    public func run() throws {
        for _ in 0..<options.operations {
            try act()
            for _ in 0..<random.below(12) { try progress() }
            if isDamaged {
                // Nothing more can be expected of it.
                try bury()
                counts.faults = meter.struck
                return
            }
        }
        heal()
        if failedAt != nil { try recover() }
        try settle()
        if failedAt != nil { try recover() }
        try verifyAll()
        if options.fills { try checkSpace() }
        try close()
        try open()
        try verifyAll()
        try close()
        counts.faults = meter.struck
        counts.simulated = clock
    }

    private func act() throws {
        if failedAt != nil, random.oneIn(4) { return try recover() }
        if options.churns, random.oneIn(5) { return churn() }
        if options.drills, random.oneIn(12) { return try drill() }
        switch random.below(100) {
        case 0..<6 where models.count < options.volumes:
            ask(.create(name: name(), size: randomSize()))
        case 6..<13 where options.snapshots && models.count < options.volumes + 2:
            if let origin = randomModel() {
                ask(
                    .snapshot(
                        origin: origin.name, name: name(), readOnly: random.oneIn(6)))
            }
        case 13..<17 where options.deletions:
            if let model = randomModel() { delete(model) }
        case 17..<19:
            if random.oneIn(2) { try reopen() } else { try handOver() }
        case 19..<21 where options.powerCuts:
            try crash(keepingCaches: false)
        case 21..<23 where options.kills:
            try crash(keepingCaches: true)
        case 23..<25 where options.drops:
            try dropClient()
        case 25..<27 where options.dataFaults:
            strike(dataDisk)
        case 27..<29 where options.metadataFaults:
            strike(metadataDisk)
        case 29..<31:
            heal()
        case 47 where options.cutsAtPromises:
            try cutAfterPromise()
        case 47 where options.kills && options.powerCuts:
            try killAtSuperblock()
        case 49 where options.dataFaults && failedAt == nil:
            worker.failsCatalogue = true
            ask(.create(name: name(), size: randomSize()))
            // The next change would write all of it anew.
            if random.oneIn(2) { try reopen() }
        case 50..<52 where options.flushFaults && failedAt == nil:
            try failFlush()
        case 31 where options.rot && !models.isEmpty:
            try rot()
        case 32 where options.lostWrites && counts.commits > 0:
            try loseWrite()
        case 33 where options.checks:
            try check()
        case 34..<37:
            clock += 1_100_000_000
        case 37..<42:
            try connectOrLeave()
        case 42..<44 where options.wrongRequests:
            misbehave()
        case 48 where options.wrongRequests:
            askWrongly()
        case 52 where options.scarceMetadata && models.count < 12:
            // They stay: from now on there is hardly any metadata left.
            for _ in 0..<40 { ask(.create(name: name(), size: 512)) }
        case 53..<56 where !strangers.isEmpty:
            ask(.adopt(id: strangers.min()!, name: name(), size: randomSize()))
        case 44 where options.readOnlyTimes:
            try beReadOnly()
        case 45 where options.floods && !hasFlooded:
            try flood()
        case 46 where options.fills && random.oneIn(2):
            try checkSpace()
        case 56..<62:
            askExtents()
        case 62 where options.accessChanges:
            changeAccess()
        default:
            try send()
        }
    }

    func name() -> String {
        nextName += 1
        return "v\(nextName)"
    }

    func randomSize() -> UInt64 {
        let blocks = 1 + random.below(12)
        // Some volumes end inside a block.
        let tail = random.oneIn(3) ? 1 + random.below(sectorsPerBlock - 1) : 0
        return UInt64(blocks * sectorsPerBlock - tail) * 512
    }

    func randomModel() -> VolumeModel? {
        let names = models.keys.sorted()
        if options.hotBlock != nil, random.oneIn(2), let oldest = names.first {
            return models[oldest]
        }
        return names.isEmpty ? nil : models[names[random.below(names.count)]]
    }

    /// What the oldest volume shares changes all the time.
    private func churn() {
        guard let oldest = models.keys.sorted().first else { return }
        let others = models.values.filter { model in
            model.name != oldest && !model.isGoing
                && !(clients + broken).contains { $0.model === model }
        }
        if models.count < options.volumes + 3, others.isEmpty || random.oneIn(2) {
            ask(.snapshot(origin: oldest, name: name()))
        } else if !others.isEmpty {
            ask(.delete(name: others.map(\.name).sorted()[random.below(others.count)]))
        }
    }

    // MARK: - The scheduler

    /// One thing that was waiting happens.
    ///
    /// - Returns: false if nothing waits for anything but time.
    @discardableResult
    func progress() throws -> Bool {
        clock += UInt64(random.below(2_000_000))
        reconnectBroken()
        var choices: [() throws -> Void] = []
        for (number, reactor) in reactors.enumerated() {
            reactor.passTime()
            if reactor.isAwake { choices.append { reactor.turn {} } }
            if !reactor.io.pending.isEmpty { choices.append { self.completeData(reactor) } }
            if !isHandingOver, arrivals.contains(where: { $0.reactor == number }) {
                choices.append {
                    let index = self.arrivals.firstIndex { $0.reactor == number }!
                    let wire = self.arrivals.remove(at: index).wire
                    reactor.turn { reactor.adopt(wire) }
                }
            }
            for case let place? in reactor.places {
                if place.canReceive {
                    choices.append {
                        let limit = self.randomLength(place.wire.toServer.count)
                        reactor.turn { reactor.receive(place, limit: limit) }
                    }
                }
                if place.sending != nil {
                    choices.append {
                        let limit = self.randomLength(reactor.unsent(place))
                        reactor.turn { reactor.send(place, limit: limit) }
                    }
                }
            }
        }
        for client in clients {
            if client.canReceive {
                choices.append { try self.receive(client) }
            } else if client.wire.isClosedByServer {
                choices.append { try self.lose(client) }
            }
        }
        let canWork = worker.hasIO || worker.isBusy
        if canWork || choices.isEmpty || random.oneIn(8) {
            choices.append { self.worker.step(self) }
        }
        try choices[random.below(choices.count)]()
        if reactors.contains(where: \.hasUnfenced) {
            for reactor in reactors {
                reactor.hasUnfenced = false
                reactor.wake()
            }
        }
        if let wrong { throw wrong }
        if metadataDisk.hasLostWrite { isDamaged = true }
        // What a damaged disk shows after a cut says nothing.
        if meter.cutIsDue || isCutDue, !isDamaged {
            meter.cutIsDone()
            isCutDue = false
            try crash(keepingCaches: false)
        }
        try noteChanges()
        try probe?(self)
        return choices.count > 1 || worker.isBusy
    }

    /// Often all of it, often a part.
    private func randomLength(_ available: Int) -> Int {
        available == 0 || random.oneIn(2) ? max(available, 1) : 1 + random.below(available)
    }

    private func completeData(_ reactor: SimulatedReactor) {
        // Several at once, as a real queue delivers them.
        var completions: [(UInt64, Int32)] = []
        for _ in 0...random.below(3) where !reactor.io.pending.isEmpty {
            guard let index = reactor.io.next() else { continue }
            completions.append(reactor.io.complete(index))
        }
        reactor.turn { for (tag, result) in completions { reactor.complete(tag, result) } }
    }

    /// Whether anybody waits for the server.
    private var isAwaited: Bool {
        !changes.isEmpty || !broken.isEmpty || !queries.isEmpty
            || clients.contains { !$0.unanswered.isEmpty || $0.hasOffended }
    }

    /// Runs until every request and change has been answered.
    func settle() throws {
        var idle = 0
        while isAwaited {
            if try progress() {
                idle = 0
            } else {
                idle += 1
                clock += 200_000_000
                if idle > 1000 {
                    let open = (clients + broken).reduce(0) { $0 + $1.unanswered.count }
                    throw WorldFailure(
                        description: "\(open) requests and \(changes.count) changes are never "
                            + "answered")
                }
            }
        }
    }

    // MARK: - Opening and closing

    func open(readOnly: Bool = false) throws {
        note("opening\(readOnly ? " read-only" : "")")
        struckAtOpen = meter.struck
        failedAt = nil
        isReadOnly = readOnly
        isCutDue = false
        pool = try openPool()
        nonisolated(unsafe) weak let world = self
        pool.onFailure = { world?.noteFailure($0) }
        let status = pool.status()
        guard status.mode == (readOnly ? .readOnly : .writable),
            status.problems == pool.spaceProblems
        else {
            throw WorldFailure(description: "the pool opens \(status.mode): \(status.problems)")
        }
        reactors = (0..<options.reactors).map { _ in
            let io = SimulatedDataIO(
                disk: dataDisk, slowOneIn: options.slowOneIn, isInMemory: options.dataInMemory
            ) {
                [unowned self] in random.below($0)
            }
            let reactor = SimulatedReactor(pool: pool, io: io, isReadOnly: readOnly)
            reactor.wroteAfterFailure = { world?.checkAfterFailure($0) }
            return reactor
        }
        worker.reset()
        try checkNames(pool)
    }

    private func noteFailure(_ error: PoolError) {
        note("the pool fails: \(error)")
        if !isTroubled {
            wrong = WorldFailure(description: "the pool fails though no I/O has: \(error)")
        }
        failedAt = time
        metadataStruckAtFailure = metadataDisk.struck
    }

    /// A fault may keep it from opening; without it, it opens.
    private func openPool() throws -> Pool {
        do { return try Pool(metadata: metadataDisk, data: dataDisk, options: poolOptions) } catch {
            guard isTroubled else { throw error }
            heal()
            return try Pool(metadata: metadataDisk, data: dataDisk, options: poolOptions)
        }
    }

    var poolOptions: PoolOptions {
        var poolOptions = PoolOptions()
        poolOptions.cacheBlocks = options.cacheBlocks
        poolOptions.tableBytes = options.tableBytes
        poolOptions.passDiscardsDown = options.passDiscardsDown
        poolOptions.bounds = options.bounds
        poolOptions.readOnly = isReadOnly
        return poolOptions
    }

    /// As the server stops: everything is answered, committed, and the worker is at rest.
    func close() throws {
        note("closing")
        try settle()
        if failedAt != nil { return try recover() }
        for client in clients { client.wire.isClosedByClient = true }
        clients = []
        // A server that stops takes no more connections.
        for arrival in arrivals { arrival.wire.isClosedByServer = true }
        arrivals = []
        for reactor in reactors { reactor.stop() }
        var patience = 100_000
        while !(pool.isAtRest && !reactors.contains(where: \.isBusy)) {
            if !(try progress()) { clock += 100_000_000 }
            // A fault may strike even now.
            if failedAt != nil { return try recover() }
            patience -= 1
            if patience == 0 {
                throw WorldFailure(description: "the pool does not come to rest")
            }
        }
        for reactor in reactors { reactor.close() }
        reactors = []
        arrivals = []
        pool = nil
    }

    private func reopen() throws {
        try settle()
        if failedAt != nil { return try recover() }
        try verifyAll()
        heal()
        if options.fills, meter.struck > struckAtOpen {
            try checkSpace()
            if failedAt != nil { return try recover() }
        }
        try close()
        // A fault may have struck while it was closed; then it is open already.
        if pool != nil { return }
        if options.grows && random.oneIn(2) { grow() }
        if options.strangers && random.oneIn(2) { try makeStranger() }
        try open()
        counts.reopens += 1
    }

    private func grow() {
        counts.grows += 1
        dataDisk.grow(to: dataDisk.bytes.count + (1 + random.below(8)) * blockSize)
        if random.oneIn(2) {
            metadataDisk.grow(
                to: metadataDisk.bytes.count + (1 + random.below(64)) * Layout.blockSize)
        }
    }

    /// The server's end of everything is gone; the clients notice.
    func severClients() {
        for client in clients {
            client.wire.isClosedByClient = true
            broken.append(client)
        }
        clients = []
        arrivals = []
    }
}

extension SentRequest {
    var changes: Bool {
        switch command {
        case .write, .trim, .writeZeroes: true
        case .read, .flush, .cache, .blockStatus, .disconnect: false
        }
    }
    /// Its acknowledgement says that something will be kept.
    var isPromise: Bool { command == .flush || (changes && !changed.isEmpty) }
}
