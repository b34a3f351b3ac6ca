// FileDevice on block devices: loop devices over scratch files. Needs root and losetup(8);
// skipped where one cannot be set up.

import Foundation
import Testing

@testable import BlockIO

/// A loop device over a file, detached with the value.
final class LoopDevice {
    private static let losetup = "/sbin/losetup"
    static let isPossible: Bool = {
        let scratch = Scratch()
        guard let path = try? scratch.file(size: 1 << 20) else { return false }
        return LoopDevice(over: path) != nil
    }()

    let path: String

    init?(over file: String, sector: Int = 512) {
        let answer = runProgram(
            Self.losetup, "--find", "--show", "--sector-size", "\(sector)", file)
        guard let answer, answer.status == 0, !answer.output.isEmpty else { return nil }
        path = answer.output
    }

    deinit {
        _ = runProgram(Self.losetup, "--detach", path)
    }
}

@Suite(.serialized, .enabled(if: LoopDevice.isPossible, "no loop devices here"))
struct LoopDeviceTests {
    private static let size = 8 << 20

    @Test func isABlockDevice() throws {
        let scratch = Scratch()
        let loop = try #require(LoopDevice(over: scratch.file(size: UInt64(Self.size))))
        let device = try FileDevice(path: loop.path, access: .readWrite)
        #expect(device.isBlockDevice)
        #expect(device.size == UInt64(Self.size))
        #expect(device.sectorSize == 512)
        #expect(device.isDirect, "refused: \(device.directRefusal ?? "")")
        let growing = deviceError { () throws(DeviceError) in try device.grow(to: 1 << 30) }
        #expect(growing?.code == EINVAL)
        let bytes = AlignedBuffer(count: 4096)
        let beyond = deviceError { () throws(DeviceError) in
            try device.write(at: UInt64(Self.size) - 512, from: UnsafeRawBufferPointer(bytes.bytes))
        }
        #expect(beyond?.offset == UInt64(Self.size) - 512)
    }

    @Test func onlyOneOwner() throws {
        let scratch = Scratch()
        let loop = try #require(LoopDevice(over: scratch.file(size: UInt64(Self.size))))
        var device: FileDevice? = try FileDevice(path: loop.path, access: .readWrite)
        let error = deviceError { () throws(DeviceError) in
            _ = try FileDevice(path: loop.path, access: .readOnly)
        }
        #expect(error?.code == EBUSY)
        #expect(error?.reason.contains("another process has it open") == true)
        withExtendedLifetime(device) {}
        device = nil
        // The lock alone, as somebody has it who does not claim the device from the kernel.
        let other = open(loop.path, O_RDONLY | O_CLOEXEC)
        #expect(flock(other, LOCK_EX) == 0)
        let locked = deviceError { () throws(DeviceError) in
            _ = try FileDevice(path: loop.path, access: .readWrite)
        }
        #expect(locked?.operation == "lock")
        close(other)
        _ = try FileDevice(path: loop.path, access: .readWrite)
    }

    @Test func transfersAndSpace() throws {
        let scratch = Scratch()
        let backing = try scratch.file(size: UInt64(Self.size))
        let loop = try #require(LoopDevice(over: backing))
        let device = try FileDevice(path: loop.path, access: .readWrite)
        let bytes = AlignedBuffer(count: Self.size)
        memset(bytes.pointer, 0xff, Self.size)
        try device.write(at: 0, from: UnsafeRawBufferPointer(bytes.bytes))
        try device.flush()
        let before = allocatedBytes(backing)
        #expect(before >= Self.size)
        // Not whole sectors at the ends: those stay.
        try device.discard(at: (1 << 20) - 100, length: (4 << 20) + 100)
        #expect(allocatedBytes(backing) <= before - (4 << 20) + 65536)
        try device.zero(at: 0, length: 1 << 20)
        try device.zero(at: (6 << 20) + 7, length: 1000)
        try device.read(at: 0, into: bytes.bytes)
        #expect(isAll(0, bytes.bytes, 0..<1 << 20))
        #expect(isAll(0xff, bytes.bytes, 5 << 20..<(6 << 20) + 7))
        #expect(isAll(0, bytes.bytes, (6 << 20) + 7..<(6 << 20) + 1007))
        #expect(isAll(0xff, bytes.bytes, (6 << 20) + 1007..<Self.size))
    }

    @Test func largeSectorsAreBuffered() throws {
        let scratch = Scratch()
        let loop = try #require(
            LoopDevice(over: scratch.file(size: UInt64(Self.size)), sector: 4096))
        let device = try FileDevice(path: loop.path, access: .readWrite)
        #expect(device.sectorSize == 4096)
        #expect(!device.isDirect)
        #expect(device.directRefusal?.contains("4096 bytes") == true)
        let bytes = AlignedBuffer(count: 512)
        memset(bytes.pointer, 9, 512)
        try device.write(at: 512, from: UnsafeRawBufferPointer(bytes.bytes))
        try device.flush()
        memset(bytes.pointer, 0, 512)
        try device.read(at: 512, into: bytes.bytes)
        #expect(isAll(9, bytes.bytes, 0..<bytes.count))
        // Requests in clients' sectors, smaller than the device's.
        try device.zero(at: 512, length: 512)
        try device.read(at: 512, into: bytes.bytes)
        #expect(isAll(0, bytes.bytes, 0..<bytes.count))
        try device.discard(at: 512, length: 1024)
    }

    @Test(arguments: QueueKind.available)
    func throughAQueue(_ kind: QueueKind) throws {
        let scratch = Scratch()
        let loop = try #require(LoopDevice(over: scratch.file(size: UInt64(Self.size))))
        let device = try FileDevice(path: loop.path, access: .readWrite)
        let harness = try Harness(kind)
        let bytes = AlignedBuffer(count: 8192)
        memset(bytes.pointer, 5, 4096)
        var vector = iovec(iov_base: bytes.pointer, iov_len: 4096)
        try withUnsafePointer(to: &vector) { vectors in
            harness.queue.write(
                device.fileDescriptor, at: 512, vectors: vectors, count: 1, tag: 1)
            try harness.wait(1)
        }
        harness.queue.read(
            device.fileDescriptor, at: 512, into: bytes.pointer + 4096, length: 4096, tag: 2)
        harness.queue.flush(device.fileDescriptor, tag: 3)
        try harness.wait(2, 3)
        #expect(harness.results == [1: 4096, 2: 4096, 3: 0])
        #expect(memcmp(bytes.pointer, bytes.pointer + 4096, 4096) == 0)
        harness.queue.allocate(
            device.fileDescriptor, mode: AllocateMode.zeroRange, at: 512, length: 4096, tag: 4)
        try harness.wait(4)
        #expect(harness.results[4] == 0)
        try device.read(
            at: 512, into: UnsafeMutableRawBufferPointer(start: bytes.pointer, count: 4096))
        #expect(isAll(0, bytes.bytes, 0..<4096))
    }
}
