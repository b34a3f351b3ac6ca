// What happens seldom by itself, because each of its steps has to come at the right time: blocks that
// stop being shared while others still read or write them, and flushes that fail beside others.

import NBDProtocol
import ThinPool

extension World {
    /// A volume and its snapshot, a client of each, and two blocks that they share. The snapshot gives
    /// one of them up, by which it becomes the volume's alone; somebody is slow; the volume writes.
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
        guard case .some(.none) = asked.result, case .snapshot(_, let copy) = asked.change,
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
        if random.oneIn(3) {
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

    /// One of several flushes fails, and that is long not told: meanwhile no other counts either.
    func failFlush() throws {
        dataDisk.faults.append(Fault([.flush]))
        for client in clients where !random.oneIn(3) {
            for reactor in reactors where random.oneIn(2) { reactor.io.tellsFlushLate = true }
            let first = random.below(client.model.sectors)
            send(.write, first..<first + 1, client)
            send(.flush, 0..<0, client)
            try goOn(10)
        }
        try goOn(30)
        for reactor in reactors { reactor.io.tellsFlushLate = false }
        if options.kills, random.oneIn(2) { try crash(keepingCaches: true) }
    }

    private func send(_ command: Command, _ sectors: Range<Int>, _ client: SimulatedClient) {
        guard client.state == .ready, !client.isLeaving, !client.hasOffended,
            clients.contains(where: { $0 === client }),
            let request = request(command, client.model, sectors)
        else { return }
        submit(request, by: client)
    }

    /// A client that is ready, or nil if there is none in time.
    private func drillClient(_ model: VolumeModel) throws -> SimulatedClient? {
        for _ in 0..<200 {
            let own = clients.filter { $0.model === model && !$0.isLeaving && !$0.hasOffended }
            if let ready = own.first(where: { $0.state == .ready }) { return ready }
            if own.isEmpty, !model.isGoing, models[model.name] === model {
                connect(SimulatedClient(model: model))
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
