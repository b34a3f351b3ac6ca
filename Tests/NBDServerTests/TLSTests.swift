// TLS between a client and a connection, without a socket: both versions, both kinds of proof,
// refusals, streams that are cut, changed or made up, and what must never be taken for TLS.

import CGnuTLS
import Glibc
import NBDProtocol
import Testing
import ThinPool

@testable import NBDServer

@Suite struct TLSTests {
    private static let size = 64 << 20
    private let directory = TestDirectory()
    private let pool: TestPool
    private let buffers = BufferPool(capacity: 64 << 20)

    init() throws {
        pool = try TestPool(in: directory, volumes: [("v", UInt64(Self.size))], ring: false)
    }

    private func client(
        _ credentials: TLSCredentials, policy: TLSPolicy = .require, size: Int = 1 << 20
    ) -> TLSClient {
        TLSClient(
            Connection(
                socket: -1, index: 3, generation: 1, peer: "test",
                exports: PoolExports(pool: pool.pool, settings: PoolExports.Settings()),
                buffers: buffers, tls: TLSConfiguration(credentials: credentials, policy: policy),
                tick: 0, handshakeDeadline: 1000),
            TestSink(size: size))
    }

    /// Ends what a test has begun.
    private func end(_ client: TLSClient) {
        client.connection.breakOff(nil)
        client.connection.isSending = false
        client.connection.sent(0, client.sink)
        client.pump()
        #expect(client.connection.isGone)
        #expect(buffers.inUse == 0)
    }

    // MARK: - What works

    static let proofs: [Proof] = [
        .nothing, .certificate("alice"), .key("psk", user: "alice"),
    ]

    @Test(arguments: proofs, [TLSClient.tls12, TLSClient.tls13])
    func readsWhatWasWritten(proof: Proof, version: String) throws {
        let credentials = try TestCredentials.server(psk: "psk")
        var random = SplitMix(state: 1)
        for piece in [1, 7, 4096, Int.max] {
            let client = client(credentials)
            client.piece = piece
            try client.enter(proof, version)
            let bytes = random.bytes(piece == 1 ? 20_480 : 102_400)
            #expect(try client.write(512, bytes) == 0)
            #expect(try client.read(512, bytes.count) == bytes)
            #expect(
                client.connection.tlsSummary!.hasPrefix(
                    version == TLSClient.tls12 ? "TLS1.2 " : "TLS1.3 "))
            #expect(
                client.connection.identity
                    == (proof == .key("psk", user: "alice") ? .presharedKey("alice") : .none))
            try client.send(Client.request(.disconnect, cookie: 3))
            #expect(client.hearsGoodbye())
            #expect(client.connection.problem == nil)
            end(client)
        }
    }

    @Test func longestRequestGoesThrough() throws {
        let client = client(try TestCredentials.server(), size: 34 << 20)
        try client.enter(.certificate("alice"))
        var random = SplitMix(state: 2)
        let bytes = random.bytes(32 << 20)
        #expect(try client.write(1 << 20, bytes) == 0)
        #expect(try client.read(1 << 20, bytes.count) == bytes)
        // A record takes less than 64 bytes beside its contents; one of them is not full.
        let records = TLSSession.sealLimit / 16384 + 1
        #expect(client.longestMessage <= TLSSession.sealLimit + 64 * records)
        end(client)
    }

    @Test func clientThatDoesNotReadIsNotReadEither() throws {
        let client = client(try TestCredentials.server(), size: 1 << 20)
        try client.enter(.nothing)
        client.isDeaf = true
        // Each may be sent: the wire of this test takes everything.
        for cookie in 0..<UInt64(2000) {
            try client.send(Client.request(.read, cookie: cookie, length: 65_536))
        }
        #expect(client.connection.receiveSpace() == nil)
        #expect(client.connection.transmission!.occupied <= Transmission.slotCount)
        #expect(client.toServer.count > 64 << 10)
        client.isDeaf = false
        client.connection.isSending = false
        for _ in 0..<2000 { _ = try client.receive(16 + 65_536) }
        #expect(client.connection.transmission!.occupied == 0)
        end(client)
    }

    @Test func keysAreRenewed() throws {
        let client = client(try TestCredentials.server())
        try client.enter(.nothing)
        for round in UInt8(1)...5 {
            try client.renewKeys()
            #expect(try client.write(0, [UInt8](repeating: round, count: 4096)) == 0)
            #expect(try client.read(0, 4096).allSatisfy { $0 == round })
        }
        end(client)
    }

    @Test func verifiedNameIsKnown() throws {
        let credentials = try TestCredentials.server {
            $0.verifiesClients = true
            $0.allowedNames = ["CN=carol,O=Example", "CN=*,O=Example"]
        }
        for version in [TLSClient.tls12, TLSClient.tls13] {
            let client = client(credentials)
            try client.enter(.certificate("alice"), version)
            #expect(client.connection.identity == .certificate("CN=alice,O=Example"))
            end(client)
        }
    }

    @Test func certificateWithoutANameIsOne() throws {
        for version in [TLSClient.tls12, TLSClient.tls13] {
            let client = client(try TestCredentials.server { $0.verifiesClients = true })
            try client.enter(.certificate("nameless"), version)
            #expect(client.connection.identity == .certificate(""))
            #expect("\(client.connection.identity)" == "(no name)")
            end(client)
        }
        let credentials = try TestCredentials.server {
            $0.verifiesClients = true
            $0.allowedNames = ["CN=*"]
        }
        let client = client(credentials)
        #expect(throws: ClientError.self) { try client.enter(.certificate("nameless")) }
        client.hangUp()
        #expect(client.connection.problem?.hasSuffix("that are let in: (no name)") == true)
    }

    @Test func usersMayHaveColons() throws {
        let client = client(try TestCredentials.server(psk: "colon"))
        try client.enter(.key("colon", user: "al:ice"))
        #expect(client.connection.identity == .presharedKey("al:ice"))
        end(client)
    }

    // MARK: - Who is turned away

    struct Refusal: Sendable, CustomStringConvertible {
        var proof: Proof
        var directory = "server"
        var names: [String] = []
        var description: String { "\(proof) by \(directory) \(names)" }
    }

    @Test(
        arguments: [
            Refusal(proof: .nothing), Refusal(proof: .certificate("stranger")),
            Refusal(proof: .certificate("distrustful")),
            Refusal(proof: .certificate("bob"), directory: "revoking"),
            Refusal(proof: .certificate("bob"), directory: "renewed"),
            Refusal(proof: .certificate("carol"), directory: "renewed"),
            Refusal(proof: .certificate("bob"), names: ["CN=alice,O=Example", "CN=b*,O=Example"]),
            Refusal(proof: .key("wrong", user: "alice")), Refusal(proof: .key("psk", user: "eve")),
        ], [TLSClient.tls12, TLSClient.tls13])
    func turnsAway(refusal: Refusal, version: String) throws {
        let credentials = try TestCredentials.server(refusal.directory, psk: "psk") {
            $0.verifiesClients = true
            $0.allowedNames = refusal.names
        }
        let client = client(credentials)
        // In TLS 1.3 a client learns only with the first answer that it was refused.
        #expect(throws: ClientError.self) { try client.enter(refusal.proof, version) }
        client.hangUp()
        #expect(client.connection.phase == .closed)
        #expect(client.connection.transmission == nil)
        #expect(client.connection.problem?.hasPrefix("TLS handshake failed: ") == true)
        #expect(client.connection.isGone)
    }

    @Test(arguments: ["revoking", "renewed"])
    func othersOfTheSameAuthorityComeIn(directory: String) throws {
        let credentials = try TestCredentials.server(directory) { $0.verifiesClients = true }
        let client = client(credentials)
        try client.enter(.certificate("alice"))
        end(client)
    }

    /// Its list is for two days.
    @Test func nobodyComesInByAnOutdatedList() throws {
        let day: time_t = 24 * 3600
        let early = client(
            try TestCredentials.server("revoking", later: day) { $0.verifiesClients = true })
        try early.enter(.certificate("alice"))
        end(early)
        let credentials = try TestCredentials.server("revoking", psk: "psk", later: 3 * day) {
            $0.verifiesClients = true
        }
        let late = client(credentials)
        #expect(throws: ClientError.self) { try late.enter(.certificate("alice")) }
        late.hangUp()
        #expect(late.connection.problem?.contains("ca-crl.pem was to be renewed by ") == true)
        #expect(late.connection.isGone)
        // Keys are not on it.
        let keyed = client(credentials)
        try keyed.enter(.key("psk", user: "alice"))
        end(keyed)
    }

    @Test func oldVersionsAreRefused() throws {
        let client = client(try TestCredentials.server())
        try client.startTLS()
        #expect(throws: ClientError.self) {
            try client.handshake(.nothing, "NORMAL:-VERS-ALL:+VERS-TLS1.1")
        }
        client.hangUp()
        #expect(client.connection.isGone)
    }

    // MARK: - Around the handshake

    @Test func plaintextBehindSTARTTLSEndsTheConnection() throws {
        let client = client(try TestCredentials.server(), policy: .on)
        _ = try client.receivePlain(18)
        client.sendPlain(
            bigEndianBytes(UInt32(3)) + TLSClient.option(5) + TLSClient.option(3))
        #expect(client.unread == 0)
        #expect(client.connection.isGone)
        #expect(client.connection.problem?.contains("plaintext") == true)
    }

    @Test func plaintextAfterTheAnswerEndsTheConnection() throws {
        let client = client(try TestCredentials.server(), policy: .on)
        try client.startTLS()
        client.sendPlain(TLSClient.go("v"))
        #expect(client.connection.isGone)
        #expect(client.connection.transmission == nil)
    }

    @Test func startTLSAgainIsInvalid() throws {
        let client = client(try TestCredentials.server())
        try client.startTLS()
        try client.handshake(.nothing)
        try client.send(TLSClient.option(5))
        let reply = try client.receive(20)
        #expect(bigEndian(reply, 12, as: UInt32.self) == 1 << 31 | 3)
        end(client)
    }

    @Test func endAnywhereInTheHandshake() throws {
        for version in [TLSClient.tls12, TLSClient.tls13] {
            let credentials = try TestCredentials.server { $0.verifiesClients = true }
            let whole = client(credentials)
            try whole.startTLS()
            let start = whole.delivered
            try whole.handshake(.certificate("alice"), version)
            let length = whole.delivered
            end(whole)
            for cut in start...length {
                let client = client(credentials)
                try client.startTLS()
                client.cut = cut
                _ = try? client.handshake(.certificate("alice"), version)
                client.hangUp()  // signatures differ in length: this one may have been shorter
                #expect(client.connection.isGone, "at \(cut) of \(length)")
                #expect(client.connection.transmission == nil)
            }
        }
    }

    @Test func garbageEndsTheConnection() throws {
        let credentials = try TestCredentials.server(psk: "psk")
        for seed in UInt64(0)..<300 {
            var random = SplitMix(state: seed)
            let client = client(credentials)
            try client.startTLS()
            var bytes = random.bytes(2000)
            // Some of it looks like records: handshake, alert, data.
            if seed % 3 > 0 {
                bytes.replaceSubrange(0..<5, with: [22, 3, 3, 0, UInt8(seed % 256)])
            }
            if seed % 3 > 1 { bytes.replaceSubrange(5..<9, with: [1, 0, 0, UInt8(seed % 256)]) }
            client.sendPlain(bytes)
            client.hangUp()
            #expect(client.connection.isGone)
        }
    }

    @Test func changedCiphertextIsNotTakenForRequests() throws {
        let credentials = try TestCredentials.server()
        for (seed, version) in (0..<40).map({
            ($0, $0 % 2 == 0 ? TLSClient.tls12 : TLSClient.tls13)
        }) {
            let client = client(credentials)
            try client.enter(.nothing, version)
            client.isHeld = true
            let pattern = [UInt8](repeating: 0xAB, count: 4096)
            _ = try? client.write(0, pattern)
            var random = SplitMix(state: UInt64(seed))
            let place = Int(random.next() % UInt64(client.toServer.count))
            client.toServer[place] ^= UInt8(1 << (random.next() % 8))
            client.isHeld = false
            client.hangUp()
            #expect(client.connection.isGone)
            #expect(client.connection.problem != nil)
            #expect(client.sink.image.allSatisfy { $0 == 0 })
        }
    }

    // MARK: - The end of the stream

    @Test(arguments: [true, false]) func clientMayLeaveBetweenRequests(saysGoodbye: Bool) throws {
        let client = client(try TestCredentials.server())
        try client.enter(.nothing)
        _ = try client.write(0, [UInt8](repeating: 1, count: 512))
        if saysGoodbye { client.sayGoodbye() } else { client.hangUp() }
        #expect(client.connection.problem == nil)
        #expect(client.hearsGoodbye())
        #expect(client.connection.isGone)
    }

    @Test(arguments: [true, false]) func cutInsideARequestIsSaid(saysGoodbye: Bool) throws {
        let client = client(try TestCredentials.server())
        try client.enter(.nothing)
        try client.send(Client.request(.write, cookie: 1, length: 4096) + [1, 2, 3])
        if saysGoodbye { client.sayGoodbye() } else { client.hangUp() }
        #expect(client.connection.problem == "the client left in the middle of a request")
        #expect(client.connection.isGone)
        #expect(buffers.inUse == 0)
    }

    /// GnuTLS encrypts nothing more then.
    @Test(arguments: [TLSClient.tls12, TLSClient.tls13])
    func endWithoutGoodbyeBeforeAReplyIsNoError(version: String) throws {
        let client = client(try TestCredentials.server())
        try client.enter(.nothing, version)
        client.isDeaf = true
        for cookie in UInt64(1)...2 {
            try client.send(Client.request(.read, cookie: cookie, length: 4096))
        }
        client.hangUp()
        #expect(client.connection.phase == .draining)
        client.isDeaf = false
        client.connection.isSending = false
        client.pump()
        #expect(client.connection.problem == nil)
        #expect(client.connection.isGone)
        #expect(buffers.inUse == 0)
    }

    @Test func negotiatingAnewIsRefused() throws {
        let client = client(try TestCredentials.server())
        try client.enter(.nothing, TLSClient.tls12)
        #expect(throws: ClientError.self) { try client.handshake(.nothing) }
        #expect(client.connection.problem?.contains("anew") == true)
        #expect(client.connection.isGone)
    }

    @Test func stoppedServerSaysGoodbye() throws {
        let client = client(try TestCredentials.server())
        try client.enter(.nothing)
        client.connection.stop()
        client.pump()
        #expect(client.hearsGoodbye())
        #expect(client.connection.isGone)
    }
}
