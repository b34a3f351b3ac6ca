// What a client learns about an export, and where the handshake learns it from.

/// How requests and replies look on the wire, as the client has asked for it. Each includes what the
/// one before it can express.
public enum WireFormat: UInt8, Sendable, Comparable, Codable {
    /// 28-byte requests, simple replies.
    case simple
    /// 28-byte requests; READ and BLOCK_STATUS are answered in chunks.
    case structured
    /// 32-byte requests with 64-bit lengths; everything is answered in chunks.
    case extended

    public static func < (one: Self, other: Self) -> Bool { one.rawValue < other.rawValue }
}

/// An export as the handshake describes it.
public struct Export: Hashable, Sendable {
    /// The export's own name, also where the client asked for the default export.
    public var name: String
    /// Bytes; at most `Limits.maximumExportSize`.
    public var size: UInt64
    public var isReadOnly: Bool
    /// One line for people.
    public var description: String
    /// It is on a disk that turns.
    public var isRotational: Bool
    /// Only clients that came through TLS may know more of it than its name.
    public var requiresTLS: Bool

    public init(
        name: String, size: UInt64, isReadOnly: Bool, description: String,
        isRotational: Bool = false, requiresTLS: Bool = false
    ) {
        self.name = name
        self.size = size
        self.isReadOnly = isReadOnly
        self.description = description
        self.isRotational = isRotational
        self.requiresTLS = requiresTLS
    }
}

/// A meta context that a session has selected.
public struct MetaContext: Hashable, Sendable, Codable {
    /// What the extents of this context are marked with in replies.
    public var id: UInt32
    public var name: String

    public init(id: UInt32, name: String) {
        self.id = id
        self.name = name
    }

    /// The protocol's own context: which ranges have no block of their own.
    public static let allocation = "base:allocation"
}

/// What client and server have agreed on when transmission begins.
public struct Agreement: Hashable, Sendable {
    public var export: Export
    public var format: WireFormat
    /// In the order in which they were selected, which is the order of the replies.
    public var contexts: [MetaContext]

    public init(export: Export, format: WireFormat = .simple, contexts: [MetaContext] = []) {
        self.export = export
        self.format = format
        self.contexts = contexts
    }

    /// FLUSH and FUA are always both there: without them the kernel's client sends no flushes.
    /// CAN_MULTI_CONN holds because all connections share one volume, and none has a cache.
    public var transmissionFlags: TransmissionFlags {
        var flags: TransmissionFlags = [
            .hasFlags, .sendFlush, .sendFUA, .sendTrim, .sendWriteZeroes, .sendFastZero,
            .sendCache, .canMultiConn,
        ]
        if export.isReadOnly { flags.insert(.readOnly) }
        if export.isRotational { flags.insert(.rotational) }
        if format >= .structured { flags.insert(.sendDF) }
        if format == .extended && !contexts.isEmpty { flags.insert(.blockStatusPayload) }
        return flags
    }
}

/// What became of the wish to open an export.
public enum ExportOpening: Hashable, Sendable {
    case opened(Export)
    /// There is no export of that name.
    case absent
    /// It can be opened in a moment, not now.
    case busy
    /// It requires TLS, and the client did not come through it.
    case requiresTLS
    /// It is there, and not for this client, or not now; why, in words for the client.
    case refused(String)
}

/// An export in the answer to LIST.
public struct ListedExport: Hashable, Sendable {
    public var name: String
    public var description: String

    public init(name: String, description: String) {
        self.name = name
        self.description = description
    }
}

/// The exports that there are. The handshake asks when the client does, and keeps nothing.
/// Exports may come and go while it lists them. Names of exports and contexts are ASCII.
///
/// `secure`: the client came through TLS. Others do not see exports that require it, neither
/// themselves nor in the meta contexts of others.
public protocol ExportDirectory {
    /// The export that a list has after the one of that name, which need not be there any more;
    /// without a name the first. Nil: no more. Each name comes once, in an order that stays.
    mutating func next(after name: String?, secure: Bool) -> ListedExport?
    /// The export of that name; "" is the default export. Nil: there is none.
    mutating func describe(_ name: String) -> Export?
    /// Opened, the export stays so for the transmission that follows.
    /// - Parameter contexts: what the client has selected; each was there when it was.
    mutating func open(_ name: String, contexts: [MetaContext], secure: Bool) -> ExportOpening
    /// The meta contexts of the export whose names begin so, not all if there are very many.
    mutating func contextNames(
        of name: String, beginningWith prefix: String, secure: Bool
    ) -> [String]
    mutating func hasContext(_ context: String, of name: String, secure: Bool) -> Bool
}

/// Without meta contexts.
extension ExportDirectory {
    public mutating func contextNames(
        of: String, beginningWith: String, secure: Bool
    ) -> [String] { [] }
    public mutating func hasContext(_ context: String, of: String, secure: Bool) -> Bool { false }
}
