// How many connections there may be: in all, of one client, and to one export.
//
// 1. A connection counts from its admission until it is forgotten, which may be said any number of
//    times: what is counted are entries, so no way to end loses one or takes two away.
// 2. Where there is no room, whoever is still in its handshake, or on its way out, gives way to who
//    comes: the oldest of the client that has the most of them. One that has chosen its export
//    never does.
//
// The lock is taken when a connection comes, chooses its export and goes, not for requests.

import Synchronization

package final class Admission: Sendable {
    package struct Limits: Sendable {
        let total: Int
        let ofClient: Int?
        let ofExport: Int?

        package init(total: Int, ofClient: Int? = nil, ofExport: Int? = nil) {
            self.total = total
            self.ofClient = ofClient
            self.ofExport = ofExport
        }
    }

    package enum Verdict {
        /// `displaced`: has to make room, and does not count any more.
        case admitted(Session, displaced: Session?)
        /// There are as many as there may be.
        case full(String)
    }

    /// One connection, from its admission to its end.
    package struct Session: Hashable, Sendable {
        fileprivate let number: UInt64
        package let owner: Peer.Owner
        /// Who serves it.
        let reactor: Int
    }

    private struct Client {
        var count = 0
        /// In the handshake or on the way out, who gives way first in front.
        var yielding: [Session] = []
    }

    private struct State {
        var nextNumber: UInt64 = 0
        /// All that count, and the export of those that have chosen one.
        var sessions: [Session: String?] = [:]
        var clients: [Peer.Owner: Client] = [:]
        var exports: [String: Int] = [:]

        var firstToYield: Session? {
            clients.values.max { $0.yielding.count < $1.yielding.count }?.yielding.first
        }

        mutating func remove(_ session: Session) {
            guard let chosen = sessions.removeValue(forKey: session) else { return }
            if let export = chosen {
                leave(export)
            } else {
                clients[session.owner]!.yielding.removeAll { $0 == session }
            }
            clients[session.owner]!.count -= 1
            if clients[session.owner]!.count == 0 { clients[session.owner] = nil }
        }

        mutating func add(_ owner: Peer.Owner, reactor: Int, export: String?) -> Session {
            let session = Session(number: nextNumber, owner: owner, reactor: reactor)
            nextNumber += 1
            sessions[session] = .some(export)
            clients[owner, default: Client()].count += 1
            if let export {
                exports[export, default: 0] += 1
            } else {
                clients[owner]!.yielding.append(session)
            }
            return session
        }

        mutating func leave(_ export: String) {
            exports[export]! -= 1
            if exports[export] == 0 { exports[export] = nil }
        }
    }

    private let limits: Limits
    private let state = Mutex(State())

    package init(_ limits: Limits) { self.limits = limits }

    package func admit(_ owner: Peer.Owner, reactor: Int) -> Verdict {
        state.withLock { state in
            var displaced: Session?
            let own = state.clients[owner] ?? Client()
            if let most = limits.ofClient, own.count >= most {
                guard let oldest = own.yielding.first else {
                    return .full("it has \(most) connections already")
                }
                displaced = oldest
            } else if state.sessions.count >= limits.total {
                guard let oldest = state.firstToYield else {
                    return .full("\(limits.total) connections are open")
                }
                displaced = oldest
            }
            if let displaced { state.remove(displaced) }
            let session = state.add(owner, reactor: reactor, export: nil)
            return .admitted(session, displaced: displaced)
        }
    }

    /// The server before had let it in, to an export: it stays, and gives way to nobody.
    package func takeOver(_ owner: Peer.Owner, reactor: Int, export: String) -> Verdict {
        state.withLock {
            .admitted($0.add(owner, reactor: reactor, export: export), displaced: nil)
        }
    }

    /// The client has chosen an export: its handshake ends. Nil, or why it may not.
    package func enter(_ session: Session, export: String) -> String? {
        state.withLock { state in
            guard let chosen = state.sessions[session] else {
                return "the server has too many connections"
            }
            if chosen == export { return nil }  // Taken over.
            precondition(chosen == nil, "a connection chose two exports")
            if let most = limits.ofExport, state.exports[export, default: 0] >= most {
                return "the export has \(most) connections already"
            }
            state.sessions[session] = export
            state.exports[export, default: 0] += 1
            state.clients[session.owner]!.yielding.removeAll { $0 == session }
            return nil
        }
    }

    /// The connection has given up its export, if it had any, and is on its way out. First to give
    /// way: it needs nothing any more. False: it had to make room already.
    package func leave(_ session: Session) -> Bool {
        state.withLock { state in
            guard let chosen = state.sessions[session] else { return false }
            if let export = chosen {
                state.leave(export)
                state.sessions[session] = .some(nil)
                state.clients[session.owner]!.yielding.insert(session, at: 0)
            }
            return true
        }
    }

    /// There is no descriptor for another: who has to make room, and does not count any more.
    package func makeRoom() -> Session? {
        state.withLock { state in
            let displaced = state.firstToYield
            if let displaced { state.remove(displaced) }
            return displaced
        }
    }

    /// The connection has come to its end.
    package func forget(_ session: Session) {
        state.withLock { $0.remove(session) }
    }

    /// For tests: whether nothing is left.
    package var isEmpty: Bool {
        state.withLock { $0.sessions.isEmpty && $0.clients.isEmpty && $0.exports.isEmpty }
    }
}

/// What an accepted connection brings along.
struct Arrival: Sendable {
    let socket: Int32
    let peer: Peer
    let isReadOnly: Bool
    let session: Admission.Session
    /// Nil: it has not been greeted.
    let inherited: InheritedClient?
}
