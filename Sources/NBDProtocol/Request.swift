// A request's header, 28 bytes:
//
//   0 magic u32 | 4 flags u16 | 6 command u16 | 8 cookie u64 | 16 offset u64 | 24 length u32
//
// A WRITE is followed by `length` bytes; no other command has a payload.

/// A request as the client sent it, not yet validated.
@frozen public struct RequestHeader: Hashable, Sendable {
    @inlinable public static var size: Int { 28 }

    public var flags: CommandFlags
    /// The command's number, known or not.
    public var command: UInt16
    /// The client's eight bytes, in memory order: echoed, never interpreted.
    public var cookie: UInt64
    public var offset: UInt64
    /// 64 bits wide as in an extended header, though the compact one sends 32.
    public var length: UInt64

    @inlinable public init(
        flags: CommandFlags, command: UInt16, cookie: UInt64, offset: UInt64, length: UInt64
    ) {
        self.flags = flags
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
    }

    /// Reads `size` bytes; nil if they do not begin with the magic, and the stream is lost.
    @inlinable @inline(__always)
    public static func parse(_ bytes: UnsafeRawPointer) -> RequestHeader? {
        guard bytes.bigEndian(0, as: UInt32.self) == Magic.request else { return nil }
        return RequestHeader(
            flags: CommandFlags(rawValue: bytes.bigEndian(4)),
            command: bytes.bigEndian(6),
            cookie: bytes.loadUnaligned(fromByteOffset: 8, as: UInt64.self),
            offset: bytes.bigEndian(16),
            length: UInt64(bytes.bigEndian(24, as: UInt32.self)))
    }

    /// The bytes that follow the header and must be taken off the stream whatever the answer is.
    @inlinable public var payloadLength: UInt64 {
        command == Command.write.rawValue ? length : 0
    }
}
