// An NBD client: the kernel's, as far as the server can tell. It has one volume, sends any number of
// requests without waiting, and when its connection breaks it makes a new one and sends again what
// was not answered. Now and then it sends what has to be refused, or no request at all.

import NBDProtocol

/// A request as its client knows it.
struct SentRequest {
    var command: Command
    var sectors: Range<Int>
    /// The sectors that it changes: of a trim, those of whole blocks.
    var changed: Range<Int>
    var value: UInt64
    var flags: CommandFlags
    var begun: UInt64
    /// It has to be refused.
    var wrong: WrongRequest?
}

/// A request that the server must not carry out, as it is sent.
struct WrongRequest {
    var type: UInt16
    var flags: UInt16 = 0
    var offset: UInt64
    var length: UInt32
    /// Whether so much payload follows.
    var hasPayload = false
    /// The reply's error.
    var error: WireError

    /// All that there are for an export of `size` bytes.
    static func all(size: UInt64) -> [WrongRequest] {
        let write = Command.write.rawValue
        return [
            .init(type: write, offset: size - 512, length: 4096, hasPayload: true, error: .noSpace),
            .init(
                type: write, offset: size - 512, length: 150_000, hasPayload: true,
                error: .noSpace),
            .init(type: write, offset: 1, length: 100, hasPayload: true, error: .invalid),
            .init(
                type: write, flags: 1 << 9, offset: 0, length: 512, hasPayload: true,
                error: .invalid),
            .init(type: write, offset: 0, length: 0, error: .none),
            .init(type: Command.read.rawValue, offset: size, length: 512, error: .invalid),
            .init(
                type: Command.read.rawValue, offset: 0, length: Limits.maximumPayload + 512,
                error: .invalid),
            .init(type: Command.trim.rawValue, offset: 0, length: 511, error: .invalid),
            .init(
                type: Command.writeZeroes.rawValue, offset: size, length: 512, error: .noSpace),
            .init(type: Command.flush.rawValue, offset: 0, length: 512, error: .invalid),
            .init(type: 77, offset: 0, length: 0, error: .invalid),
        ]
    }
}

/// What came back for it.
struct ClientReply {
    var request: SentRequest
    var error: UInt32
    /// A READ's bytes.
    var payload: ArraySlice<UInt8>
}

final class SimulatedClient {
    enum State {
        case negotiating
        case ready
        /// The server refused the export, or has hung up.
        case refused
    }

    let model: VolumeModel
    private(set) var wire = Wire()
    private(set) var state = State.negotiating
    private var input: [UInt8] = []
    private var hasGreeting = false
    private var nextCookie: UInt64 = 1
    /// By cookie, which says the order of sending.
    private(set) var unanswered: [UInt64: SentRequest] = [:]
    /// What it had sent on connections that broke. When the server has let it in again, none of that
    /// is still under way.
    var former: [SentRequest] = []
    /// How often it is still passed over when it could read.
    var patience = 0
    /// It has said that it leaves.
    private(set) var isLeaving = false
    /// It can send requests that will be answered.
    var isReady: Bool { state == .ready && !isLeaving && !hasOffended }
    /// It has sent what is no request: the server hangs up.
    private(set) var hasOffended = false

    private static let greetingSize = 18
    private static let optionReplySize = 20

    /// How it talks.
    private let format: WireFormat
    private var reader: ReplyReader
    /// Answers to options that are still to come before the one to GO.
    private var acknowledgements = 0

    init(model: VolumeModel, format: WireFormat = .simple) {
        self.model = model
        self.format = format
        reader = ReplyReader(format: format)
        greet()
    }

    /// A new connection after the last one broke; the requests that have to be sent again.
    func reconnect() -> [SentRequest] {
        let open = unanswered.sorted { $0.key < $1.key }.map(\.value)
        former += open
        unanswered = [:]
        wire = Wire()
        input = []
        hasGreeting = false
        hasOffended = false
        state = .negotiating
        reader = ReplyReader(format: format)
        greet()
        return open
    }

    private func greet() {
        wire.toServer.append(big: ClientFlag.fixedNewstyle | ClientFlag.noZeroes)
        acknowledgements = format == .simple ? 0 : 1
        if format != .simple {
            let option = format == .structured ? OptionCode.structuredReply : .extendedHeaders
            wire.toServer.append(option: option)
        }
        let name = Array(model.name.utf8)
        var query: [UInt8] = []
        query.append(big: UInt32(name.count))
        query += name
        query.append(big: UInt16(0))
        wire.toServer.append(option: .go, query)
    }

    func send(_ request: SentRequest) {
        let cookie = nextCookie
        nextCookie += 1
        unanswered[cookie] = request
        if let wrong = request.wrong {
            appendHeader(
                flags: wrong.flags, type: wrong.type, cookie: cookie, wrong.offset,
                UInt64(wrong.length))
            if wrong.hasPayload {
                wire.toServer += [UInt8](repeating: 0x77, count: Int(wrong.length))
            }
            return
        }
        appendHeader(
            flags: request.flags.rawValue, type: request.command.rawValue, cookie: cookie,
            UInt64(request.sectors.lowerBound) * 512, UInt64(request.sectors.count) * 512)
        guard request.command == .write else { return }
        let words = request.sectors.count * 64
        wire.toServer.reserveCapacity(wire.toServer.count + words * 8)
        withUnsafeBytes(of: request.value) { value in
            for _ in 0..<words { wire.toServer.append(contentsOf: value) }
        }
    }

    private func appendHeader(
        flags: UInt16, type: UInt16, cookie: UInt64, _ offset: UInt64, _ length: UInt64
    ) {
        wire.toServer.append(
            big: format == .extended ? Magic.extendedRequest : Magic.request)
        wire.toServer.append(big: flags)
        wire.toServer.append(big: type)
        wire.toServer.append(big: cookie)
        wire.toServer.append(big: offset)
        if format == .extended {
            wire.toServer.append(big: length)
        } else {
            wire.toServer.append(big: UInt32(length))
        }
    }

    /// Says that it leaves; it still takes the answers to what it has sent.
    func leave() {
        isLeaving = true
        appendHeader(flags: 0, type: Command.disconnect.rawValue, cookie: 0, 0, 0)
    }

    /// Sends what does not begin as a request does.
    func offend() {
        hasOffended = true
        wire.toServer += [UInt8](repeating: 0x55, count: RequestHeader.extendedSize)
    }

    var canReceive: Bool { !wire.toClient.isEmpty }

    /// Takes what has arrived.
    func receive() throws -> [ClientReply] {
        input += wire.toClient
        wire.toClient = []
        var place = 0
        if state == .negotiating { place = try negotiate() }
        var replies: [ClientReply] = []
        while state == .ready,
            let (taken, whole) = try reader.take(input[place...], { unanswered[$0] })
        {
            place += taken
            guard let whole else { continue }
            let request = unanswered.removeValue(forKey: whole.cookie)!
            replies.append(
                ClientReply(request: request, error: whole.error, payload: whole.payload[...]))
        }
        input.removeFirst(place)
        return replies
    }

    private func negotiate() throws -> Int {
        var place = 0
        if !hasGreeting {
            guard input.count >= Self.greetingSize else { return 0 }
            guard input[0...].big(0, as: UInt64.self) == Magic.greeting else {
                throw WorldFailure(description: "the server does not greet")
            }
            hasGreeting = true
            place = Self.greetingSize
        }
        while state == .negotiating, input.count - place >= Self.optionReplySize {
            let reply = input[place...]
            let type = OptionReplyType(rawValue: reply.big(12, as: UInt32.self))
            let length = Int(reply.big(16, as: UInt32.self))
            guard input.count - place >= Self.optionReplySize + length else { break }
            place += Self.optionReplySize + length
            if type == .ack, acknowledgements > 0 {
                acknowledgements -= 1
            } else if type == .ack {
                state = .ready
            } else if type != .info {
                state = .refused
            }
        }
        return place
    }

    /// The server has closed the connection. What it must not do is leave something unanswered.
    func checkHangUp() throws {
        if hasOffended || state == .refused { return }
        guard isLeaving else {
            throw WorldFailure(description: "the server hangs up on a client of \(model.name)")
        }
        guard unanswered.isEmpty, input.isEmpty, reader.isAtBoundary else {
            throw WorldFailure(
                description: "\(unanswered.count) requests of a client of \(model.name) that "
                    + "leaves in order are not answered")
        }
    }
}

extension SimulatedClient {
    /// Ways of coming and not staying.
    static let visits = 6

    /// Sends what somebody sends who wants no volume, or does not know how to ask for one.
    static func visit(_ wire: Wire, _ way: Int) {
        func option(_ code: OptionCode, _ data: [UInt8] = []) {
            wire.toServer.append(option: code, data)
        }
        wire.toServer.append(big: ClientFlag.fixedNewstyle | ClientFlag.noZeroes)
        switch way {
        case 0:
            option(.list)
            option(.abort)
        case 1:
            // Half a message.
            wire.toServer.append(big: Magic.option)
        case 2:
            wire.toServer += [UInt8](repeating: 0x55, count: 16)
        case 3:
            option(.go, [0, 0, 0, 1, 0x78, 0, 0])
        case 4:
            option(.info, [0, 0, 0, 0, 0, 0])
            option(.structuredReply)
        default:
            break
        }
    }
}

extension Array where Element == UInt8 {
    mutating func append(big value: some FixedWidthInteger) {
        Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
    }

    mutating func append(option code: OptionCode, _ data: [UInt8] = []) {
        append(big: Magic.option)
        append(big: code.rawValue)
        append(big: UInt32(data.count))
        append(contentsOf: data)
    }
}

extension ArraySlice where Element == UInt8 {
    func big<Word: FixedWidthInteger>(_ offset: Int, as: Word.Type) -> Word {
        withUnsafeBytes {
            Word(bigEndian: $0.loadUnaligned(fromByteOffset: offset, as: Word.self))
        }
    }
}
