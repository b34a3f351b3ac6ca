// Takes replies of any format apart, and checks what the protocol asks of them on the way.

import NBDProtocol
import Testing

/// The whole answer to one request.
struct Answer: Equatable {
    struct Extents: Equatable {
        var context: UInt32
        /// Length and status.
        var extents: [[UInt64]]
    }
    var error: UInt32 = 0
    var text = ""
    /// Of a READ: holes are zeroes here.
    var data: [UInt8]?
    /// Bytes of it that came as holes.
    var holes = 0
    /// Chunks in which it came.
    var pieces = 0
    var status: [Extents] = []
}

/// Replies as they arrive; each request is answered once.
struct ReplyStream {
    /// A request that awaits its answer.
    struct Asked {
        var offset: UInt64 = 0
        /// Of a READ; nil: no data is to come.
        var length: Int?
    }
    private struct Partial {
        var answer = Answer()
        /// Which bytes of the data have come.
        var filled: [Bool]
    }

    let format: WireFormat
    var asked: [UInt64: Asked]
    private(set) var answers: [UInt64: Answer] = [:]
    private var partial: [UInt64: Partial] = [:]
    private var input: ArraySlice<UInt8> = []

    init(format: WireFormat, asked: [UInt64: Asked] = [:]) {
        self.format = format
        self.asked = asked
    }

    var isAtBoundary: Bool { input.isEmpty && partial.isEmpty }

    mutating func append(_ bytes: [UInt8]) throws {
        input += bytes
        while try takeReply() {}
    }

    private mutating func takeReply() throws -> Bool {
        guard input.count >= 16 else { return false }
        switch word(0, as: UInt32.self) {
        case Magic.simpleReply: return try takeSimple()
        case Magic.structuredReply where format == .structured: return try takeChunk(20)
        case Magic.extendedReply where format == .extended: return try takeChunk(32)
        default: throw ClientError("a reply that was not agreed on: \(input.prefix(8))")
        }
    }

    private func word<Word: FixedWidthInteger>(_ offset: Int, as: Word.Type = Word.self) -> Word {
        input.dropFirst(offset).prefix(MemoryLayout<Word>.size).reduce(0) { $0 << 8 | Word($1) }
    }

    private mutating func takeSimple() throws -> Bool {
        if format == .extended { throw ClientError("a simple reply among extended ones") }
        let error = word(4, as: UInt32.self)
        let cookie = word(8, as: UInt64.self)
        guard let asked = asked[cookie] else { throw ClientError("nobody asked for \(cookie)") }
        var answer = Answer(error: error)
        var size = 16
        if let length = asked.length, error == 0 {
            if format == .structured { throw ClientError("a READ was answered simply") }
            guard input.count >= 16 + length else { return false }
            answer.data = Array(input.dropFirst(16).prefix(length))
            size += length
        }
        input = input.dropFirst(size)
        finish(cookie, answer)
        return true
    }

    private mutating func finish(_ cookie: UInt64, _ answer: Answer) {
        asked[cookie] = nil
        answers[cookie] = answer
    }

    private mutating func takeChunk(_ headerSize: Int) throws -> Bool {
        guard input.count >= headerSize else { return false }
        let length =
            headerSize == 20 ? Int(word(16, as: UInt32.self)) : Int(word(24, as: UInt64.self))
        guard input.count >= headerSize + length else { return false }
        let flags = word(4, as: UInt16.self)
        let type = word(6, as: UInt16.self)
        let cookie = word(8, as: UInt64.self)
        guard let asked = asked[cookie] else { throw ClientError("nobody asked for \(cookie)") }
        if headerSize == 32 { #expect(word(16, as: UInt64.self) == asked.offset) }
        #expect(flags & ~ChunkFlag.done == 0)
        let payload = Array(input.dropFirst(headerSize).prefix(length))
        input = input.dropFirst(headerSize + length)

        var state =
            partial.removeValue(forKey: cookie)
            ?? Partial(filled: Array(repeating: false, count: asked.length ?? 0))
        try take(ChunkType(rawValue: type), payload, asked, &state)
        guard flags & ChunkFlag.done != 0 else {
            partial[cookie] = state
            return true
        }
        if asked.length != nil && state.answer.error == 0 {
            #expect(state.filled.allSatisfy { $0 }, "a READ was answered in part")
            if state.answer.data == nil { state.answer.data = [] }
        }
        finish(cookie, state.answer)
        return true
    }

    private func take(
        _ type: ChunkType, _ payload: [UInt8], _ asked: Asked, _ state: inout Partial
    ) throws {
        func field<Word: FixedWidthInteger>(_ at: Int, as: Word.Type) -> Word {
            bigEndian(payload, at, as: Word.self)
        }
        func fill(_ offset: UInt64, _ data: [UInt8]) throws {
            guard let length = asked.length, !data.isEmpty, offset >= asked.offset,
                Int(offset - asked.offset) + data.count <= length
            else { throw ClientError("content that was not asked for") }
            state.answer.pieces += 1
            let start = Int(offset - asked.offset)
            var all = state.answer.data ?? [UInt8](repeating: 0, count: length)
            all.replaceSubrange(start..<start + data.count, with: data)
            state.answer.data = all
            for index in start..<start + data.count {
                #expect(!state.filled[index], "content came twice")
                state.filled[index] = true
            }
        }
        switch type {
        case .none: #expect(payload.isEmpty)
        case .offsetData:
            try fill(field(0, as: UInt64.self), Array(payload.dropFirst(8)))
        case .offsetHole:
            #expect(payload.count == 12)
            let length = Int(field(8, as: UInt32.self))
            try fill(field(0, as: UInt64.self), [UInt8](repeating: 0, count: length))
            state.answer.holes += length
        case .blockStatus, .blockStatusExtended:
            #expect((type == .blockStatusExtended) == (format == .extended))
            state.answer.status.append(try extents(payload))
        case .error:
            state.answer.error = field(0, as: UInt32.self)
            let count = Int(field(4, as: UInt16.self))
            #expect(state.answer.error != 0 && payload.count == 6 + count)
            state.answer.text = String(decoding: payload.dropFirst(6), as: UTF8.self)
        default: throw ClientError("a chunk of type \(type.rawValue)")
        }
    }

    private func extents(_ payload: [UInt8]) throws -> Answer.Extents {
        var status = Answer.Extents(context: bigEndian(payload, 0, as: UInt32.self), extents: [])
        if format == .extended {
            let count = Int(bigEndian(payload, 4, as: UInt32.self))
            #expect(payload.count == 8 + 16 * count)
            for at in stride(from: 8, to: payload.count, by: 16) {
                status.extents.append([
                    bigEndian(payload, at, as: UInt64.self),
                    bigEndian(payload, at + 8, as: UInt64.self),
                ])
            }
        } else {
            #expect(payload.count % 8 == 4)
            for at in stride(from: 4, to: payload.count, by: 8) {
                status.extents.append([
                    UInt64(bigEndian(payload, at, as: UInt32.self)),
                    UInt64(bigEndian(payload, at + 4, as: UInt32.self)),
                ])
            }
        }
        #expect(!status.extents.isEmpty && status.extents.allSatisfy { $0[0] > 0 })
        return status
    }
}
