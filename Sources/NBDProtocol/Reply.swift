// The headers of replies.
//
// Simple, 16 bytes; the data of a READ follows if the error is 0, and only then:
//
//   0 magic u32 | 4 error u32 | 8 cookie u64
//
// A chunk, 20 bytes, or 32 if extended headers were agreed on; `length` bytes follow:
//
//   0 magic u32 | 4 flags u16 | 6 type u16 | 8 cookie u64 | 16 length u32
//   0 magic u32 | 4 flags u16 | 6 type u16 | 8 cookie u64 | 16 offset u64 | 24 length u64
//
// A request is answered by one simple reply, or by chunks of which the last says DONE.

public enum SimpleReply {
    @inlinable public static var size: Int { 16 }

    /// Writes `size` bytes.
    /// - Parameter cookie: as `RequestHeader` has it, in memory order.
    @inlinable @inline(__always)
    public static func write(
        to bytes: UnsafeMutableRawPointer, error: WireError, cookie: UInt64
    ) {
        bytes.storeBigEndian(Magic.simpleReply, at: 0)
        bytes.storeBigEndian(error.rawValue, at: 4)
        bytes.storeBytes(of: cookie, toByteOffset: 8, as: UInt64.self)
    }
}

/// Which request a chunk answers, and how its header looks.
@frozen public struct ChunkHeader: Sendable {
    public let extended: Bool
    /// As `RequestHeader` has them.
    public let cookie: UInt64
    public let offset: UInt64

    @inlinable public init(extended: Bool, cookie: UInt64, offset: UInt64) {
        self.extended = extended
        self.cookie = cookie
        self.offset = offset
    }

    @inlinable public var size: Int { extended ? 32 : 20 }

    /// Writes `size` bytes.
    /// - Parameter length: of the payload that follows.
    @inlinable public func write(
        to bytes: UnsafeMutableRawPointer, _ type: ChunkType, isLast: Bool, length: Int
    ) {
        bytes.storeBigEndian(extended ? Magic.extendedReply : Magic.structuredReply, at: 0)
        bytes.storeBigEndian(isLast ? ChunkFlag.done : 0, at: 4)
        bytes.storeBigEndian(type.rawValue, at: 6)
        bytes.storeBytes(of: cookie, toByteOffset: 8, as: UInt64.self)
        if extended {
            bytes.storeBigEndian(offset, at: 16)
            bytes.storeBigEndian(UInt64(length), at: 24)
        } else {
            bytes.storeBigEndian(UInt32(length), at: 16)
        }
    }
}
