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
    private var nextValue: UInt64 = 1
    /// Names sort by age.
    private var nextName = 1000

    var pool: Pool!
    var reactors: [SimulatedReactor] = []
    var clients: [SimulatedClient] = []
    /// Connections that have not been accepted yet.
    private var arrivals: [(reactor: Int, wire: Wire)] = []
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
    let worker = SimulatedWorker()
    /// When the pool failed, if it has.
    var failedAt: UInt64?
    /// Faults that had struck, or other damage that was done, when the pool was last opened.
    var struckAtOpen = 0
    var hasRot = false
    /// Why the pool failed with no fault in sight, and whatever else may never happen.
    var wrong: WorldFailure?
    /// Faults of the metadata disk when the pool failed.
    var metadataStruckAtFailure = 0
    /// The pool is open read-only.
    var isReadOnly = false
    /// The power is to go when the present step is over.
    private var isCutDue = false
    private var hasFlooded = false
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
        // Nobody may ever read what the disk held before.
        dataDisk = SimulatedDisk(
            path: "simulated data",
            bytes: [UInt8](
                repeating: 0xEE, count: options.dataBlocks * Int(options.blockSectors) * 512))
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
                ask(.snapshot(origin: origin.name, name: name()))
            }
        case 13..<17 where options.deletions:
            if let model = randomModel() { delete(model) }
        case 17..<19:
            try reopen()
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
        case 49 where options.dataFaults && failedAt == nil:
            worker.failsCatalogue = true
            ask(.create(name: name(), size: randomSize()))
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

    // MARK: - Clients

    private func connectOrLeave() throws {
        if clients.count < options.clients, !random.oneIn(4), let model = randomModel(),
            !model.isGoing
        {
            connect(SimulatedClient(model: model))
        } else if !clients.isEmpty {
            let client = clients[random.below(clients.count)]
            if random.oneIn(3) {
                client.patience = random.below(60)
            } else if client.state == .ready, !client.isLeaving {
                client.leave()
            }
        }
    }

    func connect(_ client: SimulatedClient, to reactor: Int? = nil) {
        clients.append(client)
        arrivals.append((reactor ?? random.below(reactors.count), client.wire))
    }

    /// A client's connection breaks, with all that is under way on it.
    func dropClient() throws {
        guard !clients.isEmpty else { return }
        let client = clients[random.below(clients.count)]
        var isMidway = false
        if client.state == .ready, !client.isLeaving, random.oneIn(2) {
            // In the middle of a long write, and with a reply on its way.
            let block = 0..<min(sectorsPerBlock, client.model.sectors)
            if let read = request(.read, client.model, block) { submit(read, by: client) }
            if let write = request(.write, client.model, block) { submit(write, by: client) }
            for _ in 0..<60 where clients.contains(where: { $0 === client }) {
                try progress()
                let missing = client.wire.toServer.count
                if let place = place(of: client.wire), place.sending != nil,
                    place.receiving != nil, missing > 20_000, missing < block.count * 512
                {
                    // The kernel has not yet received the rest.
                    place.patience = 20
                    isMidway = true
                    break
                }
            }
            guard clients.contains(where: { $0 === client }) else { return }
            // Others have use for the memory.
            for other in clients
            where other !== client && other.state == .ready && !other.isLeaving
                && other.model.sectors >= sectorsPerBlock
            {
                for command in [Command.write, .read] {
                    if let more = request(command, other.model, block) { submit(more, by: other) }
                }
            }
        }
        clients.removeAll { $0 === client }
        client.wire.isClosedByClient = true
        client.wire.isReset = !isMidway && random.oneIn(2)
        broken.append(client)
    }

    /// What the server still has of the connection.
    private func place(of wire: Wire) -> SimulatedReactor.Place? {
        for reactor in reactors {
            if let place = reactor.places.first(where: { $0?.wire === wire }) { return place }
        }
        return nil
    }

    /// Those come again whose old connection's end the server has noticed, though it may still be
    /// busy with what came over it; and most send again what was not answered.
    private func reconnectBroken() {
        for client in broken {
            if arrivals.contains(where: { $0.wire === client.wire }) { continue }
            let old = place(of: client.wire)
            if let old, [.handshake, .transmission].contains(old.connection.phase) { continue }
            let isWanted =
                !client.isLeaving && models[client.model.name] === client.model
                && !client.model.isGoing
            // Who does not come again is only awaited until nothing of his is under way.
            if !isWanted, old != nil { continue }
            broken.removeAll { $0 === client }
            let open = client.reconnect()
            guard isWanted else {
                endFormer(client)
                continue
            }
            counts.reconnects += 1
            connect(client)
            for request in open where !random.oneIn(4) { submit(request, by: client) }
        }
    }

    /// Of what the client sent on broken connections nothing is under way any more.
    private func endFormer(_ client: SimulatedClient) {
        time += 1
        for request in client.former where request.changes {
            client.model.end(
                request.changed, begun: request.begun, at: time, isAcknowledged: false,
                isDurable: false)
        }
        client.former = []
    }

    func send() throws {
        let ready = clients.filter { $0.state == .ready && !$0.isLeaving && !$0.hasOffended }
        guard !ready.isEmpty else {
            if clients.isEmpty, let model = randomModel(), !model.isGoing {
                connect(SimulatedClient(model: model))
            }
            return
        }
        let client = ready[random.below(ready.count)]
        for _ in 0...random.below(3) {
            if let request = randomRequest(client.model) { submit(request, by: client) }
        }
    }

    /// What a server has to refuse, in between what is right, or to hang up on; and visitors.
    private func misbehave() {
        if random.oneIn(4) {
            let wire = Wire()
            SimulatedClient.visit(wire, random.below(SimulatedClient.visits))
            wire.isClosedByClient = random.oneIn(2)
            visitors.append(wire)
            arrivals.append((random.below(reactors.count), wire))
            return
        }
        let ready = clients.filter { $0.state == .ready && !$0.isLeaving && !$0.hasOffended }
        guard !ready.isEmpty, !isReadOnly else { return }
        let client = ready[random.below(ready.count)]
        if random.oneIn(12) { return client.offend() }
        let all = WrongRequest.all(size: UInt64(client.model.sectors) * 512)
        counts.refused += 1
        submit(
            SentRequest(
                command: .cache, sectors: 0..<0, changed: 0..<0, value: 0, flags: [], begun: 0,
                wrong: all[random.below(all.count)]),
            by: client)
    }

    /// More than the server takes from a client, or from all of them, at once.
    private func flood() throws {
        let isLong = random.oneIn(2)
        if isLong {
            // Many of one reactor and of the longest volume.
            let sorted = models.values.sorted { ($0.sectors, $0.name) < ($1.sectors, $1.name) }
            guard let longest = sorted.last, !longest.isGoing else { return }
            for _ in 0..<4 { connect(SimulatedClient(model: longest), to: 0) }
            for _ in 0..<200 { try progress() }
        }
        let ready = clients.filter { $0.state == .ready && !$0.isLeaving && !$0.hasOffended }
        guard !ready.isEmpty else { return }
        hasFlooded = true
        for client in ready {
            let count = isLong ? 24 : 300
            let end = isLong ? client.model.sectors : 1
            for _ in 0..<count {
                if let read = request(.read, client.model, 0..<end) { submit(read, by: client) }
            }
        }
    }

    private func randomRequest(_ model: VolumeModel) -> SentRequest? {
        let range = randomRange(model)
        let fua: CommandFlags = random.oneIn(options.fuaOneIn) ? [.fua] : []
        switch random.below(12) {
        case 0..<3:
            return request(.read, model, range)
        case 3..<8:
            return request(.write, model, range, fua)
        case 8 where options.discards:
            var flags = fua
            if random.oneIn(2) { return request(.trim, model, range, flags) }
            if random.oneIn(3) { flags.insert(.noHole) }
            return request(.writeZeroes, model, range, flags)
        case 9 where random.oneIn(8):
            return request(.cache, model, range)
        default:
            return request(.flush, model, 0..<0)
        }
    }

    /// Often one or more whole blocks, often a few sectors.
    private func randomRange(_ model: VolumeModel) -> Range<Int> {
        let blocks = (model.sectors + sectorsPerBlock - 1) / sectorsPerBlock
        if let hotBlock = options.hotBlock, !random.oneIn(4) {
            let start = min(hotBlock, blocks - 1) * sectorsPerBlock
            let end = min(start + sectorsPerBlock, model.sectors)
            if random.oneIn(4) { return start..<end }
            let first = start + random.below(end - start)
            return first..<min(first + 1 + random.below(8), end)
        }
        if random.oneIn(2) {
            let first = random.below(blocks)
            let count = 1 + random.below(min(3, blocks - first))
            return (first * sectorsPerBlock)..<min(
                (first + count) * sectorsPerBlock, model.sectors)
        }
        let first = random.below(model.sectors)
        return first..<min(first + 1 + random.below(2 * sectorsPerBlock), model.sectors)
    }

    func request(
        _ command: Command, _ model: VolumeModel, _ range: Range<Int>, _ flags: CommandFlags = []
    ) -> SentRequest? {
        var request = SentRequest(
            command: command, sectors: range, changed: range, value: 0, flags: flags, begun: 0)
        if command == .trim {
            // Only whole blocks; the volume's end ends a block too.
            let first = (range.lowerBound + sectorsPerBlock - 1) / sectorsPerBlock
            var last = range.upperBound / sectorsPerBlock * sectorsPerBlock
            if range.upperBound == model.sectors { last = model.sectors }
            let start = first * sectorsPerBlock
            request.changed = start < last ? start..<last : 0..<0
        }
        if request.changes, !options.overlaps,
            (clients + broken).contains(where: { client in
                client.model === model
                    && client.unanswered.values.contains {
                        $0.changes && $0.changed.overlaps(request.changed)
                    }
            })
        {
            return nil
        }
        if command == .write { request.value = nextWriteValue() }
        return request
    }

    func nextWriteValue() -> UInt64 {
        defer { nextValue += 1 }
        return nextValue
    }

    func submit(_ request: SentRequest, by client: SimulatedClient) {
        var request = request
        request.begun = time
        time += 1
        if request.changes {
            client.model.begin(request.changed, value: request.value, at: request.begun)
            let isWrite = request.command == .write
            client.model.touch(blocks(of: request.sectors), value: isWrite ? request.value : nil)
        }
        counts.requests += 1
        note("\(client.model.name) \(request.command) \(request.sectors) \(request.value) "
            + "\(request.flags.rawValue)")
        client.send(request)
    }

    private func blocks(of sectors: Range<Int>) -> Range<Int> {
        let end = (sectors.upperBound + sectorsPerBlock - 1) / sectorsPerBlock
        return min(sectors.lowerBound / sectorsPerBlock, end)..<end
    }

    /// The engine has done a write in a turn that began when the pool had failed. So whatever it
    /// had to map was not mapped. (A durable one may have been mapped and committed long before, and
    /// be told only now.)
    private func checkAfterFailure(_ request: VolumeRequest) {
        guard let model = models[request.volume.name], request.length > 0, !request.fua else {
            return
        }
        let first = Int(request.offset / 512)
        let touched = blocks(of: first..<first + Int(request.length / 512))
        let value = request.buffer!.load(as: UInt64.self)
        if touched.count == 1, model.isSoleWriter(touched.lowerBound, value: value) {
            wrong = WorldFailure(
                description: "write \(value) of \(model.name) is acknowledged, but the pool had "
                    + "failed before its block could be mapped")
        }
    }

    /// A client takes what has come for it.
    private func receive(_ client: SimulatedClient) throws {
        if client.patience > 0 {
            client.patience -= 1
            return
        }
        let replies = try client.receive()
        if client.state == .ready, !client.former.isEmpty { endFormer(client) }
        for reply in replies {
            time += 1
            try finish(reply, of: client)
        }
        if client.state == .refused {
            client.wire.isClosedByClient = true
            try lose(client)
        }
    }

    /// The server has hung up on it, or refuses its export.
    private func lose(_ client: SimulatedClient) throws {
        try client.checkHangUp()
        clients.removeAll { $0 === client }
        // Its requests may still be under way in the server.
        broken.append(client)
    }

    private func finish(_ reply: ClientReply, of client: SimulatedClient) throws {
        let request = reply.request
        let model = client.model
        note("\(model.name) \(request.command)@\(request.begun) answered \(reply.error)")
        if let wrong = request.wrong {
            guard reply.error == wrong.error.rawValue else {
                throw WorldFailure(
                    description: "\(wrong) of \(model.name) is answered with \(reply.error)")
            }
            return
        }
        if isReadOnly, request.changes, reply.error == 0 {
            throw WorldFailure(
                description: "\(request.command) of \(model.name) is done, though it is read-only")
        }
        if reply.error != 0 {
            try checkError(reply.error, request, model)
            if request.changes {
                model.end(
                    request.changed, begun: request.begun, at: time, isAcknowledged: false,
                    isDurable: false)
            }
            return
        }
        if let failedAt, request.begun > failedAt, request.isPromise {
            throw WorldFailure(
                description: "\(request.command) of \(model.name) was acknowledged after the pool "
                    + "had failed")
        }
        switch request.command {
        case .read:
            try check(reply.payload, request.sectors, model) { sector, value in
                model.allows(sector, value, sentAt: request.begun)
                    || failedAt != nil && model.allowsAfterCut(sector, value)
            }
        case .write, .trim, .writeZeroes:
            model.end(
                request.changed, begun: request.begun, at: time, isAcknowledged: true,
                isDurable: request.flags.contains(.fua))
        case .flush:
            // It covers every connection's writes: the export says CAN_MULTI_CONN.
            model.flushed(sentAt: request.begun)
        case .cache, .disconnect:
            break
        }
        if options.cutsAtPromises, request.command == .flush || request.flags.contains(.fua),
            random.oneIn(20)
        {
            isCutDue = true
        }
    }

    private func checkError(
        _ error: UInt32, _ request: SentRequest, _ model: VolumeModel
    ) throws {
        switch WireError(rawValue: error) {
        case .noSpace where request.changes:
            counts.outOfSpace += 1
        case .inputOutput where isTroubled:
            break
        case .notPermitted where isReadOnly && request.changes:
            counts.refused += 1
        default:
            throw WorldFailure(
                description: "\(request.command) of \(model.name) \(request.sectors) failed with "
                    + "\(error)")
        }
    }

    /// Every sector has one value throughout, and it is an allowed one.
    func check(
        _ bytes: ArraySlice<UInt8>, _ sectors: Range<Int>, _ model: VolumeModel,
        _ isAllowed: (Int, UInt64) -> Bool
    ) throws {
        try bytes.withUnsafeBytes { bytes in
            for (i, sector) in sectors.enumerated() {
                let value = bytes.loadUnaligned(fromByteOffset: i * 512, as: UInt64.self)
                var differs: UInt64 = 0
                for word in 1..<64 {
                    differs |=
                        bytes.loadUnaligned(fromByteOffset: i * 512 + word * 8, as: UInt64.self)
                        ^ value
                }
                guard differs == 0 else {
                    throw WorldFailure(
                        description: "sector \(sector) of \(model.name) is torn inside: "
                            + "it begins with \(value)")
                }
                guard isAllowed(sector, value) else {
                    throw WorldFailure(
                        description: "sector \(sector) of \(model.name) reads \(value) at \(time); "
                            + "allowed are \(model.describe(sector))")
                }
            }
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
            if arrivals.contains(where: { $0.reactor == number }) {
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
        if meter.cutIsDue || isCutDue {
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
        !changes.isEmpty || !broken.isEmpty
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
        guard status.mode == (readOnly ? .readOnly : .writable), status.problems.isEmpty else {
            throw WorldFailure(description: "the pool opens \(status.mode): \(status.problems)")
        }
        reactors = (0..<options.reactors).map { _ in
            let io = SimulatedDataIO(disk: dataDisk, slowOneIn: options.slowOneIn) {
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
        poolOptions.tablePages = options.tablePages
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
        case .read, .flush, .cache, .disconnect: false
        }
    }
    /// Its acknowledgement says that something will be kept.
    var isPromise: Bool { command == .flush || (changes && !changed.isEmpty) }
}
