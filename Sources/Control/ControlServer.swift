// The server's management interface: the socket `wafer.sock` in the pool's directory.
//
// 1. Only its owner (and root) can connect: the socket's mode is 0600 from its beginning.
// 2. One thread accepts; each connection has a thread of its own, as verbs block. There are few of
//    them. No client is waited for longer than a deadline, and when there is no room the one that
//    has been silent for longest has to go, so none can keep others out; nor can one keep the
//    server from ending.
// 3. A socket left over is removed only after a connection to it was refused; at the end only if it
//    is still this server's.

import BlockIO
import Dispatch
import Glibc
import Logging
import Synchronization
import ThinPool

public final class ControlServer: @unchecked Sendable {
    private static let maxConnections = 16
    /// Milliseconds that a client may take to ask, whoever else wants its place; and for which
    /// one more client waits for a place.
    fileprivate static let leastSilence = 1000
    private static let patienceForRoom = 3000
    private static let pauseForRoom: UInt32 = 10
    /// Milliseconds for a request to come, and for a response to be taken.
    private static let requestTimeout = 10_000
    private static let responseTimeout = 10_000
    /// Milliseconds for which `stop` lets clients read what they have been told.
    private static let stopTimeout = 1000
    /// Milliseconds between progress lines of a check.
    private static let progressInterval = 200

    private let pool: LocalPool
    private let logger: Logger
    private let place: SocketPlace
    private let listener: Int32
    /// What was bound, so that nobody else's socket is removed at the end.
    private let identity: ino_t
    /// Ends the acceptor.
    private let stopEvent: WakeEvent
    private var acceptor: pthread_t?

    private struct Connection {
        let socket: ControlSocket
        /// Milliseconds since when a request is awaited; nil: one is being answered.
        var silentSince: Int?
    }
    private struct Connections {
        var open: [ObjectIdentifier: Connection] = [:]
        var isStopping = false

        /// Hangs up on the client that has been silent for longest; false if all are being served,
        /// or have come so lately that what they ask is still on its way.
        mutating func makeRoom() -> Bool {
            let longest = open.filter { $0.value.silentSince != nil }
                .min { $0.value.silentSince! < $1.value.silentSince! }
            guard let longest,
                longest.value.silentSince! + ControlServer.leastSilence <= monotonicMilliseconds()
            else { return false }
            longest.value.socket.shutDown()
            open[longest.key] = nil
            return true
        }
    }
    private let connections = Mutex(Connections())
    /// Verbs that were begun; the pool must stay until they are answered.
    private let idle = DispatchGroup()

    /// Listens, and answers from `start` on.
    public init(_ pool: LocalPool, logger: Logger) throws(ControlError) {
        self.pool = pool
        self.logger = logger
        let place = try SocketPlace(pool.directory, PoolDirectory.controlSocketName)
        self.place = place
        let listener = try SocketPlace.newSocket()
        do throws(ControlError) {
            // Takes effect at bind: nobody can connect in between.
            guard fchmod(listener, 0o600) == 0 else {
                throw ControlError(cannot: "protect", place.path, errno)
            }
            var code = place.bind(listener)
            if code == EADDRINUSE {
                try Self.removeStale(place)
                code = place.bind(listener)
            }
            guard code == 0 else { throw ControlError(cannot: "listen on", place.path, code) }
            guard listen(listener, 64) == 0, let status = place.status() else {
                throw ControlError(cannot: "listen on", place.path, errno)
            }
            identity = status.st_ino
            do throws(DeviceError) { stopEvent = try WakeEvent() } catch {
                throw ControlError(error)
            }
        } catch {
            close(listener)
            throw error
        }
        self.listener = listener
    }

    deinit {
        close(listener)
    }

    private static func removeStale(_ place: SocketPlace) throws(ControlError) {
        guard let status = place.status(), status.st_mode & S_IFMT == S_IFSOCK else {
            throw ControlError(
                .device, "\(place.path) is in the way and is no socket: move it elsewhere")
        }
        let probe = ControlSocket(descriptor: try SocketPlace.newSocket())
        // A listener that accepts nobody is one, too, and must not be waited for.
        _ = fcntl(probe.descriptor, F_SETFL, O_NONBLOCK)
        guard place.connect(probe.descriptor) == ECONNREFUSED else {
            throw ControlError(.busy, "another server listens on \(place.path): stop it first")
        }
        place.remove()
    }

    public func start() throws(ControlError) {
        precondition(acceptor == nil)
        do throws(DeviceError) {
            acceptor = try startThread(named: "wafer-control") { self.acceptConnections() }
        } catch { throw ControlError(error) }
    }

    /// Takes no more requests; returns when those that were begun are answered. A check is not
    /// waited for: it ends.
    public func stop() {
        if let acceptor {
            stopEvent.signal()
            pthread_join(acceptor, nil)
        }
        acceptor = nil
        if place.status()?.st_ino == identity { place.remove() }
        connections.withLock { connections in
            connections.isStopping = true
            // Ends the wait for a request; an answer that is due can still be sent.
            for connection in connections.open.values {
                shutdown(connection.socket.descriptor, Int32(SHUT_RD))
            }
        }
        // A change is waited for until its commit, but nobody who does not read what it is told.
        guard idle.wait(timeout: .now() + .milliseconds(Self.stopTimeout)) == .timedOut else {
            return
        }
        connections.withLock { connections in
            for connection in connections.open.values where !connection.socket.isWritable {
                connection.socket.shutDown()
            }
        }
        idle.wait()
    }

    // MARK: - Accepting

    private func acceptConnections() {
        var states = [
            pollfd(fd: listener, events: Int16(POLLIN), revents: 0),
            pollfd(fd: stopEvent.fileDescriptor, events: Int16(POLLIN), revents: 0),
        ]
        while true {
            guard poll(&states, 2, -1) >= 0 else {
                if errno == EINTR { continue }
                return
            }
            if states[1].revents != 0 { return }
            guard states[0].revents != 0 else { continue }
            let descriptor = accept(listener, nil, nil)
            guard descriptor >= 0 else {
                // Out of descriptors: it will pass, and must not be waited for busily.
                if errno == EMFILE || errno == ENFILE || errno == ENOMEM { sleepMilliseconds(100) }
                continue
            }
            _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
            begin(ControlSocket(descriptor: descriptor))
        }
    }

    private func admit(_ socket: ControlSocket) -> Bool {
        connections.withLock { connections in
            guard connections.open.count < Self.maxConnections || connections.makeRoom() else {
                return false
            }
            connections.open[ObjectIdentifier(socket)] = Connection(
                socket: socket, silentSince: monotonicMilliseconds())
            return true
        }
    }

    private func begin(_ socket: ControlSocket) {
        let deadline = monotonicMilliseconds() + Self.patienceForRoom
        var hasRoom = admit(socket)
        while !hasRoom, monotonicMilliseconds() < deadline {
            sleepMilliseconds(Self.pauseForRoom)
            hasRoom = admit(socket)
        }
        guard hasRoom else {
            return refuse(socket, "the server answers \(Self.maxConnections) other commands")
        }
        idle.enter()
        do throws(DeviceError) {
            let thread = try startThread(named: "wafer-verb") {
                self.serve(socket)
                self.forget(socket)
                self.idle.leave()
            }
            pthread_detach(thread)
        } catch {
            refuse(socket, "the server \(error) (limits of processes)")
            forget(socket)
            idle.leave()
        }
    }

    private func refuse(_ socket: ControlSocket, _ reason: String) {
        let error = ControlError(.busy, "\(reason): try again later")
        guard let line = try? ControlLine.encode(ControlResponse.failed(error)) else { return }
        _ = socket.write(line, milliseconds: 0)
    }

    private func forget(_ socket: ControlSocket) {
        _ = connections.withLock { $0.open.removeValue(forKey: ObjectIdentifier(socket)) }
    }

    // MARK: - Answering

    private func serve(_ socket: ControlSocket) {
        while let line = socket.readLine(
            limit: ControlLine.maxRequestBytes, milliseconds: Self.requestTimeout)
        {
            // False: the server stops, or has hung up to make room.
            guard mark(socket, silentSince: nil) else { return }
            let response: ControlResponse
            do throws(ControlError) {
                response = try answer(ControlLine.decodeRequest(line), socket)
            } catch {
                response = .failed(error)
            }
            guard send(response, socket), mark(socket, silentSince: monotonicMilliseconds())
            else { return }
        }
    }

    private func mark(_ socket: ControlSocket, silentSince: Int?) -> Bool {
        connections.withLock { connections in
            let key = ObjectIdentifier(socket)
            guard !connections.isStopping, connections.open[key] != nil else { return false }
            connections.open[key]!.silentSince = silentSince
            return true
        }
    }

    /// False: nothing more can be said to this client.
    private func send(_ response: ControlResponse, _ socket: ControlSocket) -> Bool {
        let line: [UInt8]
        do throws(ControlError) { line = try ControlLine.encode(response) } catch {
            logger.error("control socket: \(error)")
            return false
        }
        guard socket.write(line, milliseconds: Self.responseTimeout) else {
            // It may have half a line; and the next one would be waited for as long.
            socket.shutDown()
            return false
        }
        return true
    }

    private func answer(_ request: ControlRequest, _ socket: ControlSocket) throws(ControlError)
        -> ControlResponse
    {
        switch request {
        case .status: return .status(try pool.status())
        case .volumes: return .volumes(try pool.volumes())
        case .change(let change):
            do throws(ControlError) {
                // A client that went away does not stop what it has asked for.
                try pool.change(change) { _ = send(.progress(nil), socket) }
            } catch {
                logger.info("refused: \(change.words): \(error)")
                throw error
            }
            logger.info("\(change.words)")
            return .done
        case .check:
            var told = 0
            let result = try pool.check { advance in
                guard !isStopping else { return false }
                let now = monotonicMilliseconds()
                guard now - told >= Self.progressInterval else { return true }
                told = now
                // Nobody is checked for who does not read.
                return send(.progress(advance), socket)
            }
            guard let result else {
                throw ControlError(.refused, "the server stopped before the check was done")
            }
            return .check(result)
        }
    }

    private var isStopping: Bool { connections.withLock { $0.isStopping } }
}
