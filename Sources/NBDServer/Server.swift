// The server: listeners, reactors, and the way from start to stop.
//
// 1. start: listeners are bound, then each reactor's thread makes its queue; only when all have
//    is the server started. If any fails, everything is undone.
// 2. stop: no more connections, no more requests; those in flight are finished and answered; it
//    returns when the last reactor has ended. The pool is the caller's to close, afterwards.

import BlockIO
import CLinux
import Dispatch
import Glibc
import Logging
import Synchronization
import ThinPool

/// Serves the volumes of a pool over NBD.
///
/// `start` and `stop` are called from one thread, or one after the other.
public final class Server {
    public struct Configuration: Sendable {
        /// Unix sockets to listen on.
        public var unixPaths: [String] = []
        /// Who may connect to those, by their place in the file system.
        public var unixAccess = UnixAccess()
        /// Addresses to listen on. A host of "" or "*" is every address; port 0 is any free one.
        public var tcpAddresses: [(host: String, port: UInt16)] = []
        /// Sockets that listen already, and stay the caller's: who connects when nobody accepts
        /// waits for the next server.
        public var listeningSockets: [Int32] = []
        /// A client that is connected already; the server closes the socket.
        public var connectedSocket: Int32?
        /// Called when that client has gone, on a thread of the server's.
        public var onConnectedEnd: @Sendable () -> Void = {}
        /// What another server has left; then nothing is bound.
        public var inherited: HandOver?
        /// Who is let in, and who may only read.
        public var rules: [AccessRule] = []
        /// Threads that serve.
        public var reactors = 2
        public var readOnly = false
        /// The export for clients that name none; nil: the only volume, if there is only one.
        public var defaultExport: String?
        /// The data device is a disk that turns.
        public var dataIsRotational = false
        /// Connections at once. More take the places of those in their handshake; where there are
        /// none they are closed as soon as they are accepted.
        public var maxConnections = 1000
        /// The same for one address (IPv6: one /64) or one user; nil: no limit of its own.
        public var maxConnectionsOfClient: Int?
        /// More are refused when they ask for the export; nil: no limit of its own.
        public var maxConnectionsToExport: Int?
        /// Bytes for the payloads of all requests in flight. Each reactor has an equal share, and
        /// never less than the longest request needs.
        public var payloadBytesTotal = 256 << 20
        /// The pool's data device, open for reading and writing. Stays the caller's.
        public var dataFileDescriptor: Int32
        /// The same, if it is a file in memory: its I/O is done at once, not queued.
        public var dataInMemory: MemoryFile?
        /// Use io_uring where the system has it.
        public var allowRing = true
        /// A client has to have chosen its export after this long.
        public var handshakeTimeout = Duration.seconds(10)
        /// How long `stop` waits for clients to take their replies.
        public var stopTimeout = Duration.seconds(5)
        /// A client that leaves, or holds memory that others wait for, must not stand still longer.
        public var stallTimeout = Duration.seconds(10)
        /// A connection with nothing under way and no traffic for so long is ended; nil: none is.
        public var idleTimeout: Duration?
        /// Seconds without traffic before TCP asks whether the client is still there; nil: never.
        public var keepAliveSeconds: Int? = 60

        /// nil: no TLS.
        public var tls: TLSConfiguration?

        public init(dataFileDescriptor: Int32) {
            self.dataFileDescriptor = dataFileDescriptor
        }
    }

    private let pool: Pool
    private let configuration: Configuration
    private let logger: Logger
    private var state: ServerState?
    private var threads: [pthread_t] = []

    public init(pool: Pool, configuration: Configuration, logger: Logger) {
        var configuration = configuration
        configuration.reactors = max(configuration.reactors, 1)
        configuration.maxConnections = max(configuration.maxConnections, 1)
        self.pool = pool
        self.configuration = configuration
        self.logger = logger
    }

    deinit {
        stop()
    }

    /// Starts to serve.
    /// - Returns: where clients find the server, as NBD URIs without an export's name.
    public func start() throws(ServerError) -> [String] {
        precondition(state == nil, "the server is started already")
        let listeners = try listeners()
        do throws(ServerError) {
            var mailboxes: [Mailbox] = []
            for _ in 0..<configuration.reactors { mailboxes.append(try Mailbox()) }
            let state = ServerState(
                pool: pool, configuration: configuration, logger: logger, mailboxes: mailboxes)
            self.state = state
            for number in mailboxes.indices {
                try startReactor(number, state, listeners: number == 0 ? listeners : [])
            }
            state.startup.wait(for: threads.count)
            if let failure = state.startup.failure {
                throw ServerError(
                    operation: "start to serve", code: failure.code, reason: failure.description)
            }
        } catch {
            state?.startup.open(serving: false)
            stop()
            for listener in listeners { listener.close() }
            throw error
        }
        state!.startup.open(serving: true)
        return listeners.map(\.uri)
    }

    /// Stops serving; returns when everything that was begun has been finished.
    public func stop() {
        guard let state else { return }
        for mailbox in state.mailboxes { mailbox.stop() }
        for thread in threads { pthread_join(thread, nil) }
        threads = []
        self.state = nil
    }

    /// Stops serving, and leaves listeners and connections to the next server.
    public func handOver() -> HandOver {
        guard let state else { return HandOver() }
        for mailbox in state.mailboxes { mailbox.carry() }
        stop()
        return state.carried.withLock { $0 }
    }

    private func listeners() throws(ServerError) -> [Listener] {
        if let inherited = configuration.inherited { return inherited.listeners }
        var listeners: [Listener] = []
        do throws(ServerError) {
            for path in configuration.unixPaths {
                listeners.append(try Listener.unix(path: path, access: configuration.unixAccess))
            }
            for address in configuration.tcpAddresses {
                listeners += try Listener.tcp(host: address.host, port: address.port)
            }
            for socket in configuration.listeningSockets {
                listeners.append(try Listener.inherited(socket))
            }
        } catch {
            for listener in listeners { listener.close() }
            throw error
        }
        return listeners
    }

    private func startReactor(
        _ number: Int, _ state: ServerState, listeners: [Listener]
    ) throws(ServerError) {
        let body: @Sendable () -> Void = {
            let mailbox = state.mailboxes[number]
            do throws(DeviceError) {
                let reactor = try Reactor(
                    number: number, shared: state, mailbox: mailbox, listeners: listeners)
                if state.startup.report(nil) { reactor.run() } else { reactor.abandon() }
            } catch {
                _ = state.startup.report(error)
            }
        }
        threads.append(try startThread("reactor \(number)", body))
    }
}

/// What the reactors share.
final class ServerState: Sendable {
    let pool: Pool
    let configuration: Server.Configuration
    let logger: Logger
    let mailboxes: [Mailbox]
    let exportSettings: PoolExports.Settings
    let startup = Startup()
    let admission: Admission
    let strangers = LogThrottle()
    /// What the reactors leave to the next server.
    let carried = Mutex(HandOver())

    init(
        pool: Pool, configuration: Server.Configuration, logger: Logger, mailboxes: [Mailbox]
    ) {
        self.pool = pool
        self.configuration = configuration
        self.logger = logger
        self.mailboxes = mailboxes
        var settings = PoolExports.Settings()
        settings.isReadOnly = configuration.readOnly
        settings.isRotational = configuration.dataIsRotational
        settings.defaultExport = configuration.defaultExport
        settings.requireTLS = configuration.tls?.requiredExports ?? []
        exportSettings = settings
        admission = Admission(
            Admission.Limits(
                total: configuration.maxConnections,
                ofClient: configuration.maxConnectionsOfClient,
                ofExport: configuration.maxConnectionsToExport))
    }
}

/// Where the reactors wait for each other before the first of them serves.
final class Startup: Sendable {
    private struct State {
        var failure: DeviceError?
        var serves = false
    }
    private let state = Mutex(State())
    private let reported = DispatchSemaphore(value: 0)
    private let opened = DispatchSemaphore(value: 0)

    /// A reactor is ready, or has failed. Returns when it is decided; true if it is to serve.
    func report(_ failure: DeviceError?) -> Bool {
        if let failure { state.withLock { $0.failure = $0.failure ?? failure } }
        reported.signal()
        opened.wait()
        opened.signal()
        return state.withLock { $0.serves }
    }

    func wait(for count: Int) {
        for _ in 0..<count { reported.wait() }
    }

    var failure: DeviceError? { state.withLock { $0.failure } }

    /// Lets the reactors go on, or home. Called once.
    func open(serving: Bool) {
        state.withLock { $0.serves = serving }
        opened.signal()
    }
}

private final class ThreadBody: Sendable {
    let name: String
    let body: @Sendable () -> Void
    init(_ name: String, _ body: @escaping @Sendable () -> Void) {
        self.name = name
        self.body = body
    }
}

/// A thread that runs `body`, to be joined.
private func startThread(
    _ name: String, _ body: @escaping @Sendable () -> Void
) throws(ServerError) -> pthread_t {
    let argument = Unmanaged.passRetained(ThreadBody(name, body))
    var thread = pthread_t()
    let code = pthread_create(
        &thread, nil,
        { argument in
            let thread = Unmanaged<ThreadBody>.fromOpaque(argument!).takeRetainedValue()
            clinux_name_thread(thread.name)
            thread.body()
            return nil
        }, argument.toOpaque())
    guard code == 0 else {
        argument.release()
        throw ServerError(operation: "start the thread \(name)", code: code)
    }
    return thread
}
