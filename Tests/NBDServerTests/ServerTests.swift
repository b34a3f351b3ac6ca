// The server as clients see it, over real sockets, with both kinds of queue.

import Glibc
import Logging
import NBDProtocol
import NBDServer
import Synchronization
import Testing
import ThinPool

@Suite(.serialized) struct ServerTests {
    @Test(arguments: [true, false]) func readsWhatWasWritten(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let client = try Client(unix: server.socketPath, export: "alpha")
        #expect(client.size == 64 * mebibyte)
        #expect(client.flags.contains([.hasFlags, .sendFlush, .sendFUA, .sendTrim]))
        #expect(!client.flags.contains(.readOnly))
        var random = SplitMix(state: 1)
        for length in [512, 4096, 12_800, 131_072, 1_000_448, 32 << 20] {
            let bytes = random.bytes(length)
            #expect(try client.write(512, bytes) == .none)
            #expect(try client.read(512, UInt32(length)) == bytes)
        }
        #expect(try client.simple(.flush) == .none)
        #expect(try client.write(0, random.bytes(4096), flags: .fua) == .none)
        #expect(try client.simple(.cache, 0, 1 << 20) == .none)
        #expect(try client.simple(.writeZeroes, 4096, 1 << 20, flags: [.fua, .noHole]) == .none)
        #expect(try client.read(4096, 1 << 20).allSatisfy { $0 == 0 })
        #expect(try client.simple(.trim, 0, UInt32(64 * mebibyte)) == .none)
        try client.disconnect()
        #expect(client.isHungUpOn())
        #expect(eventually { server.log.has(.info, "client disconnected") })
        #expect(server.log.has(.info, "client connected"))
        #expect(server.log.all(.warning) == [])
    }

    @Test(arguments: [true, false]) func refusalsLeaveTheConnectionInStep(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let client = try Client(unix: server.socketPath, export: "alpha")
        let size = client.size
        let block = [UInt8](repeating: 7, count: 4096)
        #expect(try client.write(size - 512, block) == .noSpace)
        #expect(try client.write(size, [UInt8](repeating: 1, count: 100_000)) == .noSpace)
        #expect(try client.write(.max - 4095, block) == .noSpace)
        #expect(try client.write(1, block) == .invalid)
        #expect(try client.write(0, Array(block.dropLast())) == .invalid)
        #expect(try client.write(0, block, flags: .noHole) == .invalid)
        #expect(try client.write(0, [UInt8](repeating: 1, count: 32 << 20 | 512)) == .invalid)
        #expect(try client.simple(.read, size, 512) == .invalid)
        #expect(try client.simple(.read, 0, 0xFFFF_FFFF) == .invalid)
        #expect(try client.simple(.read, 0, 32 << 20 | 512) == .invalid)
        #expect(try client.simple(.read, 0, 4096, flags: .dontFragment) == .invalid)
        #expect(try client.simple(.flush, 512) == .invalid)
        #expect(try client.simple(.trim, size - 512, 1024) == .invalid)
        #expect(try client.simple(.writeZeroes, size - 512, 1024) == .noSpace)
        try client.send(Client.request(77, cookie: 5, offset: 1, length: 2))
        #expect(try client.receiveReply() == (.invalid, 5))
        #expect(try client.simple(.read, 0, 0) == .none)
        #expect(try client.write(0, []) == .none)
        #expect(try client.simple(.trim, 0, 0) == .none)
        #expect(try client.read(0, 4096).allSatisfy { $0 == 0 })
        #expect(server.log.all(.warning).count == 1)
    }

    @Test func readOnly() throws {
        let server = try TestServer { $0.readOnly = true }
        let client = try Client(unix: server.socketPath, export: "alpha")
        #expect(client.flags.contains(.readOnly))
        #expect(try client.write(0, [UInt8](repeating: 1, count: 1 << 20)) == .notPermitted)
        #expect(try client.simple(.trim, 0, 4096) == .notPermitted)
        #expect(try client.simple(.writeZeroes, 0, 4096) == .notPermitted)
        #expect(try client.read(0, 1 << 20).allSatisfy { $0 == 0 })
        #expect(try client.simple(.flush) == .none)
    }

    @Test func aFailedPoolIsReadOnlyForWhoComes() throws {
        let server = try TestServer()
        let early = try Client(unix: server.socketPath, export: "alpha")
        let bytes = [UInt8](repeating: 1, count: 4096)
        #expect(try early.write(0, bytes) == .none)
        let flushed = try server.pool.withBrokenData { try early.simple(.flush) }
        #expect(flushed == .inputOutput)
        #expect(!early.flags.contains(.readOnly))
        #expect(try early.write(0, bytes) == .inputOutput)
        let late = try Client(unix: server.socketPath, export: "alpha")
        #expect(late.flags.contains(.readOnly))
        #expect(try late.write(0, bytes) == .notPermitted)
        #expect(try late.read(0, 4096).count == 4096)
    }

    /// A client that comes back is let in only when nothing of its last connection is under way, or
    /// an old write could undo what it writes next. However long that takes: the client is not slow.
    @Test(arguments: [true, false]) func aFencedVolumeIsOpenedWhenTheFenceIsGone(ring: Bool) throws
    {
        let server = try TestServer(ring: ring) { $0.limits.handshakeTimeout = .milliseconds(400) }
        let volume = try #require(server.pool.pool.open(exportNamed: "alpha"))
        defer { server.pool.pool.close(volume) }
        volume.addFence()
        let isIn = Mutex(false)
        let path = server.socketPath
        let coming = TestThread {
            guard let client = try? Client(unix: path, export: "alpha"),
                (try? client.simple(.flush)) == WireError.none
            else { return }
            isIn.withLock { $0 = true }
        }
        // Another volume's clients, and this one's that are in already, are not concerned.
        #expect(!eventually(within: 2) { isIn.withLock { $0 } })
        server.pool.pool.removeFence(of: volume)
        #expect(eventually { isIn.withLock { $0 } })
        coming.join()
    }

    @Test func whoLeftWithWritesUnderWayComesBack() throws {
        let server = try TestServer()
        var random = SplitMix(state: 9)
        for round in 0..<20 {
            let client = try Client(unix: server.socketPath, export: "alpha")
            for block in UInt64(0)..<32 {
                let bytes = random.bytes(4096)
                try client.send(
                    Client.request(
                        Command.write, cookie: block,
                        offset: (UInt64(round) * 32 + block) * 65_536, length: 4096, flags: .fua)
                        + bytes)
            }
            client.reset()
        }
        let client = try Client(unix: server.socketPath, export: "alpha")
        #expect(try client.simple(.flush) == .none)
    }

    @Test func listAndDefaultExport() throws {
        let many = try TestServer(volumes: [("alpha", mebibyte), ("beta", mebibyte)])
        let client = try Client(unix: many.socketPath)
        try client.greet()
        let listed = try client.list()
        #expect(listed.map(\.name) == ["alpha", "beta"])
        // What INFO says, too.
        #expect(listed.map(\.description).allSatisfy { $0 == "thin volume, data blocks of 64 KiB" })
        #expect(throws: ClientError.self) { try Client(unix: many.socketPath, export: "") }
        #expect(throws: ClientError.self) { try Client(unix: many.socketPath, export: "gamma") }
        let one = try TestServer()
        #expect(try Client(unix: one.socketPath, export: "").size == 64 * mebibyte)
    }

    /// Many requests at once, answered in any order, on overlapping connections: each read sees
    /// what was written to its place before.
    @Test(arguments: [true, false]) func deepQueues(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let clients = try (0..<4).map { _ in try Client(unix: server.socketPath, export: "alpha") }
        var random = SplitMix(state: 2)
        let blockSize = 16_384
        for round in 0..<6 {
            let client = clients[round % clients.count]
            var stream: [UInt8] = []
            var written: [[UInt8]] = []
            for index in 0..<200 {
                let bytes = random.bytes(blockSize)
                stream += Client.request(
                    .write, cookie: UInt64(index), offset: UInt64(index * blockSize),
                    length: UInt32(blockSize))
                stream += bytes
                written.append(bytes)
            }
            try client.send(stream)
            var answered = Set<UInt64>()
            for _ in 0..<200 {
                let reply = try client.receiveReply()
                #expect(reply.error == .none)
                answered.insert(reply.cookie)
            }
            #expect(answered.count == 200)
            let reader = clients[(round + 1) % clients.count]
            try reader.send(
                (0..<200).flatMap {
                    Client.request(
                        .read, cookie: UInt64($0), offset: UInt64($0 * blockSize),
                        length: UInt32(blockSize))
                })
            for _ in 0..<200 {
                let reply = try reader.receiveReply()
                #expect(reply.error == .none)
                #expect(try reader.receive(blockSize) == written[Int(reply.cookie)])
            }
        }
    }

    @Test(arguments: [true, false]) func disconnectFinishesWhatIsInFlight(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let client = try Client(unix: server.socketPath, export: "alpha")
        let bytes = [UInt8](repeating: 0x5A, count: 1 << 20)
        var stream: [UInt8] = []
        for index in 0..<UInt64(8) {
            stream +=
                Client.request(
                    .write, cookie: index, offset: index << 20, length: 1 << 20) + bytes
        }
        try client.send(stream + Client.request(.disconnect, cookie: 0))
        for _ in 0..<8 { #expect(try client.receiveReply().error == .none) }
        #expect(client.isHungUpOn())
        let other = try Client(unix: server.socketPath, export: "alpha")
        #expect(try other.read(7 << 20, 1 << 20) == bytes)
        #expect(server.log.all(.warning) == [])
    }

    @Test(arguments: [true, false]) func halfClosedClientsGetTheirReplies(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let client = try Client(unix: server.socketPath, export: "alpha")
        try client.send(
            (0..<UInt64(50)).flatMap {
                Client.request(.read, cookie: $0, offset: $0 << 16, length: 1 << 16)
            })
        shutdown(client.socket, Int32(SHUT_WR))
        for _ in 0..<50 {
            #expect(try client.receiveReply().error == .none)
            _ = try client.receive(1 << 16)
        }
        #expect(client.isHungUpOn())
    }

    @Test(arguments: [true, false]) func clientsThatVanish(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let before = openSockets(server.socketPath)
        for round in 0..<300 {
            let client = try Client(unix: server.socketPath, export: "alpha")
            var stream: [UInt8] = []
            for index in 0..<UInt64(64) {
                stream += Client.request(.read, cookie: index, offset: index << 16, length: 1 << 16)
            }
            let write =
                Client.request(.write, cookie: 99, length: 1 << 20)
                + [UInt8](repeating: 3, count: 1 << 20)
            stream += write[..<(28 + (round * 7919) % (1 << 20))]
            // What the server does not take is of no interest.
            _ = stream.withUnsafeBytes {
                Glibc.send(
                    client.socket, $0.baseAddress!, $0.count,
                    Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL))
            }
            if round % 3 == 0 { client.reset() }
        }
        #expect(eventually { openSockets(server.socketPath) == before })
        let client = try Client(unix: server.socketPath, export: "alpha")
        #expect(try client.read(0, 4096).count == 4096)
    }

    @Test(arguments: [true, false]) func leavingAfterEveryByteOfTheHandshake(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let before = openSockets(server.socketPath)
        let name = Array("alpha".utf8)
        let data = bigEndianBytes(UInt32(name.count)) + name + bigEndianBytes(UInt16(0))
        let bytes =
            bigEndianBytes(UInt32(3)) + bigEndianBytes(Magic.option)
            + bigEndianBytes(OptionCode.go.rawValue) + bigEndianBytes(UInt32(data.count)) + data
            + Client.request(.read, cookie: 1, length: 512)
        for end in 0...bytes.count {
            let client = try Client(unix: server.socketPath)
            if end > 0 { try client.send(Array(bytes[..<end])) }
            if end % 2 == 0 { _ = try client.receive(18) }
        }
        #expect(eventually { openSockets(server.socketPath) == before })
        #expect(try Client(unix: server.socketPath, export: "alpha").read(0, 512).count == 512)
    }

    @Test func nonsenseIsHungUpOn() throws {
        let server = try TestServer()
        let other = try Client(unix: server.socketPath, export: "alpha")
        for text in [
            "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}",
        ] {
            let client = try Client(unix: server.socketPath)
            try client.send(Array(text.utf8))
            #expect(client.isHungUpOn())
        }
        let client = try Client(unix: server.socketPath, export: "alpha")
        try client.send([UInt8](repeating: 0x41, count: 28))
        #expect(client.isHungUpOn())
        let late = try Client(unix: server.socketPath, export: "alpha")
        try late.send(
            Client.request(.read, cookie: 1, length: 512) + [UInt8](repeating: 0x41, count: 28))
        #expect(late.isHungUpOn())
        #expect(try other.read(0, 512).count == 512)
        #expect(server.log.has(.warning, "magic"))
        for _ in 0..<1000 { _ = try Client(unix: server.socketPath) }
        #expect(try other.read(0, 512).count == 512)
    }

    @Test func halfOpenHandshakesAreEnded() throws {
        let server = try TestServer {
            $0.limits.connections = 20
            $0.limits.handshakeTimeout = .seconds(1)
        }
        let early = try Client(unix: server.socketPath, export: "alpha")
        let silent = try (0..<24).map { _ in try Client(unix: server.socketPath) }
        // Places are for who comes: the first have none any more.
        #expect(silent.first!.isHungUpOn())
        #expect(server.log.has(.warning, "too many connections"))
        let others = try (0..<3).map { _ in try Client(unix: server.socketPath, export: "alpha") }
        #expect(silent.last!.isHungUpOn())
        #expect(server.log.has(.warning, "the handshake took too long"))
        for client in others + [early] { #expect(try client.read(0, 512).count == 512) }
    }

    @Test func connectionsAreCounted() throws {
        let server = try TestServer(volumes: [("alpha", mebibyte), ("beta", mebibyte)]) {
            $0.limits.connections = 8
            $0.limits.connectionsToExport = 6
        }
        // Every way to go, many times: each gives its place back.
        for _ in 0..<30 {
            let left = try Client(unix: server.socketPath, export: "alpha")
            try left.disconnect()
            let gone = try Client(unix: server.socketPath, export: "alpha")
            gone.reset()
            let bad = try Client(unix: server.socketPath, export: "alpha")
            try bad.send([UInt8](repeating: 0x41, count: 28))
            #expect(bad.isHungUpOn())
            let silent = try Client(unix: server.socketPath)
            silent.reset()
            #expect(throws: ClientError.self) { try Client(unix: server.socketPath, export: "x") }
        }
        func openAll() -> [Client]? {
            let alphas = (0..<6).compactMap { _ in
                try? Client(unix: server.socketPath, export: "alpha")
            }
            let betas = (0..<2).compactMap { _ in
                try? Client(unix: server.socketPath, export: "beta")
            }
            return alphas.count == 6 && betas.count == 2 ? alphas + betas : nil
        }
        var clients: [Client]?
        #expect(
            eventually {
                clients = openAll()
                return clients != nil
            })
        #expect(throws: ClientError.self) { try Client(unix: server.socketPath, export: "alpha") }
        #expect(server.log.has(.warning, "8 connections are open"))
        try clients?.last?.disconnect()
        // There is room, but not at this export.
        #expect(
            eventually { (try? Client(unix: server.socketPath, export: "beta")) != nil })
        #expect(
            eventually {
                let failure = #expect(throws: ClientError.self) {
                    try Client(unix: server.socketPath, export: "alpha")
                }
                return failure?.description.contains("GO refused") == true
            })
    }

    @Test func idleConnectionsAreEnded() throws {
        let server = try TestServer { $0.limits.idleTimeout = .milliseconds(400) }
        let idle = try Client(unix: server.socketPath, export: "alpha")
        let busy = try Client(unix: server.socketPath, export: "alpha")
        for _ in 0..<30 {
            #expect(try busy.read(0, 512).count == 512)
            usleep(50_000)
        }
        #expect(idle.isHungUpOn())
        #expect(try busy.read(0, 512).count == 512)
        #expect(server.log.all(.warning).count == 1)
        #expect(server.log.has(.warning, "idle"))
    }

    @Test(arguments: [true, false]) func inheritedSocketsOutliveTheServer(ring: Bool) throws {
        let directory = TestDirectory()
        let path = directory.path + "/inherited"
        let listener = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(listener) }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                #expect(bind(listener, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) == 0)
            }
        }
        let early = #expect(throws: ServerError.self) {
            try TestServer(ring: ring) { $0.listening.sockets = [listener] }
        }
        #expect(early?.description.contains("does not listen") == true)
        #expect(listen(listener, 5) == 0)
        for _ in 0..<3 {
            // One comes before its server.
            let waiting = try Client(unix: path)
            let server = try TestServer(ring: ring) { $0.listening.sockets = [listener] }
            #expect(server.uris.last == "nbd+unix:///?socket=\(path)")
            try waiting.negotiate("alpha")
            #expect(try Client(unix: path, export: "alpha").read(0, 512).count == 512)
            server.server.stop()
            #expect(waiting.isHungUpOn())
        }
        #expect(access(path, F_OK) == 0)
    }

    @Test func inheritedSocketsAreLookedAt() throws {
        let datagrams = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue), 0)
        defer { close(datagrams) }
        var ends: [Int32] = [-1, -1]
        #expect(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        defer { for end in ends { close(end) } }
        let file = open("/dev/null", O_RDWR)
        defer { close(file) }
        for (descriptor, words) in [
            (datagrams, "stream"), (ends[0], "does not listen"), (file, "not a Unix or TCP socket"),
        ] {
            let failure = #expect(throws: ServerError.self) {
                try TestServer { $0.listening.sockets = [descriptor] }
            }
            #expect(failure?.description.contains(words) == true, "\(failure as Any)")
        }
    }

    @Test func aConnectedSocketIsServedAndItsEndTold() throws {
        for rules in [[], [try AccessRule(.deny, "unix")]] {
            var ends: [Int32] = [-1, -1]
            #expect(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
            let given = ends[1]
            let ended = Mutex(false)
            let server = try TestServer {
                $0.listening.connectedSocket = given
                $0.rules = rules
                $0.listening.onConnectedEnd = { ended.withLock { $0 = true } }
            }
            let client = Client(connected: ends[0])
            if rules.isEmpty {
                try client.negotiate("alpha")
                // Others come and go.
                try Client(unix: server.socketPath, export: "alpha").disconnect()
                #expect(try client.read(0, 512).count == 512)
                #expect(!ended.withLock { $0 })
                try client.disconnect()
            }
            #expect(client.isHungUpOn())
            #expect(eventually { ended.withLock { $0 } })
        }
    }

    @Test func refusedClientsAreHungUpOnAtOnce() throws {
        let server = try TestServer {
            $0.listening.tcpAddresses = [("127.0.0.1", 0)]
            $0.rules = try! [AccessRule(.deny, "unix")]
        }
        // Not one byte, and not a line of the log for each.
        for _ in 0..<200 { #expect(try Client(unix: server.socketPath).isHungUpOn()) }
        let lines = server.log.all(.warning).filter { $0.contains("the rules do not let it in") }
        #expect((1...50).contains(lines.count), "\(lines.count)")
        #expect(lines[0].contains("uid \(getuid())"))
        let client = try Client(tcp: UInt16(server.uris[1].split(separator: ":").last!)!)
        try client.negotiate("alpha")
        #expect(try client.read(0, 512).count == 512)
    }

    @Test func someClientsMayOnlyRead() throws {
        let server = try TestServer {
            $0.listening.tcpAddresses = [("127.0.0.1", 0)]
            $0.rules = try! [AccessRule(.allowReadOnly, "tcp"), AccessRule(.allow, "unix")]
        }
        let writer = try Client(unix: server.socketPath, export: "alpha")
        let reader = try Client(tcp: UInt16(server.uris[1].split(separator: ":").last!)!)
        try reader.negotiate("alpha")
        #expect(reader.flags.contains(.readOnly) && !writer.flags.contains(.readOnly))
        let bytes = [UInt8](repeating: 7, count: 4096)
        #expect(try writer.write(0, bytes) == .none)
        #expect(try reader.write(0, bytes) == .notPermitted)
        #expect(try reader.read(0, 4096) == bytes)
    }

    @Test func modesOfSockets() throws {
        for mode: UInt32 in [0o600, 0o660, 0o666, 0o000] {
            let server = try TestServer { $0.listening.unixAccess.mode = mode }
            var status = stat()
            #expect(stat(server.socketPath, &status) == 0)
            #expect(UInt32(status.st_mode & 0o777) == mode)
        }
        if geteuid() == 0 {
            let server = try TestServer {
                $0.listening.unixAccess.user = 12
                $0.listening.unixAccess.group = 34
            }
            var status = stat()
            #expect(stat(server.socketPath, &status) == 0)
            #expect(status.st_uid == 12 && status.st_gid == 34)
        }
    }

    /// Of servers that find the same left-over socket at the same time one gets it, and is found.
    @Test func oneOfManyServersGetsASocket() throws {
        let directory = TestDirectory()
        let path = directory.path + "/shared.sock"
        for _ in 0..<10 {
            let stale = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
            var address = sockaddr_un()
            address.sun_family = sa_family_t(AF_UNIX)
            withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
            withUnsafePointer(to: &address) {
                $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    #expect(bind(stale, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) == 0)
                }
            }
            close(stale)
            let counts = Mutex((tried: 0, won: 0, isOver: false))
            let threads = (0..<4).map { _ in
                TestThread {
                    let server = try? TestServer { $0.listening.unixPaths = [path] }
                    counts.withLock {
                        $0.tried += 1
                        if server != nil { $0.won += 1 }
                    }
                    _ = eventually(within: 20) { counts.withLock { $0.isOver } }
                    server?.server.stop()
                }
            }
            #expect(eventually(within: 20) { counts.withLock { $0.tried } == 4 })
            #expect(counts.withLock { $0.won } == 1)
            #expect((try? Client(unix: path, export: "alpha")) != nil)
            counts.withLock { $0.isOver = true }
            for thread in threads { thread.join() }
            #expect(access(path, F_OK) != 0)
        }
    }

    /// A client that never reads is not read any more, and costs bounded memory.
    @Test(arguments: [true, false]) func repliesThatNobodyReads(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let residentBefore = residentBytes()
        let rude = try Client(unix: server.socketPath, export: "alpha", timeout: 1)
        let requests = (0..<UInt64(64)).flatMap {
            Client.request(.read, cookie: $0, length: 1 << 20)
        }
        var sent = 0
        for _ in 0..<2000 {
            let result = requests.withUnsafeBytes {
                Glibc.send(
                    rude.socket, $0.baseAddress!, $0.count,
                    Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL))
            }
            if result <= 0 { break }
            sent += result
        }
        #expect(sent < 2000 * requests.count)
        let other = try Client(unix: server.socketPath, export: "alpha")
        for _ in 0..<50 { #expect(try other.read(0, 1 << 20).count == 1 << 20) }
        #expect(residentBytes() - residentBefore < 64 << 20)
    }

    /// All memory is held by clients that do not move; they are ended, and the others are served:
    /// those with small requests all the time.
    @Test(arguments: [true, false], [4096, 256 << 10])
    func memoryIsTakenFromThoseWhoHoardIt(ring: Bool, length: UInt32) throws {
        let server = try TestServer(ring: ring) {
            $0.reactors = 1
            $0.limits.payloadBytes = 64 << 20
            $0.limits.stallTimeout = .milliseconds(300)
        }
        let patient = try Client(unix: server.socketPath, export: "alpha")
        #expect(try patient.read(0, length).count == length)
        let hoarders = try (0..<2).map { _ in try Client(unix: server.socketPath, export: "alpha") }
        for hoarder in hoarders {
            try hoarder.send(Client.request(.write, cookie: 1, length: 32 << 20) + [1, 2, 3])
        }
        usleep(100_000)
        for _ in 0..<100 {
            #expect(try patient.read(0, length).count == length)
            usleep(10_000)
        }
        #expect(hoarders.contains { $0.isHungUpOn() })
        #expect(server.log.has(.warning, "holds memory"))
    }

    /// More payload is asked for than there is memory: everybody gets through, in turn.
    @Test(arguments: [true, false]) func memoryIsShared(ring: Bool) throws {
        let server = try TestServer(ring: ring) {
            $0.reactors = 1
            $0.limits.payloadBytes = 32 << 20
        }
        let clients = try (0..<6).map { _ in
            try Client(unix: server.socketPath, export: "alpha")
        }
        let bytes = [UInt8](repeating: 9, count: 8 << 20)
        // Each client's first half of a write, so that all of them hold something.
        let write = Client.request(.write, cookie: 3, length: 8 << 20) + bytes
        let reads = (0..<UInt64(8)).flatMap {
            Client.request(.read, cookie: $0 + 10, offset: $0 << 20, length: 4 << 20)
        }
        for client in clients { try client.send(Array(write[..<100])) }
        var senders: [TestThread] = []
        for client in clients {
            let socket = client.socket
            let rest = Array(write[100...]) + reads
            senders.append(
                TestThread {
                    var sent = 0
                    while sent < rest.count {
                        let result = rest.withUnsafeBytes {
                            Glibc.send(
                                socket, $0.baseAddress! + sent, $0.count - sent,
                                Int32(MSG_NOSIGNAL))
                        }
                        if result <= 0 { break }
                        sent += result
                    }
                })
        }
        let answered = Atomic<Int>(0)
        let unowned = clients.map { Unmanaged.passUnretained($0).toOpaque() }
            .map { UInt(bitPattern: $0) }
        let readers = unowned.map { address in
            TestThread {
                let client = Unmanaged<Client>.fromOpaque(UnsafeRawPointer(bitPattern: address)!)
                    .takeUnretainedValue()
                var cookies = Set<UInt64>()
                while cookies.count < 9, let reply = try? client.receiveReply() {
                    guard reply.error == .none else { return }
                    if reply.cookie >= 10 {
                        guard (try? client.receive(4 << 20)) != nil else { return }
                    }
                    cookies.insert(reply.cookie)
                }
                if cookies.count == 9 { answered.add(1, ordering: .relaxed) }
            }
        }
        for thread in readers + senders { thread.join() }
        #expect(answered.load(ordering: .relaxed) == clients.count)
        #expect(server.log.all(.warning) == [])
    }

    @Test(arguments: [true, false]) func stopAnswersWhatIsInFlight(ring: Bool) throws {
        let server = try TestServer(ring: ring)
        let client = try Client(unix: server.socketPath, export: "alpha")
        let idle = try Client(unix: server.socketPath, export: "alpha")
        let undecided = try Client(unix: server.socketPath)
        let inside = try Client(unix: server.socketPath, export: "alpha")
        try inside.send(Client.request(.write, cookie: 1, length: 1 << 20) + [1])
        let bytes = [UInt8](repeating: 0x77, count: 1 << 20)
        for index in 0..<UInt64(16) {
            try client.send(
                Client.request(.write, cookie: index, offset: index << 20, length: 1 << 20) + bytes)
        }
        server.server.stop()
        #expect(idle.isHungUpOn())
        #expect(undecided.isHungUpOn())
        #expect(inside.isHungUpOn())
        var answered = 0
        while let reply = try? client.receiveReply() {
            #expect(reply.error == .none)
            answered += 1
        }
        #expect(answered > 0)
        #expect(client.isHungUpOn())
        #expect(access(server.socketPath, F_OK) != 0)
        #expect(server.log.all(.warning) == [])
        server.server.stop()
    }

    @Test func stopDoesNotWaitForClientsThatDoNotRead() throws {
        let server = try TestServer { $0.limits.stopTimeout = .milliseconds(200) }
        let rude = try Client(unix: server.socketPath, export: "alpha")
        try rude.send(
            (0..<UInt64(16)).flatMap { Client.request(.read, cookie: $0, length: 1 << 20) })
        usleep(50_000)
        let start = ContinuousClock.now
        server.server.stop()
        #expect(ContinuousClock.now - start < .seconds(3))
        #expect(server.log.has(.warning, "the server stopped"))
    }

    @Test func startsAgainAtOnce() throws {
        let server = try TestServer { $0.listening.tcpAddresses = [("127.0.0.1", 0)] }
        #expect(server.uris.count == 2)
        #expect(server.uris[0] == "nbd+unix:///?socket=\(server.socketPath)")
        let port = try #require(UInt16(server.uris[1].split(separator: ":").last!))
        let client = try Client(tcp: port)
        try client.negotiate("alpha")
        #expect(try client.read(0, 4096).count == 4096)
        server.server.stop()
        #expect(client.isHungUpOn())
        #expect(try server.server.start().count == 2)
        #expect(try Client(unix: server.socketPath, export: "alpha").read(0, 512).count == 512)
    }

    @Test func staleSocketsAreRemovedAndLiveOnesAreNot() throws {
        let first = try TestServer()
        #expect(throws: ServerError.self) {
            try TestServer { $0.listening.unixPaths = [first.socketPath] }
        }
        #expect(try Client(unix: first.socketPath, export: "alpha").read(0, 512).count == 512)

        // A socket nobody listens on any more.
        let path = first.directory.path + "/stale.sock"
        let stale = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        _ = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(stale, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        close(stale)
        let second = try TestServer { $0.listening.unixPaths = [path] }
        #expect(try Client(unix: path, export: "alpha").read(0, 512).count == 512)
        second.server.stop()

        // A file that is no socket stays.
        let file = first.directory.path + "/file"
        close(open(file, O_CREAT | O_WRONLY, 0o600))
        let failure = #expect(throws: ServerError.self) {
            try TestServer { $0.listening.unixPaths = [file] }
        }
        #expect(failure?.description.contains("not a socket") == true)
        #expect(access(file, F_OK) == 0)
    }

    @Test func addressesThatCannotBeBound() throws {
        let long = "/tmp/" + String(repeating: "x", count: 110)
        for path in [long, "", "/nonexistent-directory/nbd.sock"] {
            #expect(throws: ServerError.self) { try TestServer { $0.listening.unixPaths = [path] } }
        }
        let server = try TestServer { $0.listening.tcpAddresses = [("127.0.0.1", 0)] }
        let port = UInt16(server.uris[1].split(separator: ":").last!)!
        let failure = #expect(throws: ServerError.self) {
            try TestServer { $0.listening.tcpAddresses = [("127.0.0.1", port)] }
        }
        #expect(failure?.description.contains("another program has the port") == true)
        #expect(throws: ServerError.self) {
            try TestServer { $0.listening.tcpAddresses = [("no such host.invalid", 0)] }
        }
    }

    @Test func slowBytes() throws {
        let server = try TestServer()
        let client = try Client(unix: server.socketPath)
        _ = try client.receive(18)
        let name = Array("alpha".utf8)
        let data = bigEndianBytes(UInt32(name.count)) + name + bigEndianBytes(UInt16(0))
        let bytes =
            bigEndianBytes(UInt32(3)) + bigEndianBytes(Magic.option)
            + bigEndianBytes(OptionCode.go.rawValue) + bigEndianBytes(UInt32(data.count)) + data
        for byte in bytes {
            try client.send([byte])
            usleep(300)
        }
        while try client.receiveOptionReply().type != .ack {}
        let write =
            Client.request(.write, cookie: 8, offset: 512, length: 1024)
            + [UInt8](repeating: 0xAB, count: 1024) + Client.request(.read, cookie: 9, length: 2048)
        for byte in write {
            try client.send([byte])
            if byte != 0xAB { usleep(300) }
        }
        #expect(try client.receiveReply() == (.none, 8))
        #expect(try client.receiveReply() == (.none, 9))
        let read = try client.receive(2048)
        #expect(read[..<512].allSatisfy { $0 == 0 })
        #expect(read[512..<1536].allSatisfy { $0 == 0xAB })
    }
}

/// Sockets that belong to the one that listens at `path`, it included: the server's own, whatever
/// else this process does at the same time.
func openSockets(_ path: String) -> Int {
    let table = (try? String(contentsOfFile: "/proc/net/unix", encoding: .utf8)) ?? ""
    return table.split(separator: "\n").count { $0.hasSuffix(" " + path) }
}

/// Resident memory of this process.
func residentBytes() -> Int {
    guard let file = fopen("/proc/self/statm", "r") else { return 0 }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 256)
    fgets(&line, 256, file)
    let words = String(
        decoding: line.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self
    )
    .split(separator: " ")
    return Int(words[1])! * 4096
}
