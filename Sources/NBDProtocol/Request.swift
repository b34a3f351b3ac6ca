// A request's header. Compact, 28 bytes:
//
//   0 magic u32 | 4 flags u16 | 6 command u16 | 8 cookie u64 | 16 offset u64 | 24 length u32
//
// Extended, 32 bytes: the same with its own magic, and a length of 64 bits.
//
// A payload of `length` bytes follows a WRITE, and any extended header that says so (PAYLOAD_LEN).

/// A request as the client sent it, not yet validated.
@frozen public struct RequestHeader: Hashable, Sendable {
    /// Bytes of a compact header, and of an extended one.
    @inlinable public static var size: Int { 28 }
    @inlinable public static var extendedSize: Int { 32 }

    public var flags: CommandFlags
    /// The command's number, known or not.
    public var command: UInt16
    /// The client's eight bytes, in memory order: echoed, never interpreted.
    public var cookie: UInt64
    public var offset: UInt64
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

    /// Reads `size` bytes, or `extendedSize`; nil if they do not begin with the magic, and the
    /// stream is lost.
    @inlinable @inline(__always)
    public static func parse(_ bytes: UnsafeRawPointer, extended: Bool = false) -> RequestHeader? {
        let magic = extended ? Magic.extendedRequest : Magic.request
        guard bytes.bigEndian(0, as: UInt32.self) == magic else { return nil }
        return RequestHeader(
            flags: CommandFlags(rawValue: bytes.bigEndian(4)),
            command: bytes.bigEndian(6),
            cookie: bytes.loadUnaligned(fromByteOffset: 8, as: UInt64.self),
            offset: bytes.bigEndian(16),
            length: extended
                ? bytes.bigEndian(24) : UInt64(bytes.bigEndian(24, as: UInt32.self)))
    }

    /// Writes `size` bytes, or `extendedSize`, as `parse` reads them.
    public func write(to bytes: UnsafeMutableRawPointer, extended: Bool = false) {
        bytes.storeBigEndian(extended ? Magic.extendedRequest : Magic.request, at: 0)
        bytes.storeBigEndian(flags.rawValue, at: 4)
        bytes.storeBigEndian(command, at: 6)
        bytes.storeBytes(of: cookie, toByteOffset: 8, as: UInt64.self)
        bytes.storeBigEndian(offset, at: 16)
        if extended {
            bytes.storeBigEndian(length, at: 24)
        } else {
            bytes.storeBigEndian(UInt32(length), at: 24)
        }
    }

    /// The bytes that follow the header and must be taken off the stream whatever the answer is.
    /// A WRITE has them even where the extended header forgets to say so.
    @inlinable public func payloadLength(extended: Bool) -> UInt64 {
        let announced = extended && flags.contains(.payloadLength)
        return command == Command.write.rawValue || announced ? length : 0
    }
}
