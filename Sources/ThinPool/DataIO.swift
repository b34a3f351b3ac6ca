// What the engine asks of the data device, and what the server asks of the engine.

import Glibc

/// The data device of one reactor. The result of an I/O is the bytes transferred, or -errno.
///
/// A call that can be done without waiting may do it and return the result; -EAGAIN is none then.
/// Any other call only queues and returns nil; its result comes back through
/// `VolumeIO.complete(tag:result:)`. Memory, vectors included, stays valid until then. Offsets and
/// lengths are bytes, multiples of 512.
public protocol DataIO: AnyObject {
    func read(at offset: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64) -> Int32?
    /// `isNew`: the first write to the range, or to much of it, since its block was taken into use.
    /// On stable storage after the next flush, not before.
    func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool, tag: UInt64
    ) -> Int32?
    /// The result is 0.
    func flush(tag: UInt64) -> Int32?
    /// Whether the range is known to read as zeroes, because nothing has been written there since the
    /// device was made or the range was discarded. Asked for blocks that nobody uses, just before
    /// they are filled. Does not wait for the device.
    func isHole(at offset: UInt64, length: UInt64) -> Bool
    /// Where the range is in memory, if the device is there: a write may take it from there instead of
    /// from a buffer that it was read into.
    func contents(at offset: UInt64, length: Int) -> UnsafeMutableRawPointer?
    /// The range reads as zeroes afterwards and stays allocated. Completes with 0.
    /// - Returns: false if there are too many of these under way: it is to be asked again when one has
    ///   completed.
    func zero(at offset: UInt64, length: UInt64, tag: UInt64) -> Bool
}

@frozen public enum VolumeOperation: UInt8, Sendable, BitwiseCopyable {
    case read, write, flush, trim, writeZeroes, cache
    /// Block status: answers the request's query.
    case extents
}

/// A request that the server has validated: inside the volume, aligned to 512 bytes, allowed.
public struct VolumeRequest {
    public var operation: VolumeOperation
    public var volume: Volume
    /// Bytes.
    public var offset: UInt64
    /// Bytes.
    public var length: UInt64
    /// Read: filled; write: the source. Aligned to 512, valid until the request is finished.
    public var buffer: UnsafeMutableRawPointer?
    /// Durable before it is finished.
    public var fua: Bool
    /// Write zeroes: provision, so that later writes cannot run out of space.
    public var noHole: Bool
    /// Extents: what is asked, and where the answer goes. Not retained: whoever submits the request
    /// keeps it until that is finished.
    public unowned(unsafe) var query: ExtentQuery?
    /// Read: holes are told here instead of being filled. Empty, and valid until the request is
    /// finished.
    public var holes: UnsafeMutablePointer<HoleList>?
    /// Set when nobody waits for the answer any more: the rest of the request is left undone then, and
    /// it fails. Valid until the request is finished.
    public var isAbandoned: UnsafePointer<Bool>?
    /// The caller's; comes back from `takeFinished`.
    public var cookie: UInt64

    public init(
        operation: VolumeOperation, volume: Volume, offset: UInt64, length: UInt64,
        buffer: UnsafeMutableRawPointer? = nil, fua: Bool = false, noHole: Bool = false,
        query: ExtentQuery? = nil, holes: UnsafeMutablePointer<HoleList>? = nil,
        isAbandoned: UnsafePointer<Bool>? = nil, cookie: UInt64
    ) {
        self.operation = operation
        self.volume = volume
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.fua = fua
        self.noHole = noHole
        self.query = query
        self.holes = holes
        self.isAbandoned = isAbandoned
        self.cookie = cookie
    }
}
