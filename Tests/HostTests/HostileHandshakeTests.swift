// Attacks on the handshake: what other servers fell to, by its number, and floods.

import Foundation
import Synchronization
import Testing

@Suite struct HostileHandshakeTests {
    private typealias Raw = RawClient
    private static let volume = AttackedServer.volume

    /// Lengths that lie: around 2^31 and 2^32, where sums wrap; around what is there and what is
    /// allowed.
    private static let lies: [UInt32] = [
        0xffff_ffff, 0xffff_fffe, 0xffff_fffc, 0xffff_fffa, 0xffff_fff0, 0x8000_0000, 0x7fff_ffff,
        0x4000_0000, 0x0100_0000, 65536, 4097, 4096,
    ]

    /// A pre-shared key, and the options that make the server offer TLS.
    private static func tls(_ mode: String, in pool: Scratch) throws -> [String] {
        let path = pool.file("keys.psk")
        try "alice:00112233445566778899aabbccddeeff\n".write(
            toFile: path, atomically: true, encoding: .utf8)
        chmod(path, 0o600)
        return ["--tls=\(mode)", "--tls-psk", path]
    }

    // MARK: - Lengths

    @Test("CVE-2022-26495: a name's length that wraps, in EXPORT_NAME")
    func lengthOfExportName() throws {
        let attacked = try AttackedServer()
        for length in Self.lies where length != 4096 {
            let client = try RawClient(attacked.server)
            try client.greet()
            try client.send(Raw.option(Raw.exportName, length: length))
            #expect(client.isHungUpOn(), "length \(length)")
        }
        try attacked.finish()
    }

    @Test("CVE-2022-26496, CVE-2017-15118: names longer than their option, or than a buffer")
    func lengthsInQueries() throws {
        let attacked = try AttackedServer()
        for code in [Raw.info, Raw.go] {
            let client = try RawClient(attacked.server)
            try client.greet()
            for length in Self.lies {
                let data = bigEndianBytes(length) + Array("vol".utf8) + bigEndianBytes(UInt16(0))
                #expect(try client.ask(Raw.option(code, data)) == Raw.invalid, "length \(length)")
            }
            for count: UInt16 in [1, 0x7fff, 0x8000, 0xffff] {
                let data = Raw.string("vol") + bigEndianBytes(count)
                #expect(try client.ask(Raw.option(code, data)) == Raw.invalid, "\(count) infos")
            }
            for count in 0..<6 {
                let data = [UInt8](repeating: 0, count: count)
                #expect(try client.ask(Raw.option(code, data)) == Raw.invalid, "\(count) bytes")
            }
            for length in [1023, 1024, 4095, 4096] {
                let name = String(repeating: "n", count: length)
                let data = Raw.string(name) + bigEndianBytes(UInt16(0))
                #expect(try client.ask(Raw.option(code, data)) == Raw.unknown, "\(length) bytes")
            }
            #expect(try client.ask(Raw.go("vol")) == Raw.acknowledged)
        }
        try attacked.finish()
    }

    @Test("CVE-2022-26495: lengths and counts that lie, in context queries; 2^32 queries")
    func lengthsInContexts() throws {
        let attacked = try AttackedServer()
        let name = Raw.string("vol")
        for code in [Raw.listMetaContext, Raw.setMetaContext] {
            let client = try RawClient(attacked.server)
            try client.greet()
            #expect(try client.ask(Raw.option(Raw.structuredReply)) == Raw.acknowledged)
            for lie in Self.lies {
                for data in [
                    bigEndianBytes(lie) + Array("vol".utf8) + bigEndianBytes(UInt32(0)),
                    name + bigEndianBytes(lie),
                    name + bigEndianBytes(lie) + Raw.string("base:allocation"),
                    name + bigEndianBytes(UInt32(1)) + bigEndianBytes(lie) + Array("base:".utf8),
                ] {
                    #expect(try client.ask(Raw.option(code, data)) == Raw.invalid, "\(lie)")
                }
            }
            #expect(try client.ask(Raw.option(Raw.list)) == Raw.acknowledged)
        }
        // As many empty queries as an option has room for.
        let client = try RawClient(attacked.server)
        try client.greet()
        _ = try client.ask(Raw.option(Raw.structuredReply))
        let many = 16000
        let queries = name + bigEndianBytes(UInt32(many)) + [UInt8](repeating: 0, count: 4 * many)
        #expect(try client.ask(Raw.option(Raw.listMetaContext, queries)) == Raw.tooBig)
        #expect(try client.ask(Raw.option(Raw.setMetaContext, queries)) == Raw.tooBig)
        try attacked.finish()
    }

    @Test("CVE-2017-15119: options of gigabytes, and of a megabyte a few bytes at a time")
    func hugeOptions() throws {
        let attacked = try AttackedServer()
        let codes = [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0xffff_ffff] as [UInt32]
        for code in codes {
            for length: UInt32 in [0xffff_ffff, 0x8000_0000, 0x0200_0000] {
                let client = try RawClient(attacked.server)
                try client.greet()
                try client.send(Raw.option(code, length: length))
                #expect(client.isHungUpOn(), "option \(code) of \(length) bytes")
            }
        }
        // What is still read to its end is read without effort.
        let length = 1 << 20
        let piece = [UInt8](repeating: 0x49, count: 256)
        let client = try RawClient(attacked.server)
        try client.greet()
        let before = try attacked.processorSeconds()
        try client.send(Raw.option(Raw.go, length: UInt32(length)))
        for _ in 0..<length / piece.count { try client.send(piece) }
        #expect(try client.outcome() == Raw.tooBig)
        let took = try attacked.processorSeconds() - before
        #expect(took < AttackedServer.soon / 5, "\(took) s")
        #expect(try client.ask(Raw.go("vol")) == Raw.acknowledged)
        try attacked.finish()
    }

    // MARK: - Orders

    @Test("CVE-2019-14851: options in every order, with and without TLS", arguments: [false, true])
    func optionsInEveryOrder(offersTLS: Bool) throws {
        let scratch = try Scratch()
        let attacked = try AttackedServer(offersTLS ? Self.tls("on", in: scratch) : [])
        let queries = Raw.contexts(Raw.setMetaContext, "vol", ["base:allocation"])
        let options: [(code: UInt32, bytes: [UInt8])] = [
            (Raw.list, Raw.option(Raw.list)), (Raw.startTLS, Raw.option(Raw.startTLS)),
            (Raw.info, Raw.option(Raw.info, Raw.string("vol") + bigEndianBytes(UInt16(0)))),
            (Raw.structuredReply, Raw.option(Raw.structuredReply)),
            (Raw.setMetaContext, queries), (Raw.extendedHeaders, Raw.option(Raw.extendedHeaders)),
        ]
        let count = options.count
        for order in 0..<count * count * count {
            let sequence = [order % count, order / count % count, order / count / count]
                .map { options[$0] }
            let client = try RawClient(attacked.server)
            try client.greet()
            var format = Raw.Format.simple
            var hasContexts = false
            var isOver = false
            for option in sequence {
                let outcome = try client.ask(option.bytes)
                let comment = Comment(rawValue: "\(sequence.map(\.code))")
                switch option.code {
                case Raw.startTLS where offersTLS:
                    #expect(outcome == Raw.acknowledged, comment)
                    // In plaintext, which is no TLS.
                    try client.send(Raw.go("vol"))
                    #expect(client.isHungUpOn() || !client.receiveAll().isEmpty, comment)
                    isOver = true
                case Raw.startTLS: #expect(outcome == Raw.unsupported, comment)
                case Raw.structuredReply:
                    #expect((outcome == Raw.acknowledged) == (format != .extended), comment)
                    if format == .simple { format = .structured }
                case Raw.extendedHeaders:
                    #expect(outcome == Raw.acknowledged, comment)
                    format = .extended
                case Raw.setMetaContext:
                    hasContexts = format != .simple
                    #expect(outcome == (hasContexts ? Raw.acknowledged : Raw.invalid), comment)
                default: #expect(outcome == Raw.acknowledged, comment)
                }
                if isOver { break }
            }
            if isOver { continue }
            #expect(try client.ask(Raw.go("vol")) == Raw.acknowledged)
            #expect(try client.answer(format, to: Raw.read, length: 512).error == 0)
            let status = try client.answer(format, to: Raw.blockStatus, length: 65536)
            #expect(status.error == (hasContexts ? 0 : 22), "\(sequence.map(\.code))")
        }
        try attacked.finish()
    }

    // MARK: - Before anything is proven

    @Test("CVE-2019-14850: nothing is opened for who has proven nothing")
    func nothingIsOpenedBeforeTLS() throws {
        let scratch = try Scratch()
        let attacked = try AttackedServer(Self.tls("require", in: scratch))
        let before = try attacked.openSockets()
        let clients = try (0..<20).map { _ in try RawClient(attacked.server) }
        let asked: [[UInt8]] = [
            Raw.go("vol"), Raw.option(Raw.list), Raw.option(Raw.structuredReply),
            Raw.option(Raw.extendedHeaders),
            Raw.option(Raw.info, Raw.string("vol") + bigEndianBytes(UInt16(0))),
            Raw.contexts(Raw.setMetaContext, "vol", ["base:allocation"]),
        ]
        for client in clients {
            try client.greet()
            for option in asked { #expect(try client.ask(option) == Raw.tlsRequired) }
        }
        #expect(try attacked.pool.volumes()[0].connections == 0)
        // A descriptor for each, and nothing behind it.
        #expect(try attacked.openSockets() <= before + clients.count + 1)
        for client in clients {
            try client.send(Raw.option(Raw.exportName, Array("vol".utf8)))
            #expect(client.isHungUpOn(), "EXPORT_NAME gets past --tls=require")
        }
        try attacked.server.stop()
        #expect(!attacked.server.program.error.contains("client connected"))
        try attacked.expectNoCrash()
    }

    @Test("CVE-2019-14850: nothing is opened for who chooses nothing")
    func nothingIsOpenedBeforeGO() throws {
        let attacked = try AttackedServer()
        let clients = try (0..<20).map { _ in try RawClient(attacked.server) }
        for client in clients {
            try client.greet()
            let info = Raw.option(Raw.info, Raw.string("vol") + bigEndianBytes(UInt16(0)))
            #expect(try client.ask(info) == Raw.acknowledged)
            #expect(try client.ask(Raw.go("nobody")) == Raw.unknown)
        }
        #expect(try attacked.pool.volumes()[0].connections == 0)
        try attacked.finish()
    }

    @Test("CVE-2021-3716: STARTTLS with plaintext behind it, in one piece and in two")
    func plaintextBehindSTARTTLS() throws {
        let scratch = try Scratch()
        let attacked = try AttackedServer(Self.tls("on", in: scratch))
        let startTLS = Raw.option(Raw.startTLS)
        for behind in [Raw.option(Raw.structuredReply), Raw.go("vol"), [0x49]] {
            let client = try RawClient(attacked.server)
            _ = try client.receive(18)
            try client.send(Raw.clientFlags + startTLS + behind)
            #expect(client.isHungUpOn())
            let late = try RawClient(attacked.server)
            try late.greet()
            #expect(try late.ask(startTLS) == Raw.acknowledged)
            try late.send(behind)
            late.endSending()
            // Nothing but an alert of TLS, which begins with 21.
            #expect(late.receiveAll().first ?? 21 == 21)
        }
        try attacked.finish()
        #expect(!attacked.server.program.error.contains("client connected, peer=pid"))
    }

    @Test("EXPORT_NAME, which cannot be refused, of an export that requires TLS")
    func exportNameOfAProtectedExport() throws {
        let scratch = try Scratch()
        let options = try Self.tls("on", in: scratch) + ["--tls-require-export", "secret"]
        let attacked = try AttackedServer(
            options, volumes: [("vol", mebibyte), ("secret", mebibyte)])
        for name in ["secret", "vol"] {
            let client = try RawClient(attacked.server)
            try client.greet()
            try client.send(Raw.option(Raw.exportName, Array(name.utf8)))
            if name == "secret" {
                #expect(client.isHungUpOn())
            } else {
                #expect(Raw.word(try client.receive(10)[0..<8]) == mebibyte)
            }
        }
        try attacked.finish()
    }

    @Test("A stream that ends inside of TLS must not keep the processor busy")
    func endInsideOfTLS() throws {
        let scratch = try Scratch()
        let attacked = try AttackedServer(Self.tls("on", in: scratch))
        // The beginning of a ClientHello that announces 512 bytes.
        let hello: [UInt8] = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3] + [UInt8](0..<64)
        var clients: [RawClient] = []
        for length in [0, 1, 4, 5, 6, 11, 40, hello.count] {
            for ends in [true, false] {
                let client = try RawClient(attacked.server)
                try client.greet()
                #expect(try client.ask(Raw.option(Raw.startTLS)) == Raw.acknowledged)
                try client.send(Array(hello.prefix(length)))
                if ends { client.endSending() }
                clients.append(client)
            }
        }
        try attacked.expectRest()
        for (index, client) in clients.enumerated() where index % 2 == 0 {
            #expect(client.receiveAll().first ?? 21 == 21)
        }
        clients = []
        try attacked.finish()
    }

    @Test("A TLS client that is killed while it is served")
    func killedTLSClient() throws {
        let scratch = try Scratch()
        let options = try Self.tls("require", in: scratch)
        let attacked = try AttackedServer(options)
        let path = attacked.server.unixPath
        let uri = "nbds+unix://alice@/vol?socket=\(path)&tls-psk-file=\(options[2])"
        let tool = try #require(Program.find("nbdcopy"), "run Scripts/setup")
        for pause: UInt32 in [1000, 10_000, 30_000, 60_000, 100_000, 200_000] {
            let copy = try Program(tool, ["/dev/zero", uri], in: scratch)
            usleep(pause)
            copy.signal(SIGKILL)
            _ = copy.wait()
        }
        try attacked.expectRest()
        try attacked.expectNobody()
        try attacked.server.stop()
        try attacked.expectNoCrash()
    }

    // MARK: - Leaving

    /// What a client says until it is in transmission.
    private static let handshake =
        Raw.clientFlags + Raw.option(Raw.structuredReply) + Raw.option(Raw.list)
        + Raw.contexts(Raw.setMetaContext, "vol", ["base:allocation"]) + Raw.go("vol")

    private static func client(_ attacked: AttackedServer, _ index: Int) throws -> RawClient {
        index % 2 == 0
            ? try RawClient(attacked.server) : try RawClient(attacked.server, from: "127.0.0.1")
    }

    @Test(
        "CVE-2017-7539, CVE-2017-9524, CVE-2013-7441: leaving at every byte of the handshake",
        arguments: RawClient.Departure.allCases)
    func leavingAtEveryByte(departure: RawClient.Departure) throws {
        let attacked = try AttackedServer()
        for length in 0...Self.handshake.count {
            for way in 0..<2 {
                let client = try Self.client(attacked, way)
                try client.send(Array(Self.handshake.prefix(length)))
                client.leave(departure)
            }
        }
        try attacked.expectNobody()
        try attacked.finish()
    }

    @Test(
        "CVE-2017-7539, CVE-2017-9524: leaving at every byte of the server's answers",
        arguments: RawClient.Departure.allCases)
    func leavingAtEveryByteOfTheAnswers(departure: RawClient.Departure) throws {
        let attacked = try AttackedServer()
        let whole = try RawClient(attacked.server)
        try whole.send(Self.handshake + Raw.header(.structured, Raw.disconnect))
        let answers = whole.receiveAll().count
        #expect(answers > 200)
        for length in 0...answers {
            let client = try Self.client(attacked, length)
            try client.send(Self.handshake)
            _ = try client.receive(length)
            client.leave(departure)
        }
        try attacked.expectNobody()
        try attacked.finish()
    }

    @Test("Connections that are reset at once")
    func resetAtOnce() throws {
        let attacked = try AttackedServer()
        let sockets = try attacked.openSockets()
        for index in 0..<1000 {
            try RawClient(attacked.server, from: "127.0.0.\(1 + index % 200)").leave(.reset)
        }
        try attacked.expectSockets(sockets)
        try attacked.finish()
    }

    // MARK: - Floods

    /// Clients that have stopped at all kinds of places in the handshake.
    private static func halfOpen(_ attacked: AttackedServer, _ count: Int) throws -> [RawClient] {
        try (0..<count).map { index in
            let client = try client(attacked, index)
            // A slow server may have hung up by then, where its handshakes end soon.
            client.stuff(Array(handshake.prefix(index * 7 % (handshake.count - 1))))
            return client
        }
    }

    @Test("Hundreds that stall in the handshake, and fewer descriptors than connections")
    func fewDescriptors() throws {
        let attacked = try AttackedServer(files: 100)
        #expect(attacked.server.program.error.contains("connections at once, because"))
        for _ in 0..<3 {
            let silent = try Self.halfOpen(attacked, 300)
            try attacked.expectService()
            #expect(try attacked.pool.status().mode == "writable")
            for client in silent { client.leave() }
        }
        try attacked.finish()
    }

    @Test("CVE-2024-7409: hundreds that stall in the handshake, torn down while the server stops")
    func stoppingWithStalledHandshakes() throws {
        let scratch = try Scratch()
        let attacked = try AttackedServer(Self.tls("on", in: scratch))
        var clients = try Self.halfOpen(attacked, 300)
        for _ in 0..<50 {
            let client = try RawClient(attacked.server)
            try client.greet()
            try client.send(Raw.option(Raw.startTLS))
            clients.append(client)
        }
        try attacked.expectService()
        // More come, and go, while it stops.
        let isOver = Mutex(false)
        let churn = Workers(2) { index in
            var number = index
            while !isOver.withLock({ $0 }) {
                number += 1
                guard let client = try? Self.client(attacked, number) else { continue }
                client.stuff(Array(Self.handshake.prefix(number % Self.handshake.count)))
                client.leave(number % 3 == 0 ? .reset : .closed)
            }
        }
        let departing = Workers(1) { [clients] _ in
            for client in clients { client.leave(.reset) }
        }
        let began = Date()
        defer { isOver.withLock { $0 = true } }
        try attacked.server.stop()
        #expect(Date().timeIntervalSince(began) < AttackedServer.soon)
        isOver.withLock { $0 = true }
        try churn.join()
        try departing.join()
        try attacked.expectNoCrash()
    }

    @Test("CVE-2024-7409: hundreds that stall in the handshake, and their time is over")
    func timeoutOfStalledHandshakes() throws {
        let attacked = try AttackedServer(AttackedServer.shortHandshakes)
        let sockets = try attacked.openSockets()
        let clients = try Self.halfOpen(attacked, 300)
        try attacked.expectService()
        try attacked.expectSockets(sockets)
        for client in clients { client.leave() }
        try attacked.finish()
    }

    @Test("A byte now and then does not prolong a handshake")
    func slowBytes() throws {
        let attacked = try AttackedServer(AttackedServer.shortHandshakes)
        let clients = try (0..<50).map { try Self.client(attacked, $0) }
        let began = Date()
        for byte in Self.handshake {
            // Those that are hung up on do not take it.
            for client in clients { client.stuff([byte]) }
            // All of them take five times as long as a handshake may.
            usleep(50_000 * AttackedServer.handshakeSeconds)
            if try attacked.openSockets() < 40 { break }
        }
        #expect(Date().timeIntervalSince(began) < 4 + AttackedServer.soon)
        for client in clients { #expect(client.receiveAll().count < 400) }
        try attacked.finish()
    }

    @Test("Lists without end that nobody reads")
    func lists() throws {
        let volumes = (0..<30).map { ("a-volume-with-quite-a-long-name-\($0)", mebibyte) }
        let attacked = try AttackedServer(volumes: volumes)
        try attacked.expectService(volumes[0].0)
        let before = try attacked.residentBytes()
        let flood = (0..<1000).flatMap { _ in Raw.option(Raw.list) }
        let clients = try (0..<200).map { try Self.client(attacked, $0) }
        for client in clients { client.stuff(Raw.clientFlags + flood) }
        try attacked.expectService(volumes[0].0)
        try attacked.expectMemory(before, grownByAtMost: 32 << 20)
        // No more options than a session may have: the rest is not even received.
        let most = 18 + 64 * (20 + 30 * 150)
        for client in clients.prefix(10) {
            #expect(client.receiveAll(most: most + 1).count <= most)
        }
        try attacked.finish(volumes[0].0)
    }

    @Test("Connections come and go by the thousand: nothing of them stays")
    func churn() throws {
        let attacked = try AttackedServer()
        func round(_ count: Int) throws {
            try onThreads(4) { worker in
                for index in 0..<count / 4 {
                    let client = try Self.client(attacked, index + worker)
                    let length = index % 3 == 0 ? Self.handshake.count : index % 150
                    client.stuff(Array(Self.handshake.prefix(length)))
                    if index % 6 == 0 {
                        client.stuff(Raw.header(.structured, Raw.read, length: 65536))
                    }
                    client.leave(index % 2 == 0 ? .closed : .reset)
                }
            }
            try attacked.expectNobody()
        }
        try round(400)
        let files = try attacked.descriptorsAtRest()
        let memory = try attacked.residentBytes()
        for _ in 0..<3 { try round(AttackedServer.sanitizer == nil ? 1200 : 400) }
        // One for a connection that is not in its transmission.
        #expect(try eventually { try attacked.descriptorsAtRest() <= files + 1 })
        try attacked.expectMemory(memory, grownByAtMost: 12 << 20)
        try attacked.finish()
    }

    // MARK: - The door

    @Test("CVE-2013-6410: an address that only begins like one that may connect")
    func addressesAreNotPrefixes() throws {
        let attacked = try AttackedServer(["--allow", "127.0.0.2", "--allow", "unix"])
        for last in [1, 3, 20, 21, 22, 29, 200, 202, 254] {
            let client = try RawClient(attacked.server, from: "127.0.0.\(last)")
            #expect(client.isHungUpOn(), "127.0.0.\(last) is let in")
        }
        #expect(try RawClient(attacked.server, from: "127.0.0.2").choose("vol"))
        try attacked.finish()
    }
}
