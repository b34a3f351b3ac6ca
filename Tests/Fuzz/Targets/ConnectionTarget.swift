// A connection from its handshake to its end: the server's own, with a client, sockets that take any
// number of bytes and a pool that answers in any order, all of which the input decides.
//
// 1. Every request that was received whole has exactly one answer, which fits it (ReplyStream), unless
//    the connection has ended before.
// 2. What is submitted is what was sent: range, flags, payload.
// 3. When the connection has gone, nothing is held any more: slots, buffers, the volume.

import Glibc
import NBDProtocol
import NBDServer
import ThinPool

public enum ConnectionTarget: FuzzTarget {
    public static let name = "connection"

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let session = FuzzedSession(&input)
        for _ in 0..<200 where !input.isAtEnd { session.act(&input) }
        session.end()
    }
}

private final class FuzzedSession: RequestSink {
    /// Of all sessions: no request of theirs reaches it.
    private static let pool: Pool = {
        do {
            let seed = SeedPool.shared
            let driver = try PoolDriver(
                metadata: seed.metadataDevice(), data: seed.dataDevice())
            return driver.pool
        } catch { fatalError("fuzz: the sound pool does not open: \(error)") }
    }()
    private static let contexts =
        ["base:allocation", "wafer:shared"]
        + ["origin", "one", "two", "three", "empty", "huge"].map { "wafer:changed-since:\($0)" }
    /// Payloads that are really sent are no longer than this; longer ones break off.
    private static let longestPayload = 300 << 10

    private let buffers = BufferPool(capacity: BufferPool.largest)
    private let connection: Connection
    private let format: WireFormat
    private let selected: [UInt32]
    private let rules: RequestRules

    // The wire
    private var toServer: [UInt8] = []
    private var received = 0
    private var toClient: [UInt8] = []
    private var receiving: UnsafeMutableRawBufferPointer?
    private var sending: UnsafePointer<msghdr>?
    private var isClosedByClient = false
    private var isClosedByServer = false

    private var replies: ReplyStream
    /// The client has seen that its GO was granted.
    private var isTransmitting = false
    private var nextCookie: UInt64 = 1
    /// The client keeps to the protocol, and the server has no reason to hang up.
    private var isWellBehaved = true
    /// No request after this one is looked at.
    private var hasDisconnected = false
    /// Cookies of the requests that are to be submitted, in the order in which they were sent.
    private var due: [UInt64] = []
    /// What the pool has, with the client's cookie where that is known.
    private var submitted: [(request: VolumeRequest, cookie: UInt64?)] = []

    init(_ input: inout FuzzInput) {
        let choice = input.byte()
        format = [.simple, .structured, .extended][Int(choice & 0x0F) % 3]
        let isReadOnly = choice & 0x10 != 0
        let name = choice & 0x20 != 0 ? "huge" : "origin"
        let count = format == .simple ? 0 : Int(input.byte()) % (Self.contexts.count + 1)
        selected = (0..<UInt32(count)).map { $0 + 1 }
        let size = FuzzedSession.pool.volumeSize(name)!
        rules = RequestRules(
            exportSize: size, isReadOnly: isReadOnly, format: format, hasContexts: count > 0,
            dataBlockSize: Self.pool.blockSize)
        replies = ReplyStream(format: format)
        connection = Connection(
            socket: -1, index: 0, generation: 0, peer: "a fuzzed client",
            exports: PoolExports(pool: Self.pool, settings: .init(), isReadOnly: isReadOnly),
            buffers: buffers, tick: 0, handshakeDeadline: .max)
        connection.begin(self)
        sendHandshake(name, Array(Self.contexts.prefix(count)))
    }

    // MARK: - The client

    private func sendHandshake(_ name: String, _ contexts: [String]) {
        toServer.appendWord(ClientFlag.fixedNewstyle | ClientFlag.noZeroes)
        switch format {
        case .simple: break
        case .structured: toServer.appendOption(OptionCode.structuredReply.rawValue, [])
        case .extended: toServer.appendOption(OptionCode.extendedHeaders.rawValue, [])
        }
        if !contexts.isEmpty {
            var data: [UInt8] = []
            data.appendString(name)
            data.appendWord(UInt32(contexts.count))
            for context in contexts { data.appendString(context) }
            toServer.appendOption(OptionCode.setMetaContext.rawValue, data)
        }
        var data: [UInt8] = []
        data.appendString(name)
        data.appendWord(UInt16(0))
        toServer.appendOption(OptionCode.go.rawValue, data)
    }

    func act(_ input: inout FuzzInput) {
        let action = input.byte()
        switch action & 0x0F {
        case 0...5: sendRequest(&input)
        case 6 where action >> 4 == 15:
            // What the stream means from here on nobody knows.
            isWellBehaved = false
            toServer += input.rest(Int(input.byte()))
        case 6, 7: turn { receive(1 + Int(input.byte())) }
        case 8: turn { receive(1 + Int(input.word(UInt16.self)) * 8) }
        case 9: turn { send(1 + Int(input.byte())) }
        case 10: turn { send(1 + Int(input.word(UInt16.self)) * 64) }
        case 11, 12: turn { finish(input.below(256), input.byte()) }
        case 13: turn { while !submitted.isEmpty { finish(0, input.byte()) } }
        case 14 where action >> 4 == 15:
            isWellBehaved = false
            isClosedByClient = true
        case 14 where action >> 4 == 14:
            isWellBehaved = false
            turn { connection.stop() }
        default: flow()
        }
    }

    private func sendRequest(_ input: inout FuzzInput) {
        // Behind a payload that was not sent whole, a request would be part of it.
        if isClosedByClient || !isWellBehaved { return }
        let what = input.byte()
        var command = UInt16([0, 0, 1, 1, 3, 4, 6, 7, 7, 5, 0, 1, 7, 2, 1, 0][Int(what & 15)])
        // Leaving is rare.
        if command == 2, what & 0xF0 != 0xF0 { command = what & 0x80 != 0 ? 9 : 3 }
        var flags: UInt16 = 0
        let extra = input.byte()
        if extra & 1 != 0 { flags |= CommandFlags.fua.rawValue }
        if extra & 2 != 0, command == 0 { flags |= CommandFlags.dontFragment.rawValue }
        if extra & 2 != 0, command == 6 { flags |= CommandFlags.noHole.rawValue }
        if extra & 4 != 0, command == 6 { flags |= CommandFlags.fastZero.rawValue }
        if extra & 2 != 0, command == 7 { flags |= CommandFlags.requestOne.rawValue }
        if format == .extended, command == 1 || command == 7 && extra & 4 != 0 {
            flags |= CommandFlags.payloadLength.rawValue
        }
        if extra >> 3 == 31 { flags = UInt16(input.byte()) }
        let isEmptyFlush = command == 3 && extra & 0x20 == 0
        let offset = isEmptyFlush ? 0 : self.offset(&input)
        var length = isEmptyFlush ? 0 : self.length(command, &input)
        var payload: [UInt8] = []
        let hasStatusPayload =
            command == 7 && format == .extended
            && flags & CommandFlags.payloadLength.rawValue != 0
        var statusLength = length
        var contexts = selected
        if hasStatusPayload {
            (payload, statusLength, contexts) = statusPayload(length, &input)
            length = UInt64(payload.count)
        }
        let header = RequestHeader(
            flags: CommandFlags(rawValue: flags), command: command, cookie: nextCookie,
            offset: offset, length: length)
        nextCookie += 1
        send(header, payload, statusLength, contexts)
    }

    private func offset(_ input: inout FuzzInput) -> UInt64 {
        let choice = input.byte()
        switch choice {
        case 0..<200: return UInt64(choice) * 65_536 / 4
        case 200..<240: return UInt64(choice - 200) * 512
        case 240..<250: return rules.exportSize - UInt64(choice - 240) * 512
        default: return input.word(UInt64.self)
        }
    }

    private func length(_ command: UInt16, _ input: inout FuzzInput) -> UInt64 {
        let choice = input.byte()
        switch choice {
        case 0..<120: return UInt64(choice) * 512
        case 120..<200: return UInt64(choice - 119) * 4096
        case 200..<216: return UInt64(choice - 199) << 20
        case 216..<232: return rules.exportSize - UInt64(choice - 216) * 4096
        case 232..<240: return UInt64(Limits.maximumPayload) + UInt64(choice) - 236
        default:
            let word = input.word(UInt64.self)
            return format == .extended ? word : word & 0xFFFF_FFFF
        }
    }

    private func statusPayload(
        _ length: UInt64, _ input: inout FuzzInput
    ) -> (bytes: [UInt8], length: UInt64, contexts: [UInt32]) {
        let length = input.byte() & 1 == 0 ? length : rules.exportSize
        var bytes: [UInt8] = []
        bytes.appendWord(length)
        let count = Int(input.byte()) % 24
        let contexts =
            count <= selected.count
            ? Array(selected.prefix(count)) : (0..<count).map { _ in UInt32(input.byte() % 12) }
        for context in contexts { bytes.appendWord(context) }
        let excess = input.byte()
        if excess > 240 { bytes.append(excess) }
        return (bytes, length, contexts.sorted())
    }

    /// Puts the request on the wire and remembers what is due for it.
    private func send(
        _ header: RequestHeader, _ status: [UInt8], _ statusLength: UInt64, _ contexts: [UInt32]
    ) {
        let isExtended = format == .extended
        toServer.appendWord(isExtended ? Magic.extendedRequest : Magic.request)
        toServer.appendWord(header.flags.rawValue)
        toServer.appendWord(header.command)
        toServer.appendWord(header.cookie.byteSwapped)
        toServer.appendWord(header.offset)
        var sent = header
        if isExtended {
            toServer.appendWord(header.length)
        } else {
            sent.length = header.length & 0xFFFF_FFFF
            toServer.appendWord(UInt32(truncatingIfNeeded: header.length))
        }
        let command = Command(rawValue: header.command)
        var verdict = rules.verdict(sent)
        let payload = sent.payloadLength(extended: isExtended)
        if isExtended, payload > UInt64(Limits.maximumPayload) { isWellBehaved = false }
        if !status.isEmpty {
            toServer += status
            if case .perform(.blockStatus) = verdict {
                verdict = judge(status, statusLength, header.offset)
            }
        } else if payload <= UInt64(Self.longestPayload) {
            let pattern = UInt8(truncatingIfNeeded: header.cookie)
            toServer += [UInt8](repeating: pattern, count: Int(payload))
        } else if command != .disconnect {
            // The client leaves in the middle of it.
            isWellBehaved = false
            isClosedByClient = true
        }
        if command == .disconnect { hasDisconnected = true }
        guard !hasDisconnected else {
            isClosedByClient = true
            return
        }
        replies.requests[sent.cookie] = SentRequest(
            header: sent, command: command, verdict: verdict, end: toServer.count,
            statusLength: status.isEmpty ? sent.length : statusLength, contexts: contexts)
        if case .perform(let command) = verdict,
            command == .flush || command == .blockStatus || sent.length > 0
        {
            due.append(sent.cookie)
        }
    }

    private func judge(_ status: [UInt8], _ length: UInt64, _ offset: UInt64) -> Verdict {
        let known = selected.map { MetaContext(id: $0, name: "") }
        let isSound =
            status.count <= StatusPayload.maximumSize
            && status.withUnsafeBytes { StatusPayload($0, selected: known) } != nil
        guard isSound else { return .refuse(.damagedStatusPayload) }
        if let refusal = rules.statusRefusal(offset: offset, length: length) {
            return .refuse(refusal)
        }
        return .perform(.blockStatus)
    }

    // MARK: - The sockets

    private func turn(_ body: () -> Void) {
        body()
        while let owner = buffers.nextServed {
            connection.resume(self)
            if buffers.nextServed == owner { break }
        }
        if connection.isWaiting { connection.resume(self) }
        settle()
    }

    private func settle() {
        if connection.isDrained { connection.breakOff(nil) }
        if connection.phase == .closed {
            isClosedByServer = true
            return
        }
        if sending == nil, let message = connection.nextMessage() {
            sending = message
            connection.isSending = true
        }
        if receiving == nil, let space = connection.receiveSpace() {
            require(space.count > 0, "no space to receive into looks like the stream's end")
            receiving = space
            connection.isReceiving = true
        }
    }

    private func receive(_ limit: Int) {
        guard let space = receiving else { return }
        let count = min(limit, toServer.count - received, space.count)
        // Nothing has come, and nothing tells that nothing will.
        if count == 0 && !isClosedByClient && !isClosedByServer { return }
        receiving = nil
        connection.isReceiving = false
        toServer.withUnsafeBytes {
            space.copyMemory(from: .init(rebasing: $0[received..<received + count]))
        }
        received += count
        connection.received(Int32(count), self)
    }

    private func send(_ limit: Int) {
        guard let message = sending else { return }
        sending = nil
        connection.isSending = false
        if isClosedByServer { return connection.sent(-EPIPE, self) }
        var left = limit
        for index in 0..<Int(message.pointee.msg_iovlen) where left > 0 {
            let vector = message.pointee.msg_iov[index]
            let count = min(left, vector.iov_len)
            toClient += UnsafeRawBufferPointer(start: vector.iov_base, count: count)
            left -= count
        }
        connection.sent(Int32(limit - left), self)
        readReplies()
    }

    private func readReplies() {
        if !isTransmitting { skipHandshake() }
        guard isTransmitting else { return }
        if isWellBehaved { replies.append(toClient[...], received: received) }
        toClient = []
    }

    /// Up to and with the acknowledgement of GO.
    private func skipHandshake() {
        var place = 18
        while toClient.count >= place + 20 {
            func word(_ offset: Int) -> UInt32 {
                (0..<4).reduce(0) { $0 << 8 | UInt32(toClient[place + offset + $1]) }
            }
            let next = place + 20 + Int(word(16))
            guard toClient.count >= next else { return }
            require(word(12) >> 31 == 0, "a sound option is refused")
            if word(8) == OptionCode.go.rawValue && word(12) == OptionReplyType.ack.rawValue {
                toClient.removeFirst(next)
                isTransmitting = true
                return
            }
            place = next
        }
    }

    /// All that can move does, once.
    private func flow() {
        turn { receive(.max) }
        turn { send(.max >> 1) }
    }

    // MARK: - The pool

    func submit(_ request: VolumeRequest) {
        require(Transmission.place(of: request.cookie).owner == 0, "somebody else's cookie")
        require(
            !submitted.contains { $0.request.cookie == request.cookie }, "two requests in a slot")
        require(
            request.offset <= rules.exportSize
                && request.length <= rules.exportSize - request.offset
                && (request.offset | request.length) % 512 == 0,
            "\(request.operation) \(request.offset) \(request.length) is submitted")
        guard isWellBehaved else {
            submitted.append((request, nil))
            return
        }
        require(!due.isEmpty, "a request that nobody sent is submitted")
        let cookie = due.removeFirst()
        compare(request, replies.requests[cookie]!)
        submitted.append((request, cookie))
    }

    private func compare(_ request: VolumeRequest, _ sent: SentRequest) {
        let length = sent.command == .blockStatus ? sent.statusLength : sent.header.length
        require(
            request.operation == sent.command?.operation && request.offset == sent.header.offset
                && request.length == length
                && request.fua == sent.header.flags.contains(.fua)
                && request.noHole == sent.header.flags.contains(.noHole),
            "\(sent.header) is submitted as \(request.operation) \(request.offset) "
                + "\(request.length)")
        require(sent.end <= received, "a request is submitted before all of it was received")
        if request.operation == .write {
            let buffer = request.buffer!
            require(
                buffer.load(as: UInt8.self) == sent.pattern
                    && memcmp(buffer, buffer + 1, Int(request.length) - 1) == 0,
                "a payload is not what was sent")
        }
    }

    /// Answers a request that was submitted, as the pool could.
    private func finish(_ choice: Int, _ how: UInt8) {
        guard !submitted.isEmpty else { return }
        let (request, cookie) = submitted.remove(at: choice % submitted.count)
        let code: Int32 = how < 200 ? 0 : [EIO, ENOSPC, EPERM, ENOMEM, EINVAL][Int(how) % 5]
        if code == 0 { fill(request, UInt8(truncatingIfNeeded: cookie ?? 0), how) }
        if let cookie { replies.requests[cookie]!.code = code }
        _ = connection.finish(slot: Transmission.place(of: request.cookie).slot, code: code)
    }

    private func fill(_ request: VolumeRequest, _ pattern: UInt8, _ how: UInt8) {
        if request.operation == .read {
            memset(request.buffer!, Int32(pattern), Int(request.length))
            guard let holes = request.holes, how & 1 == 1 else { return }
            // Every other piece is a hole.
            let piece = max(512, request.length / UInt64(2 + how % 40) & ~511)
            var at = how & 2 == 0 ? request.offset : request.offset + piece
            let end = request.offset + request.length
            while at < end {
                if !holes.pointee.append(at, min(end, at + piece)) { break }
                at += 2 * piece
            }
        } else if request.operation == .extents {
            let query = request.query!
            let range = request.offset..<request.offset + request.length
            query.begin(range, blockSize: 65_536, steps: 1)
            while query.current != nil {
                for (index, block) in query.blocks.prefix(9000).enumerated() {
                    query.add(to: block + 1, UInt32(how & 1 == 0 ? index & 1 : 0))
                }
                query.stepDone(steps: 1)
            }
        }
    }

    // MARK: - The end

    /// Everything that was sent arrives and is answered; then the client leaves.
    func end() {
        settle()
        for round in 0..<2000 {
            flow()
            turn { while !submitted.isEmpty { finish(0, UInt8(round & 1)) } }
            if connection.phase == .closed && receiving == nil && sending == nil { break }
            let isDone =
                received == toServer.count && submitted.isEmpty && sending == nil
                && connection.nextMessage() == nil
            if isDone && !isClosedByClient {
                if isWellBehaved { verifyAnswers() }
                isClosedByClient = true
            }
        }
        require(connection.isGone, "a connection whose client has left does not end")
        connection.closeVolume()
        require(buffers.inUse == 0, "\(buffers.inUse) bytes of payloads are not given back")
        if isWellBehaved { verifyAnswers() }
    }

    private func verifyAnswers() {
        require(isTransmitting, "a sound handshake leads nowhere")
        for request in replies.requests.values {
            require(request.isAnswered, "request \(request.header) has no answer")
        }
        require(replies.isAtBoundary, "there is more than answers")
    }
}

extension Command {
    fileprivate var operation: VolumeOperation? {
        switch self {
        case .read: .read
        case .write: .write
        case .flush: .flush
        case .trim: .trim
        case .cache: .cache
        case .writeZeroes: .writeZeroes
        case .blockStatus: .extents
        case .disconnect: nil
        }
    }
}
