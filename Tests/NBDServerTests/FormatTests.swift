// Structured replies, extended headers and block status of a real server, request by request.

import NBDProtocol
import Testing

private let blockSize: UInt64 = 64 << 10

/// A connection that has agreed on a format and meta contexts.
private final class FormatClient {
    let client: Client
    let format: WireFormat
    private(set) var contexts: [String: UInt32] = [:]
    private var cookie: UInt64 = 0xFEDC_BA98_0000_0000

    init(
        _ server: TestServer, _ format: WireFormat, contexts names: [String] = [],
        export: String = "alpha"
    ) throws {
        client = try Client(unix: server.socketPath)
        self.format = format
        try client.greet()
        if format != .simple {
            try client.sendOption(format == .structured ? .structuredReply : .extendedHeaders)
            #expect(try client.receiveOptionReply().type == .ack)
        }
        let name = bigEndianBytes(UInt32(export.utf8.count)) + Array(export.utf8)
        if !names.isEmpty {
            try client.sendOption(
                .setMetaContext,
                name + bigEndianBytes(UInt32(names.count))
                    + names.flatMap {
                        bigEndianBytes(UInt32($0.utf8.count)) + Array($0.utf8)
                    })
            while true {
                let reply = try client.receiveOptionReply()
                if reply.type == .ack { break }
                guard reply.type == .metaContext else {
                    throw ClientError("SET_META_CONTEXT: \(reply.type)")
                }
                let context = String(decoding: reply.data.dropFirst(4), as: UTF8.self)
                contexts[context] = bigEndian(reply.data, 0, as: UInt32.self)
            }
        }
        try client.sendOption(.go, name + bigEndianBytes(UInt16(0)))
        while true {
            let reply = try client.receiveOptionReply()
            if reply.type == .ack { return }
            guard reply.type == .info else { throw ClientError("GO: \(reply.type)") }
        }
    }

    func ask(
        _ command: Command, _ offset: UInt64 = 0, _ length: UInt64 = 0,
        flags: CommandFlags = [], payload: [UInt8] = [], readLength: Int? = nil
    ) throws -> Answer {
        cookie += 1
        try client.send(
            Client.request(
                command.rawValue, cookie: cookie, offset: offset, length: length, flags: flags,
                format: format) + payload)
        let data = command == .read ? readLength ?? Int(length) : nil
        var replies = ReplyStream(
            format: format, asked: [cookie: .init(offset: offset, length: data)])
        while replies.answers.isEmpty { try replies.append(try client.receiveSome()) }
        #expect(replies.isAtBoundary)
        return replies.answers[cookie]!
    }

    func write(_ offset: UInt64, _ bytes: [UInt8]) throws {
        let answer = try ask(.write, offset, UInt64(bytes.count), payload: bytes)
        #expect(answer == Answer())
    }

    /// Extents of one context, as (length, status).
    func status(
        _ context: String, _ offset: UInt64, _ length: UInt64, flags: CommandFlags = []
    ) throws -> [[UInt64]] {
        let answer = try ask(.blockStatus, offset, length, flags: flags)
        #expect(answer.error == 0)
        return answer.status.first { $0.context == contexts[context] }?.extents ?? []
    }
}

private let chunked = [WireFormat.structured, .extended]

@Suite struct FormatTests {
    @Test(arguments: chunked)
    func readsTellHoles(format: WireFormat) throws {
        let server = try TestServer()
        let client = try FormatClient(server, format)
        let data = (0..<4096).map { UInt8(truncatingIfNeeded: $0) }
        try client.write(2 * blockSize + 4096, data)
        let zeroes = [UInt8](repeating: 0, count: Int(blockSize))
        let whole = try client.ask(.read, blockSize, 3 * blockSize)
        let block = zeroes[..<4096] + data + zeroes[8192...]
        #expect(whole.data == zeroes + block + zeroes)
        #expect(whole.holes == Int(2 * blockSize) && whole.pieces == 3)
        let hole = try client.ask(.read, 8 * blockSize, 512)
        #expect(hole.data == [UInt8](repeating: 0, count: 512) && hole.holes == 512)
        let nothing = try client.ask(.read, 0, 0)
        #expect(nothing == Answer(data: []))
        // In one piece, with nothing left out, whatever the length.
        let unbroken = try client.ask(.read, blockSize, 3 * blockSize, flags: .dontFragment)
        #expect(unbroken.data == whole.data && unbroken.holes == 0 && unbroken.pieces == 1)
        let longest = try client.ask(.read, 0, 32 * mebibyte, flags: .dontFragment)
        #expect(longest.error == 0 && longest.holes == 0 && longest.pieces == 1)
    }

    @Test(arguments: chunked)
    func manyHolesAndDataInTurns(format: WireFormat) throws {
        let server = try TestServer()
        let client = try FormatClient(server, format)
        var model = [UInt8](repeating: 0, count: 100 * Int(blockSize))
        for index in stride(from: 0, to: 100, by: 2) {
            let bytes = [UInt8](repeating: UInt8(index + 1), count: 512)
            try client.write(UInt64(index) * blockSize, bytes)
            let start = index * Int(blockSize)
            model.replaceSubrange(start..<start + 512, with: bytes)
        }
        #expect(try client.ask(.read, 0, 100 * blockSize).data == model)
    }

    @Test(arguments: chunked)
    func errorsHaveWords(format: WireFormat) throws {
        let server = try TestServer()
        let client = try FormatClient(server, format)
        let past = try client.ask(.read, 1 << 40, 512)
        #expect(past.error == WireError.invalid.rawValue)
        #expect(past.text == "the range reaches past the end of the export")
        let full = try client.ask(.write, 1 << 40, 512, payload: [UInt8](repeating: 1, count: 512))
        #expect(full.error == WireError.noSpace.rawValue && !full.text.isEmpty)
        #expect(try client.ask(.blockStatus, 0, 512).error == WireError.invalid.rawValue)
        #expect(try client.ask(.flush) == Answer())
    }

    @Test func lengthsOfMoreThan32Bits() throws {
        let server = try TestServer(volumes: [("alpha", 1 << 50)])
        let client = try FormatClient(server, .extended, contexts: [MetaContext.allocation])
        try client.write(1 << 45, [UInt8](repeating: 7, count: 512))
        #expect(
            try client.status(MetaContext.allocation, 0, 1 << 50)
                == [[1 << 45, 3], [blockSize, 0], [1 << 50 - 1 << 45 - blockSize, 3]])
        #expect(try client.ask(.writeZeroes, 0, 1 << 50) == Answer())
        #expect(try client.status(MetaContext.allocation, 0, 1 << 50) == [[1 << 50, 3]])
        #expect(try client.ask(.trim, 0, 1 << 50) == Answer())
        #expect(try client.ask(.cache, 0, 1 << 50) == Answer())
    }

    @Test func payloadsThatDoNotBelong() throws {
        let server = try TestServer()
        let client = try FormatClient(server, .extended)
        for command in [Command.read, .flush, .trim, .cache, .writeZeroes, .blockStatus] {
            // Without data, as a failed READ has none.
            let answer = try client.ask(
                command, 0, 1024, flags: .payloadLength,
                payload: [UInt8](repeating: 0x21, count: 1024))
            #expect(answer.error == WireError.invalid.rawValue)
        }
        #expect(try client.ask(.read, 0, 512).error == 0)
        // One that nobody can mean ends the connection.
        try client.client.send(
            Client.request(
                Command.write.rawValue, cookie: 1, length: 1 << 40, flags: .payloadLength,
                format: .extended))
        #expect(client.client.isHungUpOn())
    }

    @Test func compactRequestsAfterExtendedHeadersEndTheConnection() throws {
        let server = try TestServer()
        let client = try FormatClient(server, .extended)
        try client.client.send(Client.request(.read, cookie: 1, length: 512) + [0, 0, 0, 0])
        #expect(client.client.isHungUpOn())
        #expect(eventually { server.log.has(.warning, "magic number") })
    }
}

@Suite struct BlockStatusTests {
    @Test(arguments: chunked)
    func allocation(format: WireFormat) throws {
        let server = try TestServer()
        let client = try FormatClient(server, format, contexts: [MetaContext.allocation])
        for block in [3, 4, 5, 9] as [UInt64] {
            try client.write(block * blockSize, [UInt8](repeating: 1, count: 512))
        }
        let size = 64 * mebibyte
        let all = [
            [3 * blockSize, 3], [3 * blockSize, 0], [3 * blockSize, 3], [blockSize, 0],
            [size - 10 * blockSize, 3],
        ]
        #expect(try client.status(MetaContext.allocation, 0, size) == all)
        // Ranges that do not begin or end with a block.
        #expect(
            try client.status(MetaContext.allocation, 512, 3 * blockSize)
                == [[3 * blockSize - 512, 3], [512, 0]])
        #expect(
            try client.status(MetaContext.allocation, 0, size, flags: .requestOne)
                == [[3 * blockSize, 3]])
        #expect(
            try client.status(MetaContext.allocation, size - 512, 512, flags: .requestOne)
                == [[512, 3]])
        #expect(try client.ask(.trim, 0, size) == Answer())
        #expect(try client.status(MetaContext.allocation, 0, size) == [[size, 3]])
    }

    @Test(arguments: chunked)
    func whatSnapshotsShareAndWhatChanged(format: WireFormat) throws {
        let server = try TestServer()
        let changed = "wafer:changed-since:monday"
        let before = try FormatClient(server, format)
        for block in 0..<4 as Range<UInt64> {
            try before.write(block * blockSize, [UInt8](repeating: 1, count: 512))
        }
        try server.pool.change(.snapshot(origin: "alpha", name: "monday"))
        let client = try FormatClient(
            server, format,
            contexts: [MetaContext.allocation, "wafer:shared", changed, "wafer:nothing"])
        #expect(Set(client.contexts.keys) == [MetaContext.allocation, "wafer:shared", changed])
        try client.write(2 * blockSize, [UInt8](repeating: 2, count: 512))
        try client.write(6 * blockSize, [UInt8](repeating: 2, count: 512))
        #expect(try client.ask(.trim, 0, blockSize) == Answer())
        let range = 8 * blockSize
        let answer = try client.ask(.blockStatus, 0, range)
        #expect(answer.status.map(\.context) == [1, 2, 3])
        #expect(
            try client.status("wafer:shared", 0, range)
                == [[blockSize, 0], [blockSize, 1], [blockSize, 0], [blockSize, 1],
                    [4 * blockSize, 0]])
        #expect(
            try client.status(changed, 0, range)
                == [[blockSize, 1], [blockSize, 0], [blockSize, 1], [3 * blockSize, 0],
                    [blockSize, 1], [blockSize, 0]])
    }

    @Test func onlySomeContexts() throws {
        let server = try TestServer()
        let names = [MetaContext.allocation, "wafer:shared"]
        let client = try FormatClient(server, .extended, contexts: names)
        func ask(_ length: UInt64, _ ids: [UInt32]) throws -> Answer {
            let payload = bigEndianBytes(length) + ids.flatMap { bigEndianBytes($0) }
            return try client.ask(
                .blockStatus, 0, UInt64(payload.count), flags: .payloadLength, payload: payload)
        }
        let size = 64 * mebibyte
        #expect(try ask(size, [2]).status == [.init(context: 2, extents: [[size, 0]])])
        #expect(try ask(size, [2, 1]).status.map(\.context) == [1, 2])
        for bad in [[], [3], [1, 1], [UInt32](1...40)] as [[UInt32]] {
            #expect(try ask(size, bad).error == WireError.invalid.rawValue)
        }
        #expect(try ask(size + 512, [1]).error == WireError.invalid.rawValue)
        #expect(try ask(0, [1]).error == WireError.invalid.rawValue)
        #expect(try ask(512, [1]).status == [.init(context: 1, extents: [[512, 3]])])
    }

    @Test func aDeletedBaseIsRefused() throws {
        let server = try TestServer()
        try server.pool.change(.snapshot(origin: "alpha", name: "monday"))
        let changed = "wafer:changed-since:monday"
        do {
            let client = try FormatClient(server, .structured, contexts: [changed])
            // As long as it is compared with, it stays.
            #expect(throws: (any Error).self) {
                try server.pool.change(.delete(name: "monday"))
            }
            try client.client.disconnect()
            #expect(client.client.isHungUpOn())
        }
        #expect(eventually { (try? server.pool.change(.delete(name: "monday"))) != nil })
        let client = try FormatClient(server, .structured, contexts: [changed])
        #expect(client.contexts.isEmpty)
    }

    /// Many in flight, each of many extents: memory stays bounded, and all are answered.
    @Test func floods() throws {
        let server = try TestServer(volumes: [("alpha", 64 * mebibyte)])
        let writer = try FormatClient(server, .simple)
        for block in stride(from: 0, to: 100, by: 2) as StrideTo<UInt64> {
            try writer.write(block * blockSize, [UInt8](repeating: 1, count: 512))
        }
        let client = try FormatClient(
            server, .extended, contexts: [MetaContext.allocation, "wafer:shared"])
        var replies = ReplyStream(format: .extended)
        var requests: [UInt8] = []
        for cookie in 0..<300 as Range<UInt64> {
            replies.asked[cookie] = .init()
            requests += Client.request(
                Command.blockStatus.rawValue, cookie: cookie, length: 64 * mebibyte,
                format: .extended)
        }
        try client.client.send(requests)
        while replies.answers.count < 300 {
            try replies.append(try client.client.receiveSome())
        }
        #expect(replies.answers.values.allSatisfy { $0.status[0].extents.count == 100 })
    }
}
