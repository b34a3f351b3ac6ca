// MemoryDevice and AlignedBuffer.

import Foundation
import Testing

@testable import BlockIO

@Suite struct MemoryTests {
    @Test func memoryDeviceKeepsItsBytesAsItGrows() throws {
        let device = try MemoryDevice(size: 10_000)
        let bytes = AlignedBuffer(count: 10_000)
        try device.read(at: 0, into: bytes.bytes)
        #expect(isAll(0, bytes.bytes, 0..<bytes.count))
        memset(bytes.pointer, 3, 10_000)
        try device.write(at: 0, from: UnsafeRawBufferPointer(bytes.bytes))
        try device.grow(to: 1 << 40)
        #expect(device.size == 1 << 40)
        let wide = AlignedBuffer(count: 20_000)
        try device.read(at: 0, into: wide.bytes)
        #expect(isAll(3, wide.bytes, 0..<10_000))
        #expect(isAll(0, wide.bytes, 10_000..<20_000))
        try device.write(at: (1 << 40) - 10_000, from: UnsafeRawBufferPointer(bytes.bytes))
        try device.flush()
        for offset in [(1 << 40) - 9_999, UInt64.max] as [UInt64] {
            _ = deviceError { () throws(DeviceError) in
                try device.write(at: offset, from: UnsafeRawBufferPointer(bytes.bytes))
            }
        }
        let shrinking = deviceError { () throws(DeviceError) in try device.grow(to: 4096) }
        #expect(shrinking?.code == EINVAL)
    }

    @Test(arguments: [1, 511, 4096, 4097, 1 << 20])
    func buffersAreAlignedAndZero(_ count: Int) {
        let buffer = AlignedBuffer(count: count)
        #expect(UInt(bitPattern: buffer.pointer) % UInt(AlignedBuffer.alignment) == 0)
        #expect(buffer.count == count)
        #expect(isAll(0, buffer.bytes, 0..<buffer.count))
    }

    @Test func fileLimitIsRaised() {
        let limit = ProcessSettings.raiseFileLimit()
        var now = rlimit()
        #expect(getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &now) == 0)
        #expect(now.rlim_cur == limit && now.rlim_cur == now.rlim_max)
    }
}
