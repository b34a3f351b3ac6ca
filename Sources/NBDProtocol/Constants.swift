// Every number of the NBD protocol that this server speaks, and the limits that it sets itself.
// Integers on the wire are big-endian and unsigned.

/// The words that begin messages.
public enum Magic {
    /// "NBDMAGIC": first word of the greeting.
    public static let greeting: UInt64 = 0x4e42_444d_4147_4943
    /// "IHAVEOPT": second word of the greeting, and first word of each option.
    public static let option: UInt64 = 0x4948_4156_454f_5054
    public static let optionReply: UInt64 = 0x0003_e889_0455_65a9
    @inlinable public static var request: UInt32 { 0x2560_9513 }
    @inlinable public static var simpleReply: UInt32 { 0x6744_6698 }
    @inlinable public static var structuredReply: UInt32 { 0x668e_33ef }
    @inlinable public static var extendedRequest: UInt32 { 0x21e4_1c71 }
    @inlinable public static var extendedReply: UInt32 { 0x6e8a_278c }
}

/// Handshake flags, server to client.
public enum HandshakeFlag {
    public static let fixedNewstyle: UInt16 = 1 << 0
    public static let noZeroes: UInt16 = 1 << 1
}

/// Handshake flags, client to server.
public enum ClientFlag {
    public static let fixedNewstyle: UInt32 = 1 << 0
    public static let noZeroes: UInt32 = 1 << 1
}

/// What a client may do with an export.
public struct TransmissionFlags: OptionSet, Hashable, Sendable {
    public var rawValue: UInt16
    public init(rawValue: UInt16) { self.rawValue = rawValue }

    public static let hasFlags = Self(rawValue: 1 << 0)
    public static let readOnly = Self(rawValue: 1 << 1)
    public static let sendFlush = Self(rawValue: 1 << 2)
    public static let sendFUA = Self(rawValue: 1 << 3)
    public static let rotational = Self(rawValue: 1 << 4)
    public static let sendTrim = Self(rawValue: 1 << 5)
    public static let sendWriteZeroes = Self(rawValue: 1 << 6)
    public static let sendDF = Self(rawValue: 1 << 7)
    public static let canMultiConn = Self(rawValue: 1 << 8)
    public static let sendResize = Self(rawValue: 1 << 9)
    public static let sendCache = Self(rawValue: 1 << 10)
    public static let sendFastZero = Self(rawValue: 1 << 11)
    public static let blockStatusPayload = Self(rawValue: 1 << 12)
}

/// An option of the handshake. Unknown numbers are legal and are answered with `.unsupported`.
public struct OptionCode: RawRepresentable, Hashable, Sendable, Codable {
    public var rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }

    public static let exportName = Self(rawValue: 1)
    public static let abort = Self(rawValue: 2)
    public static let list = Self(rawValue: 3)
    public static let peekExport = Self(rawValue: 4)
    public static let startTLS = Self(rawValue: 5)
    public static let info = Self(rawValue: 6)
    public static let go = Self(rawValue: 7)
    public static let structuredReply = Self(rawValue: 8)
    public static let listMetaContext = Self(rawValue: 9)
    public static let setMetaContext = Self(rawValue: 10)
    public static let extendedHeaders = Self(rawValue: 11)
}

/// The type of a reply to an option.
public struct OptionReplyType: RawRepresentable, Hashable, Sendable {
    public var rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    private init(error: UInt32) { rawValue = 1 << 31 | error }

    public static let ack = Self(rawValue: 1)
    public static let server = Self(rawValue: 2)
    public static let info = Self(rawValue: 3)
    public static let metaContext = Self(rawValue: 4)
    public static let unsupported = Self(error: 1)
    public static let policy = Self(error: 2)
    public static let invalid = Self(error: 3)
    public static let platform = Self(error: 4)
    public static let tlsRequired = Self(error: 5)
    public static let unknown = Self(error: 6)
    public static let shutdown = Self(error: 7)
    public static let blockSizeRequired = Self(error: 8)
    public static let tooBig = Self(error: 9)
    public static let extendedHeadersRequired = Self(error: 10)
}

/// What INFO and GO can tell about an export.
public enum InfoType {
    public static let export: UInt16 = 0
    public static let name: UInt16 = 1
    public static let description: UInt16 = 2
    public static let blockSize: UInt16 = 3
}

/// A command of the transmission phase.
public enum Command: UInt16, Sendable {
    case read = 0
    case write = 1
    case disconnect = 2
    case flush = 3
    case trim = 4
    case cache = 5
    case writeZeroes = 6
    case blockStatus = 7
}

/// Flags of a command.
@frozen public struct CommandFlags: OptionSet, Hashable, Sendable {
    public var rawValue: UInt16
    @inlinable public init(rawValue: UInt16) { self.rawValue = rawValue }

    @inlinable public static var fua: Self { Self(rawValue: 1 << 0) }
    @inlinable public static var noHole: Self { Self(rawValue: 1 << 1) }
    @inlinable public static var dontFragment: Self { Self(rawValue: 1 << 2) }
    @inlinable public static var requestOne: Self { Self(rawValue: 1 << 3) }
    @inlinable public static var fastZero: Self { Self(rawValue: 1 << 4) }
    @inlinable public static var payloadLength: Self { Self(rawValue: 1 << 5) }
}

/// An error as replies carry it.
@frozen public struct WireError: RawRepresentable, Hashable, Sendable {
    public var rawValue: UInt32
    @inlinable public init(rawValue: UInt32) { self.rawValue = rawValue }

    @inlinable public static var none: Self { Self(rawValue: 0) }
    @inlinable public static var notPermitted: Self { Self(rawValue: 1) }
    @inlinable public static var inputOutput: Self { Self(rawValue: 5) }
    @inlinable public static var noMemory: Self { Self(rawValue: 12) }
    @inlinable public static var invalid: Self { Self(rawValue: 22) }
    @inlinable public static var noSpace: Self { Self(rawValue: 28) }
    @inlinable public static var overflow: Self { Self(rawValue: 75) }
    @inlinable public static var notSupported: Self { Self(rawValue: 95) }
    @inlinable public static var shutdown: Self { Self(rawValue: 108) }
}

/// Flags of a reply chunk.
public enum ChunkFlag {
    @inlinable public static var done: UInt16 { 1 << 0 }
}

/// What a reply chunk carries.
@frozen public struct ChunkType: RawRepresentable, Hashable, Sendable {
    public var rawValue: UInt16
    @inlinable public init(rawValue: UInt16) { self.rawValue = rawValue }

    @inlinable public static var none: Self { Self(rawValue: 0) }
    @inlinable public static var offsetData: Self { Self(rawValue: 1) }
    @inlinable public static var offsetHole: Self { Self(rawValue: 2) }
    @inlinable public static var blockStatus: Self { Self(rawValue: 5) }
    @inlinable public static var blockStatusExtended: Self { Self(rawValue: 6) }
    @inlinable public static var error: Self { Self(rawValue: 1 << 15 | 1) }
    @inlinable public static var errorOffset: Self { Self(rawValue: 1 << 15 | 2) }
}

/// The limits that this server sets.
public enum Limits {
    /// Offsets and lengths of requests are multiples of this.
    public static let minimumBlock: UInt32 = 512
    public static let preferredBlock: UInt32 = 4096
    /// Longest READ or WRITE; the length that no server may call an attack.
    public static let maximumPayload: UInt32 = 32 << 20
    /// Longest string that the protocol allows: names, descriptions, queries.
    public static let maximumString = 4096
    /// Longest option that is looked at. A name of 4096 bytes and many info requests fit.
    public static let maximumOption = 64 << 10
    /// Bytes of longer options that are read and thrown away, in a session, to stay in step.
    public static let maximumDrain = 1 << 20
    /// Options that a session may send. Clients send fewer than ten to use an export.
    public static let maximumOptions = 64
    /// Beside so many questions for each export that LIST has told of: programs that list exports
    /// ask about one after the other, QEMU's three times and libnbd's twice.
    public static let questionsOfListedExport = 8
    /// Queries in one option about meta contexts. Clients send one for each context they know.
    public static let maximumQueries = 256
    /// Meta contexts that a session may select.
    public static let maximumContexts = 16
    /// Extents in the answer to one BLOCK_STATUS, all its contexts together. The protocol suggests
    /// no more than 2^20 for one context.
    public static let maximumExtents = 8000
    /// A volume's size fits a signed offset.
    public static let maximumExportSize = UInt64(Int64.max)
}
