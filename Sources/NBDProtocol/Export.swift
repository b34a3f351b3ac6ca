// What a client learns about an export, and where the handshake learns it from.

/// An export as the handshake describes it.
public struct Export: Hashable, Sendable {
    /// The export's own name, also where the client asked for the default export.
    public var name: String
    /// Bytes; at most `Limits.maximumExportSize`.
    public var size: UInt64
    public var isReadOnly: Bool
    /// One line for people.
    public var description: String

    public init(name: String, size: UInt64, isReadOnly: Bool, description: String) {
        self.name = name
        self.size = size
        self.isReadOnly = isReadOnly
        self.description = description
    }

    /// FLUSH and FUA are always both there: without them the kernel's client sends no flushes.
    /// CAN_MULTI_CONN holds because all connections share one volume, and none has a cache.
    public var transmissionFlags: TransmissionFlags {
        let always: TransmissionFlags = [
            .hasFlags, .sendFlush, .sendFUA, .sendTrim, .sendWriteZeroes, .sendCache, .canMultiConn,
        ]
        return isReadOnly ? always.union(.readOnly) : always
    }
}

/// What became of the wish to open an export.
public enum ExportOpening: Hashable, Sendable {
    case opened(Export)
    /// There is no export of that name.
    case absent
    /// It can be opened in a moment, not now.
    case busy
}

/// The exports that there are. The handshake asks when the client does, and keeps nothing.
public protocol ExportDirectory {
    /// The names to list.
    mutating func exportNames() -> [String]
    /// The export of that name; "" is the default export. Nil: there is none.
    mutating func describe(_ name: String) -> Export?
    /// Opened, the export stays so for the transmission that follows.
    mutating func open(_ name: String) -> ExportOpening
}
