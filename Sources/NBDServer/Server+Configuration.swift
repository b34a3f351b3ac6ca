// What a server is told. Who asks for one fills in the same values: what an option's default is stands
// here, and nowhere else.

import BlockIO

extension Server {
    public struct Configuration: Sendable {
        public var listening = Listening()
        public var limits = Limits()
        /// Who is let in, and who may only read.
        public var rules: [AccessRule] = []
        /// nil: no TLS.
        public var tls: TLSConfiguration?
        /// Threads that serve.
        public var reactors = 2
        public var readOnly = false
        /// The export for clients that name none; nil: the only volume, if there is only one.
        public var defaultExport: String?
        /// The pool's data device, open for reading and writing. Stays the caller's.
        public var dataFileDescriptor: Int32
        /// The same, if it is a file in memory: its I/O is done at once, not queued.
        public var dataInMemory: MemoryFile?
        /// The data device is a disk that turns.
        public var dataIsRotational = false

        public init(dataFileDescriptor: Int32) {
            self.dataFileDescriptor = dataFileDescriptor
        }
    }

    /// The ways in.
    public struct Listening: Sendable {
        /// Unix sockets to listen on.
        public var unixPaths: [String] = []
        /// Who may connect to those, by their place in the file system.
        public var unixAccess = UnixAccess()
        /// Addresses to listen on. A host of "" or "*" is every address; port 0 is any free one.
        public var tcpAddresses: [(host: String, port: UInt16)] = []
        /// Sockets that listen already, and stay the caller's: who connects when nobody accepts
        /// waits for the next server.
        public var sockets: [Int32] = []
        /// A client that is connected already; the server closes the socket.
        public var connectedSocket: Int32?
        /// Called when that client has gone, on a thread of the server's.
        public var onConnectedEnd: @Sendable () -> Void = {}
        /// What another server has left; then nothing is bound.
        public var inherited: HandOver?

        public init() {}

        /// Nobody could come in.
        public var isEmpty: Bool {
            unixPaths.isEmpty && tcpAddresses.isEmpty && sockets.isEmpty && connectedSocket == nil
        }
    }

    /// How much clients may have.
    public struct Limits: Sendable {
        /// Connections at once. More take the places of those in their handshake; where there are
        /// none they are closed as soon as they are accepted.
        public var connections = 1000
        /// The same for one address (IPv6: one /64) or one user; nil: no limit of its own.
        public var connectionsOfClient: Int?
        /// More are refused when they ask for the export; nil: no limit of its own.
        public var connectionsToExport: Int?
        /// Bytes for the payloads of all requests in flight. Each reactor has an equal share, and
        /// never less than the longest request needs.
        public var payloadBytes = 256 << 20
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

        public init() {}
    }
}
