// What `wafer serve` is told.

import NBDServer
import ThinMetadata
import ThinPool

public struct ServeOptions: Sendable {
    public enum IOChoice: String, Sendable, CaseIterable {
        /// io_uring where the system has it.
        case auto
        /// io_uring or nothing.
        case uring
        /// poll and plain reads and writes.
        case poll
    }

    // Ways in. Without any: `nbd.sock` in the pool's directory.
    public var unixPaths: [String] = []
    public var unixAccess = UnixAccess()
    public var tcpAddresses: [(host: String, port: UInt16)] = []
    public var listeningSockets: [Int32] = []
    public var connectedSocket: Int32?
    public var onConnectedEnd: @Sendable () -> Void = {}

    // Who may use them, and how much.
    public var rules: [AccessRule] = []
    public var maxConnections = 1000
    public var maxConnectionsOfClient: Int?
    public var maxConnectionsToExport: Int?
    public var handshakeTimeout = Duration.seconds(10)
    public var idleTimeout: Duration?
    public var keepAliveSeconds: Int? = 60

    public var reactors = 1
    public var payloadBytes = MemoryBudget.payloadBytes
    public var io = IOChoice.auto
    /// nil: no TLS.
    public var tls: TLSOptions?
    /// The export for clients that name none; nil: the only volume, if there is only one.
    public var defaultExport: String?
    /// What the server before has left.
    public var inherited: HandOver?
    public var pool = PoolOptions()

    public init() { setCache(bytes: MemoryBudget.cacheBytes) }

    /// Memory for the map, which tables and metadata blocks share.
    public mutating func setCache(bytes: Int) {
        let metadata = MemoryBudget.metadataBytes(of: bytes)
        pool.cacheBlocks = metadata / Layout.blockSize
        pool.tableBytes = bytes - metadata
    }

    var hasWayIn: Bool {
        !unixPaths.isEmpty || !tcpAddresses.isEmpty || !listeningSockets.isEmpty
            || connectedSocket != nil
    }
}
