// What a server leaves to the one that takes its place: sockets, and what is to be known of them.
// Clients notice nothing but a pause.
//
// 1. A connection is carried only when nothing of it is under way: every request that was begun is
//    answered, and what has arrived of the next ones goes along as it came.
// 2. A socket is in here once, and is the next server's from then on.

import FoundationEssentials
import NBDProtocol

public struct HandOver: Codable, Sendable {
    var listeners: [Listener] = []
    var connections: [CarriedConnection] = []
    /// Sockets that were accepted, and nothing said on them yet.
    var arrivals: [Int32] = []

    /// All that have to stay open for the next server.
    public var descriptors: [Int32] {
        listeners.map(\.descriptor) + connections.map(\.socket) + arrivals
    }
    public var connectionCount: Int { connections.count }
}

/// A connection between two messages or in the middle of one.
package struct CarriedConnection: Codable, Sendable {
    enum Stage: Codable, Sendable {
        case handshake(Handshake)
        case transmission(
            exportName: String, format: WireFormat, contexts: [MetaContext],
            refused: Transmission.Refused?)
    }
    var socket: Int32
    var stage: Stage
    /// What was received and not acted on.
    var input: Data
    /// Version and algorithms of TLS, which the kernel does; nil: there is none.
    var tls: String?

    /// The export, if it has been chosen.
    var exportName: String? {
        if case .transmission(let name, _, _, _) = stage { name } else { nil }
    }
}
