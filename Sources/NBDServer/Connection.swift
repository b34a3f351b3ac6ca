// One client: handshake, transmission, the way out. No system calls: the reactor asks where bytes
// are to go and what is to be sent, and says what became of it.
//
//   handshake ──GO──▶ transmission ──DISC, end of stream, stop──▶ draining ──▶ closed
//       └────────────────────┴── error, violation, deadline ─────────────────────▲
//
// draining: no more requests; those in flight are finished and their replies sent.
// closed: the socket is shut down; what the kernel and the engine still hold is waited for.
//
// With TLS the reactor moves ciphertext, and a session stands between it and all of this: what is
// received is decrypted as far as there is room for it, messages are encrypted before they are
// sent. When the kernel does the encrypting, the session is gone and only the goodbye is special.

import BlockIO
import Glibc
import NBDProtocol
import ThinPool

package final class Connection {
    package enum Phase { case handshake, transmission, draining, closed }

    let socket: Int32
    let index: Int
    let generation: UInt32
    /// Who it is, for the log.
    let peer: String

    package private(set) var phase = Phase.handshake
    private let buffers: BufferPool

    // The reactor's bookkeeping.
    package var isReceiving = false
    package var isSending = false
    /// In the reactor's list of connections to look after at the end of the turn.
    var isMarked = false
    var isShutDown = false
    /// Its socket is closed when the client has ended its stream, too.
    var endsInOrder = false
    var isAnnounced = false
    /// The kernel does not want this connection's TLS.
    var staysWithTLS = false
    var hasWarned = false
    /// Bytes received and sent.
    private(set) var moved: UInt64 = 0
    /// While it keeps others waiting.
    var progress: Movement
    /// While nothing of it is under way.
    var activity: Movement
    /// The reactor's tick by which the handshake has to end; what it waits for its export is added.
    var handshakeDeadline: UInt64
    /// What it counts as, where connections are counted.
    let session: Admission.Session?

    // Handshake
    private var exports: PoolExports
    private var handshake: Handshake
    private let greeting = GreetingBuffer()

    // TLS, once the client has asked for it
    private let credentials: TLSCredentials?
    private var tls: TLSSession?
    /// The client has been told to begin with TLS.
    private var startsTLS = false
    /// What the end of the stream is announced with; nil: it is not the kernel that encrypts.
    private var kernelGoodbye: KernelTLS.Goodbye?
    private var hasSaidGoodbye = false
    /// Version, algorithms and who the client is; nil: there is no TLS.
    private(set) var tlsSummary: String?
    private(set) var identity = TLSIdentity.none

    package private(set) var transmission: Transmission?
    /// Received by another server, and not taken yet.
    private var carriedInput: ArraySlice<UInt8> = []
    private var isPaused = false
    /// Its socket is another server's now.
    var isCarried = false
    /// The export's name, once there is one.
    private(set) var exportName: String?
    /// The export that it has chosen is busy; `resume` asks again.
    package private(set) var isWaiting = false
    /// Nobody else opens the volume until the requests have ended that are still under way.
    private var hasFence = false
    /// What went wrong, in words, if anything did.
    private(set) var problem: String?

    package convenience init(
        socket: Int32, index: Int, generation: UInt32, peer: String, exports: PoolExports,
        buffers: BufferPool, tls: TLSConfiguration? = nil, tick: UInt64,
        handshakeDeadline: UInt64
    ) {
        self.init(
            socket: socket, index: index, generation: generation, peer: peer, exports: exports,
            buffers: buffers, tick: tick, handshakeDeadline: handshakeDeadline, tls: tls,
            session: nil)
    }

    init(
        socket: Int32, index: Int, generation: UInt32, peer: String, exports: PoolExports,
        buffers: BufferPool, tick: UInt64, handshakeDeadline: UInt64, tls: TLSConfiguration?,
        session: Admission.Session?
    ) {
        self.socket = socket
        self.index = index
        self.generation = generation
        self.peer = peer
        self.exports = exports
        self.buffers = buffers
        self.session = session
        credentials = tls?.credentials
        handshake = Handshake(tls: tls?.policy ?? .off)
        progress = Movement(at: tick)
        activity = Movement(at: tick)
        self.handshakeDeadline = handshakeDeadline
    }

    /// The volume that the connection holds open until `closeVolume`.
    package var volume: Volume? { exports.opened }

    /// Gives up the volume.
    /// - Precondition: `isGone`.
    package func closeVolume() { exports.close() }

    // MARK: - Events

    /// The socket is there: the server speaks first.
    package func begin(_ sink: some RequestSink) {
        advanceHandshake(sink)
    }

    /// `result` bytes were received where `receiveSpace` said; 0: the stream has ended; negative:
    /// -errno.
    package func received(_ result: Int32, _ sink: some RequestSink) {
        moved += UInt64(max(result, 0))
        if phase == .closed || result < 0 {
            transmission?.received(0, sink)
            if result < 0 {
                let what = tls?.isEstablished == false ? "TLS handshake" : "receiving"
                breakOff("\(what) failed: \(SystemError.words(-result))")
            }
            return
        }
        if let tls {
            tls.received(Int(result))
            decrypt(tls, sink)
        } else {
            receivedPlaintext(Int(result), sink)
        }
    }

    private func receivedPlaintext(_ count: Int, _ sink: some RequestSink) {
        switch phase {
        case .handshake:
            if count == 0 {
                breakOff(
                    handshake.isAtBoundary ? nil : "the client left in the middle of a message")
            } else {
                greeting.received(count)
                if !greeting.isSending && !isPaused { advanceHandshake(sink) }
            }
        case .transmission:
            if count == 0 {
                // First, so that the payload's buffer is no longer the kernel's.
                transmission!.received(0, sink)
                let isClean = transmission!.endReading()
                drain(isClean ? nil : "the client left in the middle of a request")
            } else {
                transmission!.received(count, sink)
                lookAtTransmission()
            }
        case .draining:
            transmission?.received(count, sink)
        case .closed:
            break
        }
    }

    /// Nothing more will come, because of `problem`; nil: that is how the stream ends.
    func receivingEnded(_ problem: String?, _ sink: some RequestSink) {
        guard let problem else { return received(0, sink) }
        transmission?.received(0, sink)
        breakOff(problem)
    }

    /// `result` bytes of `nextMessage` were sent; negative: -errno.
    package func sent(_ result: Int32, _ sink: some RequestSink) {
        moved += UInt64(max(result, 0))
        if phase == .closed || result <= 0 {
            transmission?.sent(0)
            // A client may leave without reading what it asked for last.
            let isFarewell = phase == .draining || phase == .handshake
            breakOff(isFarewell ? nil : "sending failed: \(SystemError.words(-result))")
            return
        }
        if hasSaidGoodbye { return }
        guard let tls else { return sentPlaintext(Int(result), sink) }
        let count = tls.sent(Int(result))
        if count > 0 { sentPlaintext(count, sink) }
        decrypt(tls, sink)
    }

    private func sentPlaintext(_ count: Int, _ sink: some RequestSink) {
        if greeting.isSending { return greetingSent(count, sink) }
        transmission!.sent(count)
        if phase == .transmission { resumeTransmission(sink) }
    }

    private func resumeTransmission(_ sink: some RequestSink) {
        transmission!.resume(sink)
        lookAtTransmission()
        if !carriedInput.isEmpty { takeCarriedInput(sink) }
    }

    /// What the connection waited for, memory or its export, may be there.
    package func resume(_ sink: some RequestSink) {
        if phase == .handshake && isWaiting && !isPaused {
            advanceHandshake(sink)
        } else if phase == .transmission {
            resumeTransmission(sink)
        }
        if let tls { decrypt(tls, sink) }
    }

    /// - Returns: true if others may open the volume now who had to wait.
    package func finish(slot: Int, code: Int32) -> Bool {
        transmission!.finish(slot, code: code)
        guard hasFence, transmission!.inFlight == 0 else { return false }
        hasFence = false
        exports.pool.removeFence(of: volume!)
        return true
    }

    // MARK: - To another server and from another

    /// The server gives its place to another: what was begun is answered, and if the client can be
    /// carried over, nothing more is taken from it.
    package func pause() {
        guard phase == .handshake || phase == .transmission else { return }
        // The keys of TLS are in this process's memory.
        if tls != nil || startsTLS { return stop() }
        transmission?.pause()
        isPaused = true
    }

    /// What was to be received is left in the socket.
    package func receivingCancelled(_ sink: some RequestSink) {
        transmission?.received(0, sink)
    }

    /// Nothing is under way any more, an answer to an option included.
    package var canBeCarried: Bool {
        guard isPaused, !isReceiving, !isSending, !greeting.isSending else { return false }
        switch phase {
        case .handshake: return true
        case .transmission: return transmission!.inFlight == 0 && !transmission!.hasReplies
        case .draining, .closed: return false
        }
    }

    /// The connection as another server can go on with it, and what was received and not acted on.
    /// - Precondition: `canBeCarried`.
    package func carried() -> (connection: CarriedConnection, input: [UInt8]) {
        let stage: CarriedConnection.Stage
        var input: [UInt8]
        if let transmission {
            stage = .transmission(
                exportName: exportName!, format: transmission.format,
                contexts: exports.contexts.selected, refused: transmission.refused)
            input = transmission.carriedInput()
            input += carriedInput
        } else {
            stage = .handshake(handshake)
            input = Array(greeting.input)
        }
        let connection = CarriedConnection(
            socket: socket, stage: stage, tls: usesKernelTLS ? tlsSummary : nil)
        return (connection, input)
    }

    /// The socket comes from another server.
    package func begin(
        with carried: CarriedConnection, input: [UInt8], _ sink: some RequestSink
    ) {
        if let summary = carried.tls {
            tlsSummary = summary
            kernelGoodbye = KernelTLS.Goodbye()
        }
        switch carried.stage {
        case .handshake(let handshake):
            self.handshake = handshake
            greeting.receive(input)
            advanceHandshake(sink)
        case .transmission(let name, let format, let contexts, let refused):
            let opening = exports.open(
                name, contexts: contexts, secure: carried.tls != nil, waitsForFence: false)
            guard case .opened(let export) = opening else {
                return breakOff("export \(name) cannot be opened again")
            }
            isAnnounced = true
            carriedInput = input[...]
            enterTransmission(
                Agreement(export: export, format: format, contexts: contexts), sink)
            if let refused { transmission!.takeOver(refused) }
            takeCarriedInput(sink)
        }
    }

    /// Takes what the other server had received, as far as there is room; it comes before what is in
    /// the socket.
    private func takeCarriedInput(_ sink: some RequestSink) {
        while phase == .transmission, !carriedInput.isEmpty,
            let space = transmission!.receiveSpace()
        {
            let count = min(space.count, carriedInput.count)
            space.copyBytes(from: carriedInput.prefix(count))
            carriedInput = carriedInput.dropFirst(count)
            transmission!.received(count, sink)
            lookAtTransmission()
        }
        // An empty slice would keep all of it.
        if carriedInput.isEmpty { carriedInput = [] }
    }

    /// The server stops: requests in flight are still answered.
    package func stop() {
        switch phase {
        case .handshake: breakOff(nil)
        case .transmission:
            transmission!.endReading()
            drain(nil)
        case .draining, .closed: break
        }
    }

    /// Ends the connection without regard to what is in flight.
    package func breakOff(_ problem: String?) {
        if self.problem == nil && phase != .closed { self.problem = problem }
        fence()
        phase = .closed
        transmission?.breakOff(isSending: isSending)
    }

    // MARK: - What the reactor does next

    /// Where received bytes go; nil: nothing is to be received now.
    package func receiveSpace() -> UnsafeMutableRawBufferPointer? {
        guard let tls else { return plaintextSpace() }
        let isWanted =
            switch phase {
            case .handshake: !tls.isEstablished || !greeting.isSending && !isWaiting
            case .transmission: transmission!.wantsInput
            case .draining, .closed: false
            }
        return isWanted ? tls.receiveSpace() : nil
    }

    private func plaintextSpace() -> UnsafeMutableRawBufferPointer? {
        switch phase {
        case .handshake:
            // One option at a time: the next is read when the answer has gone.
            guard !greeting.isSending && !isWaiting && !isPaused else { return nil }
            return greeting.space
        case .transmission:
            return carriedInput.isEmpty ? transmission!.receiveSpace() : nil
        case .draining, .closed:
            return nil
        }
    }

    /// What is sent next, or nil: nothing, or the connection has just been broken off.
    package func nextMessage() -> UnsafePointer<msghdr>? {
        guard phase != .closed else { return nil }
        if let tls { return nextCiphertext(tls) }
        if let message = nextPlaintext() { return message }
        guard let kernelGoodbye, isAnswered, !hasSaidGoodbye else { return nil }
        hasSaidGoodbye = true
        return UnsafePointer(kernelGoodbye.message)
    }

    private func nextCiphertext(_ tls: TLSSession) -> UnsafePointer<msghdr>? {
        if tls.isEstablished && tls.isFlushed {
            if let message = nextPlaintext() {
                if case .failed(let reason) = tls.seal(message) {
                    breakOff(tls.wasCutOff ? nil : "TLS: \(reason)")
                    return nil
                }
            } else if isAnswered && !tls.hasSaidGoodbye {
                tls.sayGoodbye()
            }
        }
        return tls.nextMessage()
    }

    private func nextPlaintext() -> UnsafePointer<msghdr>? {
        greeting.nextMessage ?? transmission?.nextMessage()
    }

    /// Everything was answered and sent: the socket can be shut down.
    package var isDrained: Bool {
        guard isAnswered else { return false }
        if let tls { return tls.isFlushed && (tls.hasSaidGoodbye || !tls.isEstablished) }
        return kernelGoodbye == nil || hasSaidGoodbye && !isSending
    }

    private var isAnswered: Bool {
        guard phase == .draining, !greeting.isSending else { return false }
        guard let transmission else { return true }
        return transmission.inFlight == 0 && !transmission.hasReplies
    }

    /// Nobody holds anything of this connection any more.
    package var isGone: Bool {
        phase == .closed && !isReceiving && !isSending && (transmission?.occupied ?? 0) == 0
    }

    var hasRequestsInFlight: Bool { (transmission?.inFlight ?? 0) > 0 }

    /// Memory is held, and the client alone keeps it from being freed.
    var isHoardingMemory: Bool {
        guard let transmission, phase != .closed else { return false }
        return transmission.holdsPayload && transmission.inFlight == 0
            && (transmission.isInsideWrite || transmission.hasReplies)
    }

    // MARK: - Inside

    /// From now on no reply may reach the client that it can rely on.
    private func fence() {
        guard phase == .transmission, transmission!.inFlight > 0 else { return }
        hasFence = true
        volume!.addFence()
    }

    private func drain(_ problem: String?) {
        if self.problem == nil { self.problem = problem }
        fence()
        phase = .draining
    }

    private func lookAtTransmission() {
        let transmission = transmission!
        guard phase == .transmission, !transmission.isReading else { return }
        if transmission.didDisconnect {
            drain(nil)
        } else {
            breakOff(transmission.violation)
        }
    }

    /// Lets the handshake take what has been received, until it wants more or has to speak.
    private func advanceHandshake(_ sink: some RequestSink) {
        isWaiting = false
        var output: [UInt8] = []
        let (consumed, outcome) = handshake.advance(
            greeting.input, output: &output, exports: &exports)
        greeting.take(consumed)
        if !output.isEmpty { greeting.send(output) }
        switch outcome {
        case .receive, .send: break
        case .wait: isWaiting = true
        case .transmit(let agreement): enterTransmission(agreement, sink)
        case .startTLS:
            if !greeting.input.isEmpty {
                breakOff("the client sent something in plaintext behind STARTTLS")
            } else {
                startsTLS = true
            }
        case .close(.aborted): drain(nil)
        case .close(.violation(let text)): breakOff(text)
        }
    }

    // MARK: - TLS

    /// Gives the protocol what was received, as far as it has room for it.
    private func decrypt(_ tls: TLSSession, _ sink: some RequestSink) {
        if !tls.isEstablished {
            guard phase == .handshake else { return }
            switch tls.handshake() {
            case .again: return
            case .failed(let reason): return drain("TLS handshake failed: \(reason)")
            case .done: tlsEstablished(tls)
            }
        }
        while let space = plaintextSpace() {
            switch tls.read(into: space) {
            case .bytes(let count):
                receivedPlaintext(count, sink)
            case .again:
                transmission?.received(0, sink)  // the space is not used
                return
            case .end:
                receivedPlaintext(0, sink)
            case .failed(let reason):
                transmission?.received(0, sink)
                breakOff("TLS: \(reason)")
            }
        }
    }

    private func tlsEstablished(_ tls: TLSSession) {
        handshake.tlsEstablished()
        identity = tls.identity
        tlsSummary = tls.summary
    }

    /// The session, if the kernel may go on with it now.
    func sessionForKernel(_ use: KernelTLSUse) -> TLSSession? {
        guard let tls, !staysWithTLS, !isSending, !isReceiving,
            phase == .handshake || phase == .transmission,
            tls.isQuiet, KernelTLS.mayTakeOver(tls, use)
        else { return nil }
        return tls
    }

    /// From now on the kernel encrypts and decrypts.
    func leaveTLSToKernel() {
        tls = nil
        kernelGoodbye = KernelTLS.Goodbye()
        tlsSummary! += ", by the kernel"
    }

    var usesKernelTLS: Bool { kernelGoodbye != nil }

    private func greetingSent(_ count: Int, _ sink: some RequestSink) {
        guard greeting.sent(count), phase == .handshake else { return }
        if startsTLS {
            startsTLS = false
            do throws(ServerError) { tls = try TLSSession(credentials!) } catch {
                breakOff("TLS handshake failed: \(error.reason)")
            }
        } else if !isPaused {
            advanceHandshake(sink)
        }
    }

    private func enterTransmission(_ agreement: Agreement, _ sink: some RequestSink) {
        exportName = agreement.export.name
        let transmission = Transmission(
            volume: exports.opened!, agreement: agreement, contexts: exports.contexts,
            dataBlockSize: exports.pool.blockSize, buffers: buffers, owner: index)
        self.transmission = transmission
        phase = .transmission
        transmission.received(greeting.input, sink)
        greeting.takeAll()
        lookAtTransmission()
    }
}
