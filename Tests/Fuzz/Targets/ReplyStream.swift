// A client's view of what the server sends in transmission: replies are taken apart, compared with what
// was asked, and counted: each request has exactly one answer, and not before all of it was received.

import NBDProtocol

/// A request as the client sent it.
struct SentRequest {
    var header: RequestHeader
    var command: Command?
    /// What the rules say of it.
    var verdict: Verdict
    /// Bytes that the client had sent when the request was whole.
    var end: Int
    /// What the sink was told to answer, once it was: an errno.
    var code: Int32?
    /// The range of a BLOCK_STATUS, which may be in its payload.
    var statusLength: UInt64
    var contexts: [UInt32]
    var isAnswered = false
    // What has come of its chunks.
    var answered: UInt64 = 0
    var contextsAnswered = 0
    var dataChunks = 0

    /// What its data are filled with.
    var pattern: UInt8 { UInt8(truncatingIfNeeded: header.cookie) }
}

struct ReplyStream {
    let format: WireFormat
    var requests: [UInt64: SentRequest] = [:]
    private var bytes: [UInt8] = []
    private var start = 0

    init(format: WireFormat) { self.format = format }

    /// Nothing is left over that is no reply.
    var isAtBoundary: Bool { start == bytes.count }

    /// - Parameter received: how many of the client's bytes the server has.
    mutating func append(_ more: ArraySlice<UInt8>, received: Int) {
        bytes += more
        while let size = take(received) {
            start += size
            if start == bytes.count {
                bytes = []
                start = 0
            }
        }
    }

    private func word<Word: FixedWidthInteger>(_ offset: Int, _: Word.Type) -> Word {
        (0..<MemoryLayout<Word>.size).reduce(0) { $0 << 8 | Word(bytes[start + offset + $1]) }
    }

    /// The size of the reply or chunk that begins here; nil: not all of it is there.
    private mutating func take(_ received: Int) -> Int? {
        let left = bytes.count - start
        guard left >= SimpleReply.size else { return nil }
        let magic = word(0, UInt32.self)
        let cookie = word(8, UInt64.self).byteSwapped
        guard var request = requests[cookie] else {
            fatalError("fuzz: a reply to a request that was never sent")
        }
        require(!request.isAnswered, "a second answer")
        require(request.end <= received, "an answer before all of the request was received")
        let size: Int?
        switch magic {
        case Magic.simpleReply:
            require(format != .extended, "a simple reply after EXTENDED_HEADERS")
            size = takeSimple(&request, left)
        case Magic.structuredReply:
            require(format == .structured, "a structured reply that was not agreed on")
            size = takeChunk(&request, left, header: 20)
        case Magic.extendedReply:
            require(format == .extended, "an extended reply that was not agreed on")
            size = takeChunk(&request, left, header: 32)
        default: fatalError("fuzz: a reply begins with \(String(magic, radix: 16))")
        }
        if size != nil { requests[cookie] = request }
        return size
    }

    private func takeSimple(_ request: inout SentRequest, _ left: Int) -> Int? {
        let error = word(4, UInt32.self)
        let isRead = request.command == .read
        if format == .structured {
            require(error == 0, "an error without a chunk")
            require(!isRead && request.command != .blockStatus, "content without a chunk")
        }
        let length = isRead && error == 0 ? Int(request.header.length) : 0
        guard left >= SimpleReply.size + length else { return nil }
        verifyData(request, SimpleReply.size, length)
        verifyError(request, error)
        request.isAnswered = true
        return SimpleReply.size + length
    }

    private func verifyData(_ request: SentRequest, _ offset: Int, _ length: Int) {
        guard length > 0 else { return }
        let first = start + offset
        require(
            bytes[first] == request.pattern && bytes[first + length - 1] == request.pattern,
            "somebody else's data")
    }

    private func verifyError(_ request: SentRequest, _ error: UInt32) {
        let expected: WireError
        if case .refuse(let refusal) = request.verdict {
            expected = refusal.error
        } else {
            expected = WireError(errno: request.code ?? 0)
        }
        require(error == expected.rawValue, "error \(error) where \(expected) is due")
    }

    private func takeChunk(_ request: inout SentRequest, _ left: Int, header: Int) -> Int? {
        guard left >= header else { return nil }
        let length =
            header == 20 ? Int(word(16, UInt32.self)) : Int(clamping: word(24, UInt64.self))
        require(length <= Int(Limits.maximumPayload) + 64, "a chunk of \(length) bytes")
        guard left >= header + length else { return nil }
        if header == 32 {
            require(word(16, UInt64.self) == request.header.offset, "another offset is echoed")
        }
        let flags = word(4, UInt16.self)
        require(flags & ~ChunkFlag.done == 0, "unknown chunk flags")
        let isLast = flags & ChunkFlag.done != 0
        var error: UInt32 = 0
        switch ChunkType(rawValue: word(6, UInt16.self)) {
        case .none: require(length == 0 && isLast, "a chunk of nothing that has content")
        case .offsetData:
            require(length > 8, "an empty data chunk")
            takeContent(&request, header, length - 8)
            verifyData(request, header + 8, length - 8)
            request.dataChunks += 1
        case .offsetHole:
            require(length == 12, "a hole of \(length) bytes")
            takeContent(&request, header, Int(word(header + 8, UInt32.self)))
            request.dataChunks += 1
        case .blockStatus, .blockStatusExtended: takeStatus(&request, header, length)
        case .error:
            error = word(header, UInt32.self)
            require(length == 6 + Int(word(header + 4, UInt16.self)), "an error's text")
            require(error != 0 && isLast, "an error chunk that is none")
            require(request.answered == 0 && request.contextsAnswered == 0, "content and error")
        case let type: fatalError("fuzz: a chunk of type \(type.rawValue)")
        }
        if isLast {
            verifyError(request, error)
            if error == 0 { verifyWhole(request) }
            request.isAnswered = true
        }
        return header + length
    }

    private func takeContent(_ request: inout SentRequest, _ header: Int, _ length: Int) {
        require(request.command == .read, "data that nobody asked for")
        require(
            word(header, UInt64.self) == request.header.offset + request.answered,
            "a chunk of a READ that does not follow the one before")
        require(length > 0, "a chunk of a READ without content")
        request.answered += UInt64(length)
    }

    private func takeStatus(_ request: inout SentRequest, _ header: Int, _ length: Int) {
        require(request.command == .blockStatus, "status that nobody asked for")
        require(request.contextsAnswered < request.contexts.count, "status of another context")
        require(
            word(header, UInt32.self) == request.contexts[request.contextsAnswered],
            "contexts in another order")
        request.contextsAnswered += 1
        let isExtended = word(6, UInt16.self) == ChunkType.blockStatusExtended.rawValue
        require(isExtended == (format == .extended), "status in the other format")
        let first = isExtended ? 8 : 4
        let size = isExtended ? 16 : 8
        require((length - first) % size == 0 && length > first, "extents are cut")
        let count = (length - first) / size
        require(!isExtended || count == Int(word(header + 4, UInt32.self)), "another count")
        require(count <= Limits.maximumExtents, "too many extents")
        if request.header.flags.contains(.requestOne) { require(count == 1, "more than one") }
        var sum: UInt64 = 0
        for index in 0..<count {
            let place = header + first + size * index
            let extent = isExtended ? word(place, UInt64.self) : UInt64(word(place, UInt32.self))
            require(extent > 0, "an empty extent")
            sum += extent
        }
        require(sum <= request.statusLength, "status beyond the range")
    }

    private func verifyWhole(_ request: SentRequest) {
        if request.command == .read {
            require(request.answered == request.header.length, "not all of a READ")
            if request.header.flags.contains(.dontFragment) {
                require(request.dataChunks <= 1, "a READ in fragments")
            }
        }
        if request.command == .blockStatus {
            require(request.contextsAnswered == request.contexts.count, "a context is missing")
        }
    }
}
