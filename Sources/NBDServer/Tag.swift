// The tags of a reactor's queue: which part of the reactor a completion belongs to.
//
//   bit 63 set    the engine's: bits 0 to 61 are its own (bit 62: a zeroing, see QueueDataIO)
//   bit 63 clear  bits 56 to 59 kind | 32 to 55 generation | 0 to 31 index
//
// The generation is the connection's: a completion of a connection that is gone must not reach the
// next one in the same place. (None should come: a place is freed after its last completion.)

struct Tag {
    enum Kind: UInt64 {
        case wake = 1
        case tick = 2
        /// Index: the listener's.
        case accept = 3
        /// Index: the listener's. Accepting goes on after a pause.
        case acceptPause = 4
        /// Index: the connection's.
        case receive = 5
        case send = 6
        /// Ends a receive or an accept.
        case cancel = 7
        /// Index: the socket's descriptor.
        case farewell = 8
    }

    static let engineBit: UInt64 = 1 << 63
    static let zeroBit: UInt64 = 1 << 62

    var rawValue: UInt64

    init(rawValue: UInt64) { self.rawValue = rawValue }

    init(_ kind: Kind, index: Int = 0, generation: UInt32 = 0) {
        rawValue =
            kind.rawValue << 56 | UInt64(generation & 0xFF_FFFF) << 32
            | UInt64(UInt32(truncatingIfNeeded: index))
    }

    var isEngine: Bool { rawValue & Self.engineBit != 0 }
    var kind: Kind? { Kind(rawValue: rawValue >> 56) }
    var index: Int { Int(UInt32(truncatingIfNeeded: rawValue)) }
    var generation: UInt32 { UInt32(truncatingIfNeeded: rawValue >> 32) & 0xFF_FFFF }
}
