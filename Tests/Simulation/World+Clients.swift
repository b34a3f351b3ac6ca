// The clients of a world: when they come and go, what they ask for, and whether what they get is what
// they were promised.

import Glibc
import NBDProtocol
import ThinMetadata
import ThinPool

extension World {
    func connectOrLeave() throws {
        if clients.count < options.clients, !random.oneIn(4), let model = randomModel(),
            !model.isGoing
        {
            connect(newClient(model))
        } else if !clients.isEmpty {
            let client = clients[random.below(clients.count)]
            if random.oneIn(3) {
                client.patience = random.below(60)
            } else if client.state == .ready, !client.isLeaving {
                client.leave()
            }
        }
    }

    /// Each format in turn.
    func newClient(_ model: VolumeModel) -> SimulatedClient {
        let formats = [WireFormat.simple, .structured, .extended]
        clientsMade += 1
        return SimulatedClient(model: model, format: formats[clientsMade % formats.count])
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
    func place(of wire: Wire) -> SimulatedReactor.Place? {
        for reactor in reactors {
            if let place = reactor.places.first(where: { $0?.wire === wire }) { return place }
        }
        return nil
    }

    /// Those come again whose old connection's end the server has noticed, though it may still be
    /// busy with what came over it; and most send again what was not answered.
    func reconnectBroken() {
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
        let ready = clients.filter(\.isReady)
        guard !ready.isEmpty else {
            if clients.isEmpty, let model = randomModel(), !model.isGoing {
                connect(newClient(model))
            }
            return
        }
        let client = ready[random.below(ready.count)]
        for _ in 0...random.below(3) {
            if let request = randomRequest(client.model) { submit(request, by: client) }
        }
    }

    /// What a server has to refuse, in between what is right, or to hang up on; and visitors.
    func misbehave() {
        if random.oneIn(4) {
            let wire = Wire()
            SimulatedClient.visit(wire, random.below(SimulatedClient.visits))
            wire.isClosedByClient = random.oneIn(2)
            visitors.append(wire)
            arrivals.append((random.below(reactors.count), wire))
            return
        }
        let ready = clients.filter(\.isReady)
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
    func flood() throws {
        let isLong = random.oneIn(2)
        if isLong {
            // Many of one reactor and of the longest volume.
            let sorted = models.values.sorted { ($0.sectors, $0.name) < ($1.sectors, $1.name) }
            guard let longest = sorted.last, !longest.isGoing else { return }
            for _ in 0..<4 { connect(newClient(longest), to: 0) }
            for _ in 0..<200 { try progress() }
        }
        let ready = clients.filter(\.isReady)
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

    func blocks(of sectors: Range<Int>) -> Range<Int> {
        let end = (sectors.upperBound + sectorsPerBlock - 1) / sectorsPerBlock
        return min(sectors.lowerBound / sectorsPerBlock, end)..<end
    }

    /// The engine has done a write in a turn that began when the pool had failed. So whatever it
    /// had to map was not mapped. (A durable one may have been mapped and committed long before, and
    /// be told only now.)
    func checkAfterFailure(_ request: VolumeRequest) {
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
    func receive(_ client: SimulatedClient) throws {
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
    func lose(_ client: SimulatedClient) throws {
        try client.checkHangUp()
        clients.removeAll { $0 === client }
        // Its requests may still be under way in the server.
        broken.append(client)
    }

    private func finish(_ reply: ClientReply, of client: SimulatedClient) throws {
        let request = reply.request
        let model = client.model
        note("\(model.name) \(request.command)@\(request.begun) answered \(reply.error)")
        // Anything may be read from a damaged disk.
        if isDamaged { return }
        if let wrong = request.wrong {
            if reply.error == WireError.notPermitted.rawValue,
                failedAt != nil || model.mayRefuse(sentAt: request.begun)
            {
                return
            }
            guard reply.error == wrong.error.rawValue else {
                throw WorldFailure(
                    description: "\(wrong) of \(model.name) is answered with \(reply.error)")
            }
            return
        }
        if request.changes, reply.error == 0,
            isReadOnly || !model.mayChange(sentAt: request.begun)
        {
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
        case .cache, .blockStatus, .disconnect:
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
        case .notPermitted
        where request.changes
            && (isReadOnly || failedAt != nil || model.mayRefuse(sentAt: request.begun)):
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
}
