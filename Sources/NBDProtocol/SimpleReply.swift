// A simple reply's header, 16 bytes:
//
//   0 magic u32 | 4 error u32 | 8 cookie u64
//
// The data of a READ follows if the error is 0, and only then.

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
