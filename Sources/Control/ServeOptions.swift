// What `wafer serve` is told.

import NBDServer
import ThinMetadata
import ThinPool

public struct ServeOptions: Sendable {
    /// Without any way in: `nbd.sock` in the pool's directory.
    public var listening = Server.Listening()
    public var limits = Server.Limits()
    public var rules: [AccessRule] = []
    /// nil: no TLS.
    public var tls: TLSOptions?
    public var reactors = 1
    /// The export for clients that name none; nil: the only volume, if there is only one.
    public var defaultExport: String?
    public var pool = PoolOptions()
    /// Rather fail than do without io_uring.
    public var requiresRing = false

    public init() {
        limits.payloadBytes = MemoryBudget.payloadBytes
        setCache(bytes: MemoryBudget.cacheBytes)
    }

    /// Memory for the map, which tables and metadata blocks share.
    public mutating func setCache(bytes: Int) {
        let metadata = MemoryBudget.metadataBytes(of: bytes)
        pool.cacheBlocks = metadata / Layout.blockSize
        pool.tableBytes = bytes - metadata
    }
}
