// The server: listeners, reactors, and the way from start to stop.
//
// 1. start: listeners are bound, then each reactor's thread makes its queue; only when all have
//    is the server started. If any fails, everything is undone.
// 2. stop: no more connections, no more requests; those in flight are finished and answered; it
//    returns when the last reactor has ended. The pool is the caller's to close, afterwards.

import BlockIO
import Dispatch
import Glibc
import Logging
import Synchronization
import ThinPool

/// Serves the volumes of a pool over NBD.
///
/// `start` and `stop` are called from one thread, or one after the other.
public final class Server {
    private let pool: Pool
    private let configuration: Configuration
    private let logger: Logger
    private var state: ServerState?
    private var threads: [pthread_t] = []

    public init(pool: Pool, configuration: Configuration, logger: Logger) {
        var configuration = configuration
        configuration.reactors = max(configuration.reactors, 1)
        configuration.limits.connections = max(configuration.limits.connections, 1)
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
        let scheme = configuration.tls?.policy == .require ? "nbds" : "nbd"
        return listeners.map { scheme + $0.uri.dropFirst("nbd".count) }
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
        let listening = configuration.listening
        if let inherited = listening.inherited { return inherited.listeners }
        var listeners: [Listener] = []
        do throws(ServerError) {
            for path in listening.unixPaths {
                listeners.append(try Listener.unix(path: path, access: listening.unixAccess))
            }
            for address in listening.tcpAddresses {
                listeners += try Listener.tcp(host: address.host, port: address.port)
            }
            for socket in listening.sockets {
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
        do throws(DeviceError) {
            threads.append(try startThread(named: "reactor \(number)", body))
        } catch {
            throw ServerError(operation: "start reactor \(number)", code: error.code)
        }
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
                total: configuration.limits.connections,
                ofClient: configuration.limits.connectionsOfClient,
                ofExport: configuration.limits.connectionsToExport))
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
