// A block device in memory: for tests, and for measuring everything but the device.

import CLinux
import Glibc

/// Growable memory that reads as zeroes where it was not written.
///
/// Pages are taken when first written. Not thread-safe. Nothing survives the process, so
/// `flush` has nothing to do.
public final class MemoryDevice: BlockDevice {
    public let path: String
    public private(set) var size: UInt64
    private var memory: UnsafeMutableRawPointer

    public init(size: UInt64, path: String = "memory") throws(DeviceError) {
        self.path = path
        self.size = size
        let mapped = mmap(
            nil, Self.mappedLength(size), PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let mapped, mapped != MAP_FAILED else {
            throw DeviceError(
                operation: "create", path: path, code: errno,
                reason: "no address space for \(size) bytes")
        }
        memory = mapped
    }

    deinit {
        munmap(memory, Self.mappedLength(size))
    }

    public func read(
        at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer
    ) throws(DeviceError) {
        try check("read", offset, buffer.count)
        guard let start = buffer.baseAddress else { return }
        memcpy(start, memory + Int(offset), buffer.count)
    }

    public func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        try check("write", offset, buffer.count)
        guard let start = buffer.baseAddress else { return }
        memcpy(memory + Int(offset), start, buffer.count)
    }

    public func flush() throws(DeviceError) {}

    /// Makes the device larger; what is new reads as zeroes.
    public func grow(to newSize: UInt64) throws(DeviceError) {
        guard newSize >= size else {
            throw DeviceError(
                operation: "grow", path: path, code: EINVAL,
                reason: "it has \(size) bytes already, and a device does not shrink")
        }
        guard
            let mapped = clinux_remap(memory, Self.mappedLength(size), Self.mappedLength(newSize))
        else {
            throw DeviceError(
                operation: "grow", path: path, code: errno,
                reason: "no address space for \(newSize) bytes")
        }
        memory = mapped
        size = newSize
    }

    private func check(_ operation: String, _ offset: UInt64, _ count: Int) throws(DeviceError) {
        guard offset <= size, UInt64(count) <= size - offset else {
            throw DeviceError(
                operation: operation, path: path, offset: offset, code: EINVAL,
                reason: "\(count) bytes there reach beyond its end at byte \(size)")
        }
    }

    /// A mapping cannot be empty.
    private static func mappedLength(_ size: UInt64) -> Int {
        max(Int(size), 1)
    }
}
