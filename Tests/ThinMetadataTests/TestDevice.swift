// A metadata device in memory, which can be written to a file for the real tools.

import BlockIO
import Foundation

final class TestDevice: BlockDevice {
    let path = "test device"
    private(set) var bytes: UnsafeMutableRawPointer
    private var length: Int
    var reads = 0
    var writes: [UInt64] = []
    var failReads = false

    init(blocks: Int) {
        length = blocks * 4096
        bytes = .allocate(byteCount: length, alignment: 4096)
        memset(bytes, 0, length)
    }
    convenience init(file: URL) throws {
        let data = try Data(contentsOf: file)
        self.init(blocks: data.count / 4096)
        data.copyBytes(to: UnsafeMutableRawBufferPointer(start: bytes, count: length))
    }
    convenience init(copying other: TestDevice) {
        self.init(blocks: other.blocks)
        memcpy(bytes, other.bytes, length)
    }
    deinit { bytes.deallocate() }

    var size: UInt64 { UInt64(length) }
    var blocks: Int { length / 4096 }
    func block(_ number: UInt64) -> UnsafeMutableRawPointer { bytes + Int(number) * 4096 }

    func grow(blocks: Int) {
        let larger = UnsafeMutableRawPointer.allocate(byteCount: blocks * 4096, alignment: 4096)
        memset(larger, 0, blocks * 4096)
        memcpy(larger, bytes, length)
        bytes.deallocate()
        bytes = larger
        length = blocks * 4096
    }

    func read(
        at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer
    ) throws(DeviceError) {
        reads += 1
        if failReads || offset + UInt64(buffer.count) > size {
            throw DeviceError(
                operation: "read", path: path, offset: offset, code: 5, reason: "I/O error")
        }
        memcpy(buffer.baseAddress!, bytes + Int(offset), buffer.count)
    }

    func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        if offset + UInt64(buffer.count) > size {
            throw DeviceError(
                operation: "write", path: path, offset: offset, code: 28, reason: "past the end")
        }
        for block in 0..<buffer.count / 4096 { writes.append(offset / 4096 + UInt64(block)) }
        memcpy(bytes + Int(offset), buffer.baseAddress!, buffer.count)
    }

    func flush() throws(DeviceError) {}

    func save(to file: URL) throws {
        try Data(bytesNoCopy: bytes, count: length, deallocator: .none).write(to: file)
    }
}
