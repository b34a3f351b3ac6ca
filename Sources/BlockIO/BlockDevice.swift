// The synchronous block device that the metadata, the self-check and the tools use.
// Every call transfers everything or throws; offsets and lengths are bytes.

/// A random-access device of fixed block granularity.
///
/// Implementations: `FileDevice` (regular file or block device), `MemoryDevice`.
/// Not thread-safe unless the implementation says so.
public protocol BlockDevice: AnyObject {
    /// What to call the device in a message: its path, or a description.
    var path: String { get }
    /// Bytes. May be re-read after the file behind it has grown.
    var size: UInt64 { get }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(DeviceError)
    func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError)
    /// Everything written before the call survives a power cut once this returns
    /// (fdatasync, or the device's own flush). An error is final: what was not flushed is lost.
    func flush() throws(DeviceError)
}

/// A failed operation on a device: what, where, why.
public struct DeviceError: Error, Equatable, CustomStringConvertible {
    /// The operation, as a verb: "open", "lock", "read", "write", "flush", "discard".
    public var operation: String
    /// The device's path.
    public var path: String
    /// Where, if the operation has a place.
    public var offset: UInt64?
    /// The errno, or 0 where `reason` says it all.
    public var code: Int32
    /// In words, with what to do about it where that is known.
    public var reason: String

    public init(
        operation: String, path: String, offset: UInt64? = nil, code: Int32, reason: String
    ) {
        self.operation = operation
        self.path = path
        self.offset = offset
        self.code = code
        self.reason = reason
    }

    public var description: String {
        let place = offset.map { " at byte \($0)" } ?? ""
        return "cannot \(operation) \(path)\(place): \(reason)"
    }
}
