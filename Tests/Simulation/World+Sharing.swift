// What happens seldom by itself, because each of its steps has to come at the right time: blocks
// that stop being shared while others still read or write them, and flushes that fail beside others.

import NBDProtocol
import ThinPool

extension World {
    /// A volume and its snapshot, a client of each, and two blocks that they share. The snapshot
    /// gives one of them up, by which it becomes the volume's alone; somebody is slow; the volume
    /// writes.
    func drill() throws {
        guard failedAt == nil, !isReadOnly, let name = models.keys.sorted().first,
            let origin = models[name], !origin.isGoing, origin.sectors >= 2 * sectorsPerBlock
        else { return }
        let block = 0..<sectorsPerBlock
        let other = sectorsPerBlock..<2 * sectorsPerBlock
        guard let writer = try drillClient(origin) else { return }
        if !random.oneIn(4) {
            send(.write, block, writer)
            send(.write, other, writer)
        }
        try goOn(40)
        let asked = ask(.snapshot(origin: name, name: self.name()))
        while asked.result == nil, failedAt == nil, changes.contains(where: { $0 === asked }) {
            try passTime()
        }
        guard case .some(.none) = asked.result, case .snapshot(_, let copy, _, _) = asked.change,
            let model = models[copy], let reader = try drillClient(model)
        else { return }

        // What is read of the snapshot may take longer than the block is its own.
        if random.oneIn(2) {
            for reactor in reactors { reactor.io.delaysNext = .read }
            send(.read, 0..<1, reader)
            try goOn(12)
        }
        send(.trim, block, reader)
        let commits = !random.oneIn(3)
        if commits { send(.flush, 0..<0, reader) }
        try goOn(60)
        if random.oneIn(2) {
            // The table forgets what it allows while a write that it has allowed is under way.
            send(.write, 0..<1, writer)
            try goOn(20)
            for reactor in reactors { reactor.io.delaysNext = .write }
        }
        send(.write, 1..<2, writer)
        try goOn(20)
        if !commits, options.powerCuts, random.oneIn(2) { return try crash(keepingCaches: false) }
        send(.read, other, reader)
        try goOn(20)
        send(.trim, other, reader)
        try goOn(12)
        send(.write, 2..<3, writer)
        try goOn(60)
        for reactor in reactors { reactor.io.delaysNext = nil }
        if !model.isGoing { delete(model) }
    }

    /// Flushes and superblocks that fail beside others, with as much as possible at stake: what was
    /// written in place, and what was not.
    func failFlush() throws {
        for number in clients.count..<max(4, clients.count) {
            if let model = randomModel(), !model.isGoing {
                connect(newClient(model), to: number % reactors.count)
            }
        }
        try goOn(40)
        let all = clients.filter { $0.state == .ready }
        guard let one = all.first, !isReadOnly else { return }
        for client in all { send(.write, 0..<1, client) }
        for client in all { send(.flush, 0..<0, client) }
        try answer(all)
        for client in all { send(.write, randomPlace(client.model), client) }
        try answer(all)
        guard failedAt == nil else { return }
        switch random.below(4) {
        case 0:
            // A flush has been done, and that is long not told: it covers nothing that comes now.
            for reactor in reactors { reactor.io.tellsFlushLate = true }
            send(.flush, 0..<0, one)
            try goOn(10)
            for reactor in reactors { reactor.io.tellsFlushLate = false }
            for client in all { send(.write, 0..<1, client) }
            try answer(all.filter { $0 !== one }, most: 100)
            for client in all { send(.flush, 0..<0, client) }
            try answer(all)
            if options.powerCuts { return try crash(keepingCaches: false) }
        case 1:
            // A flush has failed, and that is long not told: meanwhile no other counts either, nor
            // one that belongs to a commit.
            for command in [Command.trim, .write] where random.oneIn(2) {
                for client in all.dropFirst() { send(command, lastBlock(client.model), client) }
                try answer(all)
            }
            for reactor in reactors { reactor.io.tellsFlushLate = true }
            dataDisk.faults.append(Fault([.flush]))
            let struck = dataDisk.struck
            send(.flush, 0..<0, one)
            for _ in 0..<60 where dataDisk.struck == struck { try progress() }
            for reactor in reactors { reactor.io.tellsFlushLate = false }
            for client in all.dropFirst() { send(.flush, 0..<0, client) }
            try goOn(40)
        case 2:
            // The superblock is on its way, and another flush is asked for, which may fail.
            worker.delaysSuperblock = true
            let last = one.model.sectors - 1
            send(.write, last..<last + 1, one)
            send(.flush, 0..<0, one)
            for _ in 0..<150 where !worker.isWritingSuperblock { try progress() }
            if !random.oneIn(3) { dataDisk.faults.append(Fault([.flush])) }
            for client in all {
                send(.write, 0..<1, client)
                try answer([client], most: 12)
                send(.flush, 0..<0, client)
            }
            try goOn(100)
        default:
            metadataDisk.faults.append(Fault([.write], sectors: 0..<8))
            for client in all {
                send(.write, randomPlace(client.model), client)
                send(.flush, 0..<0, client)
            }
            try goOn(80)
        }
        worker.delaysSuperblock = false
        if random.oneIn(2) { return }
        if options.kills || options.powerCuts { try crash(keepingCaches: options.kills) }
    }

    /// The power goes right after something was promised that needed no commit.
    func cutAfterPromise() throws {
        guard failedAt == nil, !isReadOnly, let model = randomModel(), !model.isGoing,
            let client = try drillClient(model)
        else { return }
        let block = 0..<min(sectorsPerBlock, model.sectors)
        send(.write, block, client)
        send(.flush, 0..<0, client)
        try answer([client])
        let part = randomPlace(model).lowerBound % block.count
        send(random.oneIn(2) ? .writeZeroes : .write, part..<part + 1, client, .fua)
        try answer([client])
        try crash(keepingCaches: false)
    }

    /// The server is killed while it writes a superblock, and the power goes when its successor
    /// writes metadata.
    func killAtSuperblock() throws {
        guard failedAt == nil, !isReadOnly, let model = randomModel(), !model.isGoing,
            let client = try drillClient(model)
        else { return }
        for command in [Command.trim, .write] {
            send(command, 0..<model.sectors, client)
            send(.flush, 0..<0, client)
            if command == .trim { try answer([client]) }
        }
        worker.delaysSuperblock = true
        for _ in 0..<200 where !worker.isWritingSuperblock { try progress() }
        worker.delaysSuperblock = false
        guard worker.isWritingSuperblock, failedAt == nil else { return }
        try crash(keepingCaches: true)
        guard failedAt == nil, let model = randomModel(), !model.isGoing,
            let client = try drillClient(model)
        else { return }
        send(.write, 0..<model.sectors, client)
        send(.flush, 0..<0, client)
        for _ in 0..<200 where !worker.hasIO { try progress() }
        for _ in 0..<random.below(20) { try progress() }
        try crash(keepingCaches: false)
    }

    private func lastBlock(_ model: VolumeModel) -> Range<Int> {
        (model.sectors - 1) / sectorsPerBlock * sectorsPerBlock..<model.sectors
    }

    private func randomPlace(_ model: VolumeModel) -> Range<Int> {
        let sector = random.oneIn(2) ? 0 : random.below(model.sectors)
        return sector..<sector + 1
    }

    /// Until all that these have asked for is answered, or for some time.
    private func answer(_ clients: [SimulatedClient], most: Int = 400) throws {
        for _ in 0..<most where clients.contains(where: { !$0.unanswered.isEmpty }) {
            try progress()
        }
    }

    private func send(
        _ command: Command, _ sectors: Range<Int>, _ client: SimulatedClient,
        _ flags: CommandFlags = []
    ) {
        guard client.isReady, clients.contains(where: { $0 === client }),
            let request = request(command, client.model, sectors, flags)
        else { return }
        submit(request, by: client)
    }

    /// A client that is ready, or nil if there is none in time.
    private func drillClient(_ model: VolumeModel) throws -> SimulatedClient? {
        for _ in 0..<200 {
            let own = clients.filter { $0.model === model && !$0.isLeaving && !$0.hasOffended }
            if let ready = own.first(where: { $0.state == .ready }) { return ready }
            if own.isEmpty, !model.isGoing, models[model.name] === model {
                connect(newClient(model))
            }
            try progress()
            if failedAt != nil { return nil }
        }
        return nil
    }

    private func goOn(_ most: Int) throws {
        for _ in 0..<most / 2 + random.below(most) { try progress() }
    }

    private func passTime() throws {
        if !(try progress()) { clock += 100_000_000 }
    }
}
