// Options as bytes, and the three formats of requests and replies.

extension RawClient {
    // MARK: - Options

    static let clientFlags = bigEndianBytes(UInt32(3))

    static let exportName: UInt32 = 1
    static let abort: UInt32 = 2
    static let list: UInt32 = 3
    static let startTLS: UInt32 = 5
    static let info: UInt32 = 6
    static let go: UInt32 = 7
    static let structuredReply: UInt32 = 8
    static let listMetaContext: UInt32 = 9
    static let setMetaContext: UInt32 = 10
    static let extendedHeaders: UInt32 = 11

    static let acknowledged: UInt32 = 1
    static let unsupported: UInt32 = 1 << 31 | 1
    static let invalid: UInt32 = 1 << 31 | 3
    static let tlsRequired: UInt32 = 1 << 31 | 5
    static let unknown: UInt32 = 1 << 31 | 6
    static let tooBig: UInt32 = 1 << 31 | 9

    /// - Parameter length: what the header says; nil: the truth.
    static func option(_ code: UInt32, _ data: [UInt8] = [], length: UInt32? = nil) -> [UInt8] {
        Array("IHAVEOPT".utf8) + bigEndianBytes(code)
            + bigEndianBytes(length ?? UInt32(data.count)) + data
    }

    static func string(_ text: String) -> [UInt8] {
        bigEndianBytes(UInt32(text.utf8.count)) + Array(text.utf8)
    }

    static func go(_ export: String) -> [UInt8] {
        option(go, string(export) + bigEndianBytes(UInt16(0)))
    }

    static func contexts(_ code: UInt32, _ export: String, _ queries: [String]) -> [UInt8] {
        option(
            code,
            string(export) + bigEndianBytes(UInt32(queries.count)) + queries.flatMap(string))
    }

    /// The last reply to an option: acknowledged, or an error.
    func outcome() throws -> UInt32 {
        while true {
            let header = try receive(20)
            guard Self.word(header[0..<8]) == 0x0003_e889_0455_65a9 else {
                throw Failure("this is no reply to an option: \(header)")
            }
            let type = UInt32(Self.word(header[12..<16]))
            _ = try receive(Int(Self.word(header[16..<20])))
            if type == Self.acknowledged || type & 1 << 31 != 0 { return type }
            guard (2...4).contains(type) else { throw Failure("a reply of type \(type)") }
        }
    }

    /// Greeted and in the haggling.
    func greet() throws {
        _ = try receive(18)
        try send(Self.clientFlags)
    }

    func ask(_ option: [UInt8]) throws -> UInt32 {
        try send(option)
        return try outcome()
    }

    // MARK: - Formats

    enum Format: CaseIterable { case simple, structured, extended }

    /// In transmission with an export, and, where the format has them, with contexts.
    convenience init(
        _ server: Server, _ export: String, _ format: Format,
        contexts: [String] = ["base:allocation"]
    ) throws {
        try self.init(server)
        try greet()
        var options: [[UInt8]] = []
        switch format {
        case .simple: break
        case .structured: options.append(Self.option(Self.structuredReply))
        case .extended: options.append(Self.option(Self.extendedHeaders))
        }
        if format != .simple {
            options.append(Self.contexts(Self.setMetaContext, export, contexts))
        }
        for option in options + [Self.go(export)] {
            guard try ask(option) == Self.acknowledged else { throw Failure("option refused") }
        }
    }

    static func header(
        _ format: Format, _ command: UInt16, flags: UInt16 = 0, offset: UInt64 = 0,
        length: UInt64 = 0, cookie: UInt64 = 1
    ) -> [UInt8] {
        let isExtended = format == .extended
        return bigEndianBytes(isExtended ? extendedMagic : requestMagic) + bigEndianBytes(flags)
            + bigEndianBytes(command) + bigEndianBytes(cookie) + bigEndianBytes(offset)
            + (isExtended
                ? bigEndianBytes(length) : bigEndianBytes(UInt32(truncatingIfNeeded: length)))
    }

    static let extendedMagic: UInt32 = 0x21e4_1c71
    /// The flag by which an extended header announces a payload.
    static let hasPayload: UInt16 = 1 << 5
    static let noHole: UInt16 = 1 << 1
    static let requestOne: UInt16 = 1 << 3

    /// What a request was answered with.
    struct Answer {
        var cookie: UInt64
        var error: UInt32 = 0
        /// The lengths of the extents of a BLOCK_STATUS.
        var extents: [UInt64] = []
    }

    /// The next answer, whole.
    /// - Parameter dataLength: of a READ that succeeds, in the simple format.
    func answer(_ format: Format, dataLength: Int = 0) throws -> Answer {
        if format == .simple {
            let header = try receive(16)
            guard Self.word(header[0..<4]) == 0x6744_6698 else { throw Self.outOfStep(header) }
            let error = UInt32(Self.word(header[4..<8]))
            if error == 0 { _ = try receive(dataLength) }
            return Answer(cookie: Self.word(header[8..<16]), error: error)
        }
        // The first reply may be a simple one: structured, to what has no content.
        let magic = Self.word(try receive(4))
        if format == .structured, magic == 0x6744_6698 {
            let rest = try receive(12)
            return Answer(cookie: Self.word(rest[4..<12]), error: UInt32(Self.word(rest[0..<4])))
        }
        var answer = Answer(cookie: 0)
        var header = try chunk(format, magic)
        answer.cookie = header.cookie
        while true {
            guard header.cookie == answer.cookie else { throw Failure("mixed chunks") }
            guard header.length <= 40 << 20 else { throw Failure("a chunk of \(header.length)") }
            let payload = try receive(Int(header.length))
            switch header.type {
            case 5:
                answer.extents = stride(from: 4, to: payload.count, by: 8)
                    .map { Self.word(payload[$0..<$0 + 4]) }
            case 6:
                answer.extents = stride(from: 8, to: payload.count, by: 16)
                    .map { Self.word(payload[$0..<$0 + 8]) }
            case 0x8001, 0x8002: answer.error = UInt32(Self.word(payload[0..<4]))
            default: break
            }
            if header.isLast { return answer }
            header = try chunk(format, Self.word(try receive(4)))
        }
    }

    private struct Chunk {
        var isLast: Bool
        var type: UInt16
        var cookie: UInt64
        var length: UInt64
    }

    private func chunk(_ format: Format, _ magic: UInt64) throws -> Chunk {
        let isExtended = format == .extended
        guard magic == (isExtended ? 0x6e8a_278c : 0x668e_33ef) else {
            throw Self.outOfStep(bigEndianBytes(magic))
        }
        let rest = try receive(isExtended ? 28 : 16)
        return Chunk(
            isLast: rest[1] & 1 != 0, type: UInt16(Self.word(rest[2..<4])),
            cookie: Self.word(rest[4..<12]),
            length: Self.word(isExtended ? rest[20..<28] : rest[12..<16]))
    }

    private static func outOfStep(_ bytes: [UInt8]) -> Failure {
        Failure("the stream is out of step: \(bytes)")
    }

    /// The answer to one request, which is the only one under way.
    func answer(
        _ format: Format, to command: UInt16, flags: UInt16 = 0, offset: UInt64 = 0,
        length: UInt64 = 0, payload: [UInt8] = []
    ) throws -> Answer {
        let cookie = UInt64.random(in: 0...UInt64.max)
        try send(
            Self.header(
                format, command, flags: flags, offset: offset, length: length, cookie: cookie)
                + payload)
        let dataLength = command == Self.read ? Int(clamping: length) : 0
        let answer = try answer(format, dataLength: dataLength)
        guard answer.cookie == cookie else { throw Failure("the answer to something else") }
        return answer
    }
}
