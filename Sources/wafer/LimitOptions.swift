// How much clients may have of a server: `wafer serve`'s limits for connections and their memory.

import ArgumentParser
import Control
import NBDServer

struct LimitOptions: ParsableArguments {
    private static let defaults = Server.Limits()

    @Option(help: ArgumentHelp("Connections at once.", valueName: "n"))
    var maxConnections = Self.defaults.connections
    @Option(
        help: ArgumentHelp(
            "Connections of one address or user at once (default: no limit of its own).",
            valueName: "n"))
    var maxConnectionsPerClient: Int?
    @Option(
        help: ArgumentHelp(
            "Connections to one export at once (default: no limit of its own).", valueName: "n"))
    var maxConnectionsPerExport: Int?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp("Seconds for a client to choose its export.", valueName: "seconds"))
    var handshakeTimeout = Self.defaults.handshakeTimeout / .seconds(1)
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "End connections without traffic after so many seconds (default: never).",
            valueName: "seconds"))
    var idleTimeout: Double?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "Seconds without traffic before TCP asks whether the client is there; 0: never.",
            valueName: "seconds"))
    var keepalive = Self.defaults.keepAliveSeconds ?? 0
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "Memory for requests in flight (default: an eighth of the machine's, at most 256MiB).",
            valueName: "size"),
        transform: size)
    var payloadMemory: ByteSize?

    private static let maxPayloadBytes: UInt64 = 1 << 40
    /// A connection has a place in a table, whether there is one or not.
    private static let connections = 1...100_000
    private static let handshakeSeconds = 0.1...3600
    private static let idleSeconds = 0.1...2_592_000
    /// What Linux takes for TCP_KEEPIDLE.
    private static let keepaliveSeconds = 0...32_767

    func validate() throws {
        for (name, value) in [
            ("--max-connections", maxConnections),
            ("--max-connections-per-client", maxConnectionsPerClient),
            ("--max-connections-per-export", maxConnectionsPerExport),
        ] {
            if let value, !Self.connections.contains(value) {
                throw ValidationError("\(name) is from 1 to \(Self.connections.upperBound)")
            }
        }
        if !Self.handshakeSeconds.contains(handshakeTimeout) {
            throw ValidationError("--handshake-timeout is from 0.1 to 3600 seconds")
        }
        if let idleTimeout, !Self.idleSeconds.contains(idleTimeout) {
            throw ValidationError("--idle-timeout is from 0.1 to 2592000 seconds")
        }
        if !Self.keepaliveSeconds.contains(keepalive) {
            throw ValidationError("--keepalive is from 0 to 32767 seconds")
        }
        if let payloadMemory, payloadMemory.bytes > Self.maxPayloadBytes {
            throw ValidationError("--payload-memory is at most 1TiB")
        }
    }

    func apply(to limits: inout Server.Limits) {
        limits.connections = maxConnections
        limits.connectionsOfClient = maxConnectionsPerClient
        limits.connectionsToExport = maxConnectionsPerExport
        limits.handshakeTimeout = .seconds(handshakeTimeout)
        limits.idleTimeout = idleTimeout.map { .seconds($0) }
        limits.keepAliveSeconds = keepalive == 0 ? nil : keepalive
        if let payloadMemory { limits.payloadBytes = Int(payloadMemory.bytes) }
    }
}
