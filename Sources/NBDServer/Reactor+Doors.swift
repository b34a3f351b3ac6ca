// Accepting: who comes is looked at, counted, and given to a reactor. The first reactor does it for
// all of them.

import BlockIO
import CLinux
import Glibc
import Logging

struct Door {
    var listener: Listener
    var isOpen = true
    var isPausing = false
    /// It was said that accepting fails; said again only after it has worked in between.
    var hasWarned = false
}

extension Reactor {
    /// Accepting pauses this long when there are no descriptors or no memory left.
    private static let acceptPauseNanoseconds: UInt64 = 100_000_000

    func accept(_ index: Int) {
        let tag = Tag(.accept, index: index).rawValue
        if stopDeadline != nil {
            closeDoor(index)
        } else if doors[index].listener.isInherited {
            // An accept that is under way when the server stops would take a client with it that
            // the next server is to have.
            queue.poll(doors[index].listener.descriptor, tag: tag)
        } else {
            queue.accept(doors[index].listener.descriptor, tag: tag)
        }
    }

    func acceptEnded(_ result: Int32, by index: Int) {
        let listener = doors[index].listener
        if !listener.isInherited || result < 0 {
            accepted(result, by: index)
        } else if doors[index].isOpen {
            accepted(clinux_accept(listener.descriptor), by: index)
        }
    }

    private func accepted(_ result: Int32, by index: Int) {
        if result >= 0 {
            doors[index].hasWarned = false
            welcome(result)
        } else if stopDeadline == nil {
            switch -result {
            case EAGAIN, EINTR, ECONNABORTED, EPROTO: break
            case let code:
                if code == EMFILE, let displaced = shared.admission.makeRoom() {
                    shared.mailboxes[displaced.reactor].displace(displaced)
                }
                if !doors[index].hasWarned {
                    doors[index].hasWarned = true
                    logger.warning(
                        "cannot accept connections for now: \(SystemError.words(-result))",
                        metadata: ["listener": "\(doors[index].listener.uri)"])
                }
                doors[index].isPausing = true
                queue.timeout(
                    nanoseconds: Self.acceptPauseNanoseconds,
                    tag: Tag(.acceptPause, index: index).rawValue)
                return
            }
        }
        accept(index)
    }

    /// The reactor that a new connection goes to.
    private func takeReactor() -> Int {
        defer { nextReactor = (nextReactor + 1) % shared.mailboxes.count }
        return nextReactor
    }

    private func welcome(_ socket: Int32, _ inherited: InheritedClient? = nil) {
        guard let arrival = admit(socket, inherited, to: takeReactor()) else {
            close(socket)
            return
        }
        let target = arrival.session.reactor
        if target == number {
            adopt(arrival)
        } else if !shared.mailboxes[target].deliver(arrival) {
            turnAway(arrival)
        }
    }

    /// The client that was there before the server. Here, so that its end is noticed here.
    func welcomeFirst(_ socket: Int32) {
        guard let arrival = admit(socket, to: number) else {
            close(socket)
            shared.configuration.listening.onConnectedEnd()
            return
        }
        firstSession = arrival.session
        engine.beginTurn()
        adopt(arrival)
        endTurn()
    }

    /// Clients of the server that was here before.
    func welcome(_ inherited: HandOver) {
        engine.beginTurn()
        for client in InheritedClient.all(of: inherited) {
            welcome(client.connection.socket, client)
        }
        for socket in inherited.arrivals { welcome(socket) }
        endTurn()
    }

    /// Nil: it is not let in, which the log knows.
    private func admit(
        _ socket: Int32, _ inherited: InheritedClient? = nil, to reactor: Int
    ) -> Arrival? {
        let peer = Peer(of: socket)
        func refuse(_ reason: String) -> Arrival? {
            warnOfStranger("client refused: \(reason)", ["peer": "\(peer.description)"])
            return nil
        }
        let decision = shared.configuration.rules.decision(for: peer.identity)
        guard decision != .deny else { return refuse("the rules do not let it in") }
        let admission = shared.admission
        let verdict =
            inherited?.connection.exportName.map {
                admission.takeOver(peer.owner, reactor: reactor, export: $0)
            } ?? admission.admit(peer.owner, reactor: reactor)
        switch verdict {
        case .full(let reason):
            return refuse(reason)
        case .admitted(let session, let displaced):
            if let displaced { shared.mailboxes[displaced.reactor].displace(displaced) }
            SocketSettings.prepare(
                socket, keepAliveSeconds: shared.configuration.limits.keepAliveSeconds)
            return Arrival(
                socket: socket, peer: peer, isReadOnly: decision == .allowReadOnly,
                session: session, inherited: inherited)
        }
    }

    func closeDoor(_ index: Int) {
        guard doors[index].isOpen else { return }
        doors[index].isOpen = false
        let listener = doors[index].listener
        if mailbox.shouldCarry {
            shared.carried.withLock { $0.listeners.append(listener) }
        } else {
            listener.close()
        }
    }
}
