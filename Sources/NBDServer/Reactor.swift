// One thread with its queue, its engine and its connections. A turn:
//
//   wait for completions ─▶ engine.beginTurn ─▶ act on each completion, parse and submit requests
//   ─▶ engine.endTurn ─▶ take what is finished ─▶ send and receive for every connection touched
//
// and the next wait submits all of it in one system call.
//
// 1. Everything here is used by this thread only; others leave word in the mailbox.
// 2. Requests are submitted between beginTurn and endTurn, nowhere else.
// 3. A connection is freed when neither the kernel nor the engine has anything of it.

import BlockIO
import Glibc
import Logging
import ThinPool

final class Reactor {
    let number: Int
    let shared: ServerState
    let mailbox: Mailbox
    let logger: Logger
    let queue: any IOQueue
    private let data: QueueDataIO
    let engine: VolumeIO
    let buffers: BufferPool
    let farewells: Farewells

    // Listeners: the first reactor has them all.
    var doors: [Door]
    var nextReactor = 0

    /// The client that was connected before the server started, while it is this reactor's.
    var firstSession: Admission.Session?

    // Connections, by index.
    /// Indices; some more than count, for those that end in favour of others.
    let capacity: Int
    let connections: UnsafeMutablePointer<Connection?>
    private var freeIndices: [Int]
    private var generation: UInt32 = 0
    private var connectionCount = 0
    /// Some connection's export was busy when it asked for it.
    private var hasWaiting = false
    /// What the pool's count was when they asked again.
    private var fencesRemoved = 0
    /// Those to look after at the end of the turn.
    private let marked: UnsafeMutablePointer<Int>
    private var markedCount = 0

    // Completions of this turn.
    private struct Completion {
        var tag: Tag
        var result: Int32
    }
    private var completions: UnsafeMutablePointer<Completion>
    private var completionCount = 0
    private var completionCapacity = 1024

    // Time, counted in ticks, which come only while something has a deadline.
    let tickNanoseconds: UInt64
    var tick: UInt64 = 0
    var isTicking = false
    /// Between the last two ticks somebody found no memory for a payload.
    var memoryIsShort = false
    var stopDeadline: UInt64?
    /// `off` once the kernel is known to have no TLS.
    private var kernelTLS: KernelTLSUse

    /// Whether looking for completions before going to sleep pays: while only clients are waited
    /// for, and while the data device is.
    private var clientSpin = SpinCredit()
    private var deviceSpin = SpinCredit()

    /// Submission entries: a turn of a busy connection fits.
    private static let queueEntries = 1024
    /// How long to look for completions before going to sleep, where that has paid of late: about
    /// what going to sleep and waking up costs, for the reactor and then for the client.
    private static let spinNanoseconds: UInt64 = 50_000
    /// What being woken adds to a wait that was slept through.
    private static let wakeNanoseconds: UInt64 = 25_000
    /// Requests under way up to which a device is waited for so.
    private static let spinDepth = 4
    private static let endingCapacity = 64
    private static let longestTick: UInt64 = 1_000_000_000
    private static let shortestTick: UInt64 = 10_000_000

    /// - Note: called on the reactor's own thread, which the queue belongs to.
    init(
        number: Int, shared: ServerState, mailbox: Mailbox, listeners: [Listener]
    ) throws(DeviceError) {
        self.number = number
        self.shared = shared
        self.mailbox = mailbox
        logger = shared.logger
        kernelTLS = shared.configuration.tls?.kernel ?? .off
        let configuration = shared.configuration
        let (queue, fallbackReason) = try makeIOQueue(
            entries: Self.queueEntries, allowRing: shared.pool.options.allowRing)
        self.queue = queue
        farewells = Farewells(queue: queue)
        if number == 0 {
            logger.info(
                "I/O by \(queue.name)\(fallbackReason.map { ": \($0)" } ?? "")",
                metadata: ["reactors": "\(configuration.reactors)"])
        }
        data = QueueDataIO(
            queue: queue, fd: configuration.dataFileDescriptor,
            memory: configuration.dataInMemory)
        engine = VolumeIO(pool: shared.pool, io: data, wake: { mailbox.nudge() })
        buffers = BufferPool(
            capacity: max(
                configuration.limits.payloadBytes / configuration.reactors, BufferPool.largest))
        doors = listeners.map { Door(listener: $0) }
        capacity = configuration.limits.connections + Self.endingCapacity
        connections = .allocate(capacity: capacity)
        connections.initialize(repeating: nil, count: capacity)
        freeIndices = Array((0..<capacity).reversed())
        marked = .allocate(capacity: capacity)
        completions = .allocate(capacity: completionCapacity)
        let limits = configuration.limits
        let shortest = min(
            limits.handshakeTimeout, limits.stopTimeout, limits.stallTimeout,
            limits.idleTimeout ?? limits.stallTimeout)
        tickNanoseconds = min(
            max(Self.nanoseconds(shortest) / 4, Self.shortestTick), Self.longestTick)
    }

    deinit {
        connections.deinitialize(count: capacity)
        connections.deallocate()
        marked.deallocate()
        completions.deallocate()
    }

    // MARK: - The loop

    /// Serves until it is told to stop and everything has come to its end.
    func run() {
        queue.poll(mailbox.descriptor, tag: Tag(.wake).rawValue)
        if number == 0 {
            let listening = shared.configuration.listening
            if let socket = listening.connectedSocket { welcomeFirst(socket) }
            if let inherited = listening.inherited { welcome(inherited) }
        }
        for index in doors.indices { accept(index) }
        do throws(DeviceError) {
            while !isFinished { try turn() }
        } catch {
            // What the queue holds can neither be waited for nor freed, and the pool waits for it. The
            // next server recovers from an end here as from a power cut; this one would only hang.
            logger.critical("the server ends, because reactor \(number) cannot go on: \(error)")
            _exit(EXIT_FAILURE)
        }
        engine.close()
        for arrival in mailbox.close() { turnAway(arrival) }
    }

    /// The server does not start after all. Nothing has been begun.
    func abandon() {
        engine.close()
    }

    private var isFinished: Bool {
        stopDeadline != nil && connectionCount == 0 && farewells.isEmpty && engine.inFlight == 0
            && doors.allSatisfy { !$0.isOpen }
    }

    private func turn() throws(DeviceError) {
        try collect()
        engine.isShared = connectionCount > 1
        engine.beginTurn()
        for index in 0..<completionCount { act(on: completions[index]) }
        serveWaiters()
        if hasWaiting { retryWaiting() }
        endTurn()
    }

    /// What was submitted since `beginTurn` is begun, and what has ended by then is answered: no
    /// completion tells of it any more.
    func endTurn() {
        engine.endTurn()
        var hasUnfenced = false
        engine.takeFinished { cookie, error in
            let (owner, slot) = Transmission.place(of: cookie)
            let connection = connections[owner]!
            if connection.finish(slot: slot, code: error) { hasUnfenced = true }
            mark(connection)
        }
        settleMarked()
        if hasUnfenced { for mailbox in shared.mailboxes { mailbox.nudge() } }
    }

    /// Submits what was started and waits until something has completed.
    private func collect() throws(DeviceError) {
        completionCount = 0
        if buffers.nextServed != nil { return try poll(wait: false) }
        let waitsForDevice = engine.inFlight > 0
        // With more under way, sleeping lets several come together.
        let isShallow = engine.inFlight <= Self.spinDepth
        if waitsForDevice ? deviceSpin.isGood && isShallow : clientSpin.isGood {
            // Submits what was started, too.
            try poll(wait: false)
            if completionCount > 0 { return }
            if queue.lookOut(nanoseconds: Self.spinNanoseconds) {
                try poll(wait: false)
                if completionCount > 0 { return }
            }
            if waitsForDevice { deviceSpin.failed() } else { clientSpin.failed() }
        }
        let start = monotonicNanoseconds()
        try poll(wait: true)
        if monotonicNanoseconds() - start < Self.spinNanoseconds + Self.wakeNanoseconds && hasNews {
            if waitsForDevice { deviceSpin.wouldHavePaid() } else { clientSpin.wouldHavePaid() }
        }
    }

    /// Something came from outside: sending is done at once, and says nothing about waiting.
    private var hasNews: Bool {
        for index in 0..<completionCount where completions[index].tag.kind != .send { return true }
        return false
    }

    private func poll(wait: Bool) throws(DeviceError) {
        try queue.run(wait: wait) { tag, result in
            if completionCount == completionCapacity { growCompletions() }
            completions[completionCount] = Completion(tag: Tag(rawValue: tag), result: result)
            completionCount += 1
        }
    }

    private func growCompletions() {
        let larger = UnsafeMutablePointer<Completion>.allocate(capacity: completionCapacity * 2)
        larger.update(from: completions, count: completionCount)
        completions.deallocate()
        completions = larger
        completionCapacity *= 2
    }

    private func act(on completion: Completion) {
        let tag = completion.tag
        if tag.isEngine {
            if let done = data.completed(tag, completion.result) {
                engine.complete(tag: done.tag, result: done.result)
            }
            return
        }
        switch tag.kind {
        case .receive:
            let connection = connection(of: tag)
            connection.isReceiving = false
            received(completion.result, by: connection)
            mark(connection)
        case .send:
            let connection = connection(of: tag)
            connection.isSending = false
            connection.sent(completion.result, engine)
            mark(connection)
        case .farewell:
            let socket = Int32(tag.index)
            if let session = farewells.received(completion.result, on: socket) {
                dismiss(socket, session)
            }
        case .wake: wake()
        case .tick: ticked()
        case .accept: acceptEnded(completion.result, by: tag.index)
        case .cancel: break
        case .acceptPause:
            doors[tag.index].isPausing = false
            accept(tag.index)
        case nil: preconditionFailure("a completion with an unknown tag")
        }
    }

    private func received(_ result: Int32, by connection: Connection) {
        if result == -ECANCELED { return connection.receivingCancelled(engine) }
        // Who has only ended to send still has answers due; who has closed a Unix socket has not.
        if result == 0, connection.hasRequestsInFlight, SocketSettings.isClosed(connection.socket) {
            return connection.received(-ECONNRESET, engine)
        }
        guard connection.usesKernelTLS && result < 0 else {
            return connection.received(result, engine)
        }
        // The end of the stream is an error of its own kind.
        connection.receivingEnded(KernelTLS.explain(-result, on: connection.socket), engine)
    }

    private func connection(of tag: Tag) -> Connection {
        let connection = connections[tag.index]!
        precondition(connection.generation == tag.generation, "a completion came too late")
        return connection
    }

    /// Lets those go on that wait for memory, as far as it lasts.
    private func serveWaiters() {
        while let owner = buffers.nextServed {
            let connection = connections[owner]!
            connection.resume(engine)
            mark(connection)
            // Who is first and has room takes it; anything else would turn in circles here.
            if buffers.nextServed == owner { break }
        }
    }

    /// Handshakes whose export was busy ask again when some export has become free: whoever makes
    /// one free wakes all reactors, after that can be seen.
    private func retryWaiting() {
        let removed = shared.pool.fencesRemoved.load(ordering: .acquiring)
        if removed == fencesRemoved { return }
        fencesRemoved = removed
        hasWaiting = false
        for index in 0..<capacity {
            guard let connection = connections[index], connection.isWaiting else { continue }
            connection.resume(engine)
            mark(connection)
        }
    }

    private func wake() {
        mailbox.acknowledge()
        queue.poll(mailbox.descriptor, tag: Tag(.wake).rawValue)
        // Taken first: whoever has to make room has arrived before, and is among the arrivals then
        // if it is not here yet.
        let displaced = mailbox.takeDisplaced()
        for arrival in mailbox.takeArrivals() { adopt(arrival) }
        for session in displaced { displace(session) }
        if mailbox.shouldStop && stopDeadline == nil { beginToStop() }
    }

    // MARK: - Connections

    func mark(_ connection: Connection) {
        guard !connection.isMarked else { return }
        connection.isMarked = true
        marked[markedCount] = connection.index
        markedCount += 1
    }

    func settleMarked() {
        for place in 0..<markedCount {
            let connection = connections[marked[place]]!
            connection.isMarked = false
            settle(connection)
        }
        markedCount = 0
        if buffers.isShort { startTicking() }
    }

    /// Starts what the connection wants to be done next.
    private func settle(_ connection: Connection) {
        if let session = connection.sessionForKernel(kernelTLS) {
            leave(session, of: connection)
        }
        if connection.isDrained {
            connection.endsInOrder = Farewells.isFor(connection.socket)
            connection.breakOff(nil)
        }
        if connection.canBeCarried { carry(connection) }
        report(connection)
        if connection.phase == .closed {
            if !connection.isShutDown && !connection.isCarried {
                connection.isShutDown = true
                if !connection.endsInOrder {
                    shutdown(connection.socket, Int32(SHUT_RDWR))
                } else if connection.isReceiving {
                    cancelReceive(connection)
                }
            }
            if connection.isGone { remove(connection) }
            return
        }
        if connection.isWaiting { hasWaiting = true }
        connection.transmission?.isShared = engine.isShared
        if !connection.isSending, let message = connection.nextMessage() {
            connection.isSending = true
            let tag = Tag(.send, index: connection.index, generation: connection.generation)
            queue.send(connection.socket, message: message, tag: tag.rawValue)
        } else if connection.phase == .closed {
            return settle(connection)
        }
        if !connection.isReceiving, let space = connection.receiveSpace() {
            connection.isReceiving = true
            let tag = Tag(.receive, index: connection.index, generation: connection.generation)
            queue.receive(
                connection.socket, into: space.baseAddress!, length: space.count,
                tag: tag.rawValue)
        }
        if connection.phase != .transmission || shared.configuration.limits.idleTimeout != nil {
            startTicking()
        }
    }

    /// Leaves the connection's TLS to the kernel, if that can do it.
    private func leave(_ session: TLSSession, of connection: Connection) {
        let outcome = KernelTLS.install(session, on: connection.socket)
        switch outcome {
        case .done: connection.leaveTLSToKernel()
        case .broken(let reason): connection.breakOff(reason)
        case .unavailable(let reason):
            connection.staysWithTLS = true
            guard KernelTLS.isMissing(outcome) else {
                logger.debug("TLS stays with GnuTLS: \(reason)")
                return
            }
            kernelTLS = .off
            logger.info("TLS is done by GnuTLS: \(reason)")
        }
    }

    /// Says once who has come, and once what is wrong with it.
    private func report(_ connection: Connection) {
        if !connection.isAnnounced, let export = connection.exportName {
            connection.isAnnounced = true
            var metadata: Logger.Metadata = [
                "peer": "\(connection.peer)", "export": "\(export)",
            ]
            if shared.configuration.tls != nil {
                metadata["tls"] = "\(connection.tlsSummary ?? "none: plaintext")"
            }
            if connection.identity != .none { metadata["client"] = "\(connection.identity)" }
            logger.info("client connected", metadata: metadata)
        }
        guard !connection.hasWarned else { return }
        if let problem = connection.problem {
            warn(connection, problem)
        } else if let refusal = connection.transmission?.firstRefusal {
            warn(connection, "request refused: \(refusal)")
        }
    }

    private func warn(_ connection: Connection, _ text: String) {
        connection.hasWarned = true
        let metadata: Logger.Metadata = [
            "peer": "\(connection.peer)", "export": "\(connection.exportName ?? "none yet")",
        ]
        if connection.isAnnounced {
            logger.warning("\(text)", metadata: metadata)
        } else {
            warnOfStranger(text, metadata)
        }
    }

    /// Of somebody who has chosen no export, or cannot: not more than now and then.
    func warnOfStranger(_ text: String, _ metadata: Logger.Metadata) {
        let (isAllowed, missing) = shared.strangers.admit(at: monotonicNanoseconds())
        guard isAllowed else { return }
        if missing > 0 { logger.warning("\(missing) lines like the following were left out") }
        logger.warning("\(text)", metadata: metadata)
    }

    private func remove(_ connection: Connection) {
        logger.log(
            level: connection.isAnnounced ? .info : .debug, "client disconnected",
            metadata: [
                "peer": "\(connection.peer)", "export": "\(connection.exportName ?? "none")",
            ])
        // A carried one's stays open, so that nobody deletes it before the next server has it.
        if !connection.isCarried { connection.closeVolume() }
        connections[connection.index] = nil
        freeIndices.append(connection.index)
        connectionCount -= 1
        let (socket, session) = (connection.socket, connection.session!)
        if connection.isCarried {
            shared.admission.forget(session)
        } else if connection.endsInOrder,
            stopDeadline == nil || !Farewells.hasEverything(socket),
            shared.admission.leave(session)
        {
            farewells.begin(
                socket, session, deadline: tick + ticks(shared.configuration.limits.stallTimeout),
                usesKernelTLS: connection.usesKernelTLS)
            startTicking()
        } else {
            dismiss(socket, session)
        }
    }

    /// The server stops, or has no place: an accepted socket is not served here.
    func turnAway(_ arrival: Arrival) {
        guard mailbox.shouldCarry else { return dismiss(arrival.socket, arrival.session) }
        if let inherited = arrival.inherited {
            do throws(ServerError) {
                try leave(inherited.connection, inherited.takeInput())
            } catch {
                logger.warning("client lost: \(error)", metadata: ["peer": "\(arrival.peer)"])
                return dismiss(arrival.socket, arrival.session)
            }
        } else {
            shared.carried.withLock { $0.arrivals.append(arrival.socket) }
        }
        shared.admission.forget(arrival.session)
    }

    /// To the next server.
    private func leave(_ carried: CarriedConnection, _ input: [UInt8]) throws(ServerError) {
        try shared.carried.withLock { handOver throws(ServerError) in
            try handOver.append(carried, input: input)
        }
    }

    /// Closes an accepted socket.
    private func dismiss(_ socket: Int32, _ session: Admission.Session) {
        close(socket)
        shared.admission.forget(session)
        if session == firstSession { shared.configuration.listening.onConnectedEnd() }
    }

    func adopt(_ arrival: Arrival) {
        guard stopDeadline == nil, let index = freeIndices.popLast() else {
            turnAway(arrival)
            return
        }
        generation = (generation + 1) & 0xFF_FFFF
        let (admission, session) = (shared.admission, arrival.session)
        let exports = PoolExports(
            pool: shared.pool, settings: shared.exportSettings, isReadOnly: arrival.isReadOnly,
            refusal: { admission.enter(session, export: $0) })
        let connection = Connection(
            socket: arrival.socket, index: index, generation: generation,
            peer: arrival.peer.description, exports: exports, buffers: buffers, tick: tick,
            handshakeDeadline: tick + ticks(shared.configuration.limits.handshakeTimeout),
            tls: shared.configuration.tls, session: session)
        connections[index] = connection
        connectionCount += 1
        logger.debug("accepted", metadata: ["peer": "\(connection.peer)"])
        if let inherited = arrival.inherited {
            takeOver(inherited, connection)
        } else {
            connection.begin(engine)
        }
        mark(connection)
    }

    private func takeOver(_ inherited: InheritedClient, _ connection: Connection) {
        do throws(ServerError) {
            let input = try inherited.takeInput()
            connection.begin(with: inherited.connection, input: input, engine)
        } catch { connection.breakOff(error.description) }
    }

    /// It is in its handshake, or on its way out, and others came for whom there is no room.
    private func displace(_ session: Admission.Session) {
        farewells.displace(session)
        for index in 0..<capacity {
            guard let connection = connections[index], connection.session == session else {
                continue
            }
            if connection.phase == .handshake {
                end(connection, "there are too many connections, and this one was still greeting")
            }
            return
        }
    }

    // MARK: - Stopping

    private func beginToStop() {
        stopDeadline = tick + ticks(shared.configuration.limits.stopTimeout)
        startTicking()
        for index in doors.indices where doors[index].isOpen {
            if doors[index].isPausing || doors[index].listener.isInherited {
                closeDoor(index)
            } else if mailbox.shouldCarry {
                cancel(doors[index].listener.descriptor, Tag(.accept, index: index))
            } else {
                shutdown(doors[index].listener.descriptor, Int32(SHUT_RDWR))
            }
        }
        for index in 0..<capacity {
            guard let connection = connections[index] else { continue }
            if mailbox.shouldCarry { pause(connection) } else { connection.stop() }
            mark(connection)
        }
        farewells.watch(tick: tick, stopDeadline: stopDeadline)
    }

    // MARK: - Leaving connections to the next server

    private func pause(_ connection: Connection) {
        connection.pause()
        if connection.isReceiving { cancelReceive(connection) }
    }

    private func cancelReceive(_ connection: Connection) {
        cancel(
            connection.socket,
            Tag(.receive, index: connection.index, generation: connection.generation))
    }

    private func cancel(_ descriptor: Int32, _ tag: Tag) {
        queue.cancel(descriptor, target: tag.rawValue, tag: Tag(.cancel).rawValue)
    }

    private func carry(_ connection: Connection) {
        let (carried, input) = connection.carried()
        do throws(ServerError) {
            try leave(carried, input)
            connection.isCarried = true
            connection.breakOff(nil)
        } catch { connection.breakOff(error.description) }
    }
}

/// Whether to look for completions for a while before going to sleep: it has to have paid of late,
/// so that a reactor whose clients or device take longer than that sleeps at once.
private struct SpinCredit {
    private var credit = 0
    private static let limit = 8

    var isGood: Bool { credit > 0 }
    mutating func failed() { credit -= 1 }
    /// The reactor went to sleep and was woken again within the time that it would have looked.
    mutating func wouldHavePaid() { credit = min(credit + 2, Self.limit) }
}
