// The server restarts in place: what was begun is answered and committed, and another server goes on
// with the connections, half-received requests included. Its clients must not notice.

extension World {
    func handOver() throws {
        heal()
        if failedAt != nil { return try recover() }
        note("handing over")
        isHandingOver = true
        defer { isHandingOver = false }
        for reactor in reactors { reactor.pause() }
        var patience = 100_000
        // To take note of a change is to read what it made, and another may be told done meanwhile.
        while !pool.isAtRest || reactors.contains(where: \.isBusy)
            || changes.contains(where: { $0.result != nil })
        {
            if !(try progress()) { clock += 100_000_000 }
            patience -= 1
            guard failedAt == nil, patience > 0 else {
                for reactor in reactors { reactor.breakOff() }
                guard failedAt != nil else {
                    throw WorldFailure(description: "a paused server does not come to rest")
                }
                severClients()
                isHandingOver = false
                return try recover()
            }
        }
        let carried = reactors.flatMap(\.carried)
        for reactor in reactors { reactor.close() }
        reactors = []
        pool = nil
        // Errors that the clients still have to read are from before.
        let struck = struckAtOpen
        try open()
        struckAtOpen = struck
        for (state, wire) in carried {
            let reactor = reactors[random.below(reactors.count)]
            reactor.turn { reactor.adopt(wire, state) }
        }
        counts.handOvers += 1
    }
}
