// How connections end that have been served: nothing of their last replies is lost, and what they
// held is free for others.

import Glibc
import NBDProtocol
import NBDServer
import Synchronization
import Testing
import ThinPool

@Suite(.serialized) struct LeavingTests {
    private static let length = 1 << 20
    private static let count = 12

    private func server(
        ring: Bool = true, _ configure: (inout Server.Configuration) -> Void = { _ in }
    ) throws -> TestServer {
        try TestServer(ring: ring) {
            $0.listening.tcpAddresses = [("127.0.0.1", 0)]
            configure(&$0)
        }
    }

    private func client(
        _ server: TestServer, hasLittleRoom: Bool = false
    ) throws -> Client {
        let port = try #require(UInt16(server.uris[1].split(separator: ":").last!))
        let client = try Client(tcp: port, hasLittleRoom: hasLittleRoom)
        try client.negotiate("alpha")
        return client
    }

    private func reads(_ count: Int, _ length: Int = length) -> [UInt8] {
        (0..<UInt64(count)).flatMap {
            Client.request(
                .read, cookie: $0, offset: $0 * UInt64(length), length: UInt32(length))
        }
    }

    /// A client that takes its time: by then the server has long said its last word.
    private func takeReplies(_ client: Client, _ count: Int) throws {
        for number in 0..<count {
            if number % 4 == 3 { usleep(300_000) }
            #expect(try client.receiveReply().error == .none)
            #expect(try client.receive(Self.length).count == Self.length)
        }
    }

    /// Linux answers bytes that nobody received with a reset, and forgets what it was to send.
    @Test(arguments: [true, false]) func repliesOutliveWhatIsUnread(ring: Bool) throws {
        let server = try server(ring: ring)
        let client = try client(server)
        try client.send(reads(Self.count) + Client.request(.disconnect, cookie: 0))
        usleep(100_000)
        try client.send([UInt8](repeating: 0x41, count: 1000))
        try takeReplies(client, Self.count)
        #expect(client.isHungUpOn())
        #expect(server.log.all(.warning) == [])
    }

    @Test(arguments: [true, false]) func repliesOutliveTheServer(ring: Bool) throws {
        let server = try server(ring: ring) { $0.limits.stopTimeout = .seconds(20) }
        let client = try client(server)
        let bytes = [UInt8](repeating: 0x41, count: 32 << 20)
        let requests =
            reads(8) + Client.request(.write, cookie: 99, length: 32 << 20) + bytes
        let socket = client.socket
        // There is no room for all of the write beside the replies.
        let sender = TestThread {
            var sent = 0
            while sent < requests.count {
                let result = requests.withUnsafeBytes {
                    Glibc.send(
                        socket, $0.baseAddress! + sent, $0.count - sent, Int32(MSG_NOSIGNAL))
                }
                if result <= 0 { break }
                sent += result
            }
        }
        usleep(300_000)
        nonisolated(unsafe) let stopping = server.server
        let end = TestThread { stopping.stop() }
        usleep(300_000)
        try takeReplies(client, 8)
        #expect(client.isHungUpOn())
        shutdown(client.socket, Int32(SHUT_RDWR))
        sender.join()
        end.join()
        #expect(server.log.all(.warning) == [])
    }

    /// Clients that were told the end and do nothing about it.
    @Test func stopDoesNotWaitForWhoHasEverything() throws {
        let server = try server { $0.limits.stopTimeout = .seconds(20) }
        let idle = try client(server)
        let leaving = try client(server)
        try leaving.disconnect()
        #expect(eventually { server.log.has(.info, "client disconnected") })
        let start = ContinuousClock.now
        server.server.stop()
        #expect(ContinuousClock.now - start < .seconds(5))
        #expect(idle.isHungUpOn())
        #expect(leaving.isHungUpOn())
    }

    /// Who has said DISC and leaves its end open keeps neither the volume nor a place.
    @Test func whoHasLeftHoldsNothing() throws {
        let server = try server {
            $0.limits.connections = 3
            $0.limits.connectionsToExport = 3
        }
        let left = try (0..<3).map { _ in try client(server) }
        for client in left { try client.disconnect() }
        #expect(
            eventually {
                server.log.all(.info).count { $0.contains("client disconnected") } == 3
            })
        let others = try (0..<3).map { _ in try client(server) }
        for client in others { #expect(try client.read(0, 512).count == 512) }
        for client in others { try client.disconnect() }
        #expect(eventually { (try? server.pool.change(.delete(name: "alpha"))) != nil })
        #expect(server.log.all(.warning) == [])
    }

    /// In the end the server hangs up whatever the client does.
    @Test(arguments: [true, false]) func itEndsIfTheClientDoesNot(ring: Bool) throws {
        let server = try server(ring: ring) { $0.limits.stallTimeout = .milliseconds(300) }
        let client = try client(server)
        try client.disconnect()
        let bytes = [UInt8](repeating: 0x41, count: 64 << 10)
        #expect(
            eventually {
                bytes.withUnsafeBytes {
                    Glibc.send(client.socket, $0.baseAddress!, $0.count, Int32(MSG_NOSIGNAL))
                } < 0
            })
    }

    /// Also on its way out a client has to move if it holds memory that others wait for.
    @Test(arguments: [true, false]) func leavingWithoutHaste(ring: Bool) throws {
        let server = try server(ring: ring) {
            $0.reactors = 1
            $0.limits.payloadBytes = 64 << 20
            $0.limits.stallTimeout = .seconds(2)
        }
        let patient = try Client(unix: server.socketPath, export: "alpha", timeout: 10)
        let hoarders = try (0..<2).map { _ in try client(server, hasLittleRoom: true) }
        for hoarder in hoarders {
            try hoarder.send(reads(1, 32 << 20) + Client.request(.disconnect, cookie: 0))
        }
        let isOver = Atomic<Bool>(false)
        let sockets = hoarders.map(\.socket)
        let trickle = TestThread {
            var bytes = [UInt8](repeating: 0, count: 16 << 10)
            while !isOver.load(ordering: .relaxed) {
                for socket in sockets { recv(socket, &bytes, bytes.count, Int32(MSG_DONTWAIT)) }
                usleep(50_000)
            }
        }
        usleep(200_000)
        #expect((try? patient.read(0, 1 << 20))?.count == 1 << 20)
        isOver.store(true, ordering: .relaxed)
        trickle.join()
        #expect(server.log.has(.warning, "does not take its last replies"))
    }
}
