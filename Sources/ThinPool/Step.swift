// The slots of the engine: requests as the client sent them, and the steps they break into.

import Glibc

/// A client's request in flight.
struct Request: BitwiseCopyable {
    var operation = VolumeOperation.read
    var fua = false
    var noHole = false
    var volume: Unmanaged<Volume>?
    /// Bytes: what has not been given to a step yet is `cursor..<end`.
    var offset: UInt64 = 0
    var cursor: UInt64 = 0
    var end: UInt64 = 0
    var buffer: UnsafeMutableRawPointer?
    var query: Unmanaged<ExtentQuery>?
    var holes: UnsafeMutablePointer<HoleList>?
    var isAbandoned: UnsafePointer<Bool>?
    var cookie: UInt64 = 0
    /// Steps outstanding, and those of them that have I/O to issue (by `nextReady`).
    var pending: Int32 = 0
    var firstReady: Int32 = -1
    var lastReady: Int32 = -1
    /// First error of a step, as errno.
    var error: Int32 = 0
    /// Links requests that wait for one flush.
    var next: Int32 = -1
}

enum StepIntent: UInt8, BitwiseCopyable {
    case read, write
    /// Zero a part of one block, or (NO_HOLE) provision it with zeroes.
    case zero
    /// Unmap a range of whole blocks.
    case unmap
    /// Answer a query of the map.
    case extents
    /// Load the map of a range into the mapping table.
    case cache

    /// It goes through a range of the map.
    var walks: Bool {
        switch self {
        case .read, .write, .zero: false
        case .unmap, .extents, .cache: true
        }
    }
}

/// Where a step is. `asks` is the only phase in which the pool's lock is needed.
///
///     asks ──> hole ──────> done            a READ of what has no block: zeroes
///       ├────> transfer ──> done            mapped, not shared: in place
///       │ └──> zeroes ────> done            the same for zeroes
///       ├────> copyRead ──> copyWrite ─┐    shared: a copy of the old block (pieces, if large)
///       ├────> clear ──────────────────┤    unmapped, large block: zero it first
///       └────> fill <──────────────────┘    the block as it will be; then `filled`: the mapping
///                                           is inserted under the lock, and the step is done
enum StepPhase: UInt8, BitwiseCopyable {
    case asks, hole, transfer, zeroes, copyRead, copyWrite, clear, fill, filled

    /// The device is to zero a range.
    var isZeroing: Bool { self == .zeroes || self == .clear }
}

/// A part of a request: a run of mapped blocks, or a part of one block, or a range of the map.
struct Step: BitwiseCopyable {
    var request: Int32 = -1
    var intent = StepIntent.read
    var phase = StepPhase.asks
    var isPinned = false
    var hasCell = false
    /// Its I/O failed: the block goes back, no mapping is inserted.
    var hasFailed = false
    /// The old block's contents are needed around the user's bytes.
    var copies = false
    /// Zeroes are to be written around the user's bytes, unless the block turns out to be a hole.
    var mayBeHole = false
    var pin: UInt16 = 0

    var virtualBlock: UInt64 = 0
    /// Unmap, cache: the end of the range, in blocks.
    var blockLimit: UInt64 = 0
    /// The user's bytes: where they start inside the block, how many, and where in memory.
    var start = 0
    var length = 0
    var memory: UnsafeMutableRawPointer?

    /// Byte offsets on the data device.
    var newBlock: UInt64 = 0
    var oldBlock: UInt64 = 0
    /// Copy of a large block: bytes done so far.
    var copied = 0
    var bounce: UnsafeMutableRawPointer?
    /// Where the old block's bytes are: in `bounce`, or where the device has them.
    var contents: UnsafeMutableRawPointer?

    /// The I/O in flight: where it goes on (bytes of the data device), and what is left of it.
    var position: UInt64 = 0
    var remaining = 0
    var vectors = (iovec(), iovec(), iovec())
    var vectorCount: Int32 = 0
    /// The next step of the request with I/O to issue.
    var nextReady: Int32 = -1

    /// Commits that it has waited for, in vain, to give metadata space back.
    var commitsAwaited: UInt8 = 0
    /// Links parked steps.
    var next: UInt64 = 0
}

/// A step of some reactor's engine: 0 is nobody.
struct StepReference {
    var rawValue: UInt64
    init(rawValue: UInt64) { self.rawValue = rawValue }
    init(engine: Int, step: Int32) {
        rawValue = UInt64(engine + 1) << 32 | UInt64(UInt32(bitPattern: step))
    }
    var engine: Int { Int(rawValue >> 32) - 1 }
    var step: Int32 { Int32(truncatingIfNeeded: rawValue) }
}
