// A client's side of the replies: takes what has arrived apart, in the format that was agreed on, and
// puts the chunks of a READ together.

import NBDProtocol

/// The whole reply to a request.
struct WholeReply {
    var cookie: UInt64
    var error: UInt32
    /// A READ's bytes, holes as zeroes.
    var payload: [UInt8]
}

struct ReplyReader {
    let format: WireFormat
    /// What has come of READs whose last chunk is awaited.
    private var partial: [UInt64: [UInt8]] = [:]

    init(format: WireFormat) { self.format = format }

    var isAtBoundary: Bool { partial.isEmpty }

    /// - Parameter request: what was asked by that cookie, if anything was.
    /// - Returns: how many bytes it took, with the reply if that is whole now; nil: more is needed.
    mutating func take(
        _ input: ArraySlice<UInt8>, _ request: (UInt64) -> SentRequest?
    ) throws -> (taken: Int, reply: WholeReply?)? {
        guard input.count >= SimpleReply.size else { return nil }
        switch input.big(0, as: UInt32.self) {
        case Magic.simpleReply where format != .extended:
            return try takeSimple(input, request)
        case Magic.structuredReply where format == .structured:
            return try takeChunk(input, headerSize: 20, request)
        case Magic.extendedReply where format == .extended:
            return try takeChunk(input, headerSize: 32, request)
        default:
            throw WorldFailure(description: "a reply does not begin with its magic number")
        }
    }

    private func open(
        _ cookie: UInt64, _ request: (UInt64) -> SentRequest?
    ) throws -> SentRequest {
        guard let request = request(cookie) else {
            throw WorldFailure(description: "a reply to request \(cookie), which is not open")
        }
        return request
    }

    private func takeSimple(
        _ input: ArraySlice<UInt8>, _ request: (UInt64) -> SentRequest?
    ) throws -> (Int, WholeReply?)? {
        let error = input.big(4, as: UInt32.self)
        let cookie = input.big(8, as: UInt64.self)
        let request = try open(cookie, request)
        let isRead = request.isRead
        if isRead && format == .structured {
            throw WorldFailure(description: "a READ is not answered in chunks")
        }
        let length = isRead && error == 0 ? request.sectors.count * 512 : 0
        guard input.count >= SimpleReply.size + length else { return nil }
        let payload = Array(input.dropFirst(SimpleReply.size).prefix(length))
        return (
            SimpleReply.size + length,
            WholeReply(cookie: cookie, error: error, payload: payload)
        )
    }

    private mutating func takeChunk(
        _ input: ArraySlice<UInt8>, headerSize: Int, _ request: (UInt64) -> SentRequest?
    ) throws -> (Int, WholeReply?)? {
        guard input.count >= headerSize else { return nil }
        let length =
            headerSize == 20
            ? Int(input.big(16, as: UInt32.self)) : Int(input.big(24, as: UInt64.self))
        guard input.count >= headerSize + length else { return nil }
        let isLast = input.big(4, as: UInt16.self) & ChunkFlag.done != 0
        let cookie = input.big(8, as: UInt64.self)
        let request = try open(cookie, request)
        let start = UInt64(request.sectors.lowerBound) * 512
        let chunk = input.dropFirst(headerSize).prefix(length)
        var payload = partial.removeValue(forKey: cookie) ?? []
        var error: UInt32 = 0
        // Chunks of one READ come in order, without gaps: so their lengths say all.
        func expect(_ offset: UInt64) throws {
            guard request.isRead, offset == start + UInt64(payload.count) else {
                throw WorldFailure(description: "content at \(offset) that was not due")
            }
        }
        switch ChunkType(rawValue: input.big(6, as: UInt16.self)) {
        case .none: break
        case .offsetData:
            try expect(chunk.big(0, as: UInt64.self))
            payload += chunk.dropFirst(8)
        case .offsetHole:
            try expect(chunk.big(0, as: UInt64.self))
            payload += repeatElement(0, count: Int(chunk.big(8, as: UInt32.self)))
        case .error: error = chunk.big(0, as: UInt32.self)
        case let type: throw WorldFailure(description: "a chunk of type \(type.rawValue)")
        }
        guard isLast else {
            partial[cookie] = payload
            return (headerSize + length, nil)
        }
        if request.isRead, error == 0, payload.count != request.sectors.count * 512 {
            throw WorldFailure(description: "a READ is answered with \(payload.count) bytes")
        }
        return (
            headerSize + length, WholeReply(cookie: cookie, error: error, payload: payload)
        )
    }
}

extension SentRequest {
    var isRead: Bool { command == .read && wrong == nil }
}
