// Clients that one server leaves to the next, while others come and go.

import Glibc
import Logging
import NBDProtocol
import NBDServer
import Synchronization
import Testing

@Suite(.serialized) struct HandOverTests {
    private static let count = 40

    /// One server after the other on the same pool, each with the clients of the one before.
    private final class Succession {
        let first: TestServer
        private var present: Server?
        let log = LogRecorder()
        private let configuration: Server.Configuration

        init(_ configure: (inout Server.Configuration) -> Void) throws {
            first = try TestServer(configure)
            var configuration = Server.Configuration(
                dataFileDescriptor: first.pool.data.fileDescriptor)
            configure(&configuration)
            self.configuration = configuration
        }

        /// - Returns: how many clients went over.
        func next() throws -> Int {
            let left = (present ?? first.server).handOver()
            var configuration = configuration
            configuration.listening.inherited = left
            let recorder = log
            let server = Server(
                pool: first.pool.pool, configuration: configuration,
                logger: Logger(label: "test", factory: { _ in recorder }))
            _ = try server.start()
            present = server
            return left.clientCount
        }

        deinit { present?.stop() }
    }

    private func clients(_ succession: Succession) throws -> [Client] {
        try (0..<Self.count).map { _ in
            try Client(unix: succession.first.socketPath, export: "alpha", timeout: 10)
        }
    }

    private func expectService(_ clients: [Client]) {
        let served = clients.count { (try? $0.read(0, 512))?.count == 512 }
        #expect(served == clients.count)
    }

    /// There is no room for strangers, and those who are in are not the ones to make it.
    @Test(arguments: [nil, count]) func strangersDisplaceNobody(ofClient: Int?) throws {
        let succession = try Succession {
            $0.limits.connections = ofClient == nil ? Self.count : 10 * Self.count
            $0.limits.connectionsOfClient = ofClient
        }
        let clients = try clients(succession)
        let isOver = Atomic<Bool>(false)
        let path = succession.first.socketPath
        let strangers = (0..<4).map { _ in
            TestThread {
                while !isOver.load(ordering: .relaxed) { _ = try? Client(unix: path).receive(18) }
            }
        }
        for _ in 0..<10 {
            _ = try succession.next()
            expectService(clients)
        }
        isOver.store(true, ordering: .relaxed)
        for stranger in strangers { stranger.join() }
        #expect(!succession.log.has(.warning, "alpha"))
    }

    /// One of them left with requests under way before the others had their turn.
    @Test func aFenceIsNotForThoseWhoStayed() throws {
        let succession = try Succession { _ in }
        let clients = try clients(succession)
        let pool = succession.first.pool.pool
        let volume = try #require(pool.open(exportNamed: "alpha"))
        volume.addFence()
        #expect(try succession.next() == Self.count)
        expectService(clients)
        pool.removeFence(of: volume)
        pool.close(volume)
    }

    /// The next server is told to go before all of its reactors have taken what is theirs.
    @Test func leftAgainAtOnce() throws {
        let succession = try Succession { $0.reactors = 4 }
        let clients = try clients(succession)
        for _ in 0..<30 { #expect(try succession.next() == Self.count) }
        expectService(clients)
    }
}
