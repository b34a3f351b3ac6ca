// File operations through both kinds of queue.

import Foundation
import Testing

@testable import BlockIO

@Suite struct QueueFileTests {
    private static let page = 4096

    @Test(arguments: QueueKind.available, [true, false])
    func writesAndReadsBack(_ kind: QueueKind, direct: Bool) throws {
        let scratch = Scratch()
        let device = try FileDevice(
            path: scratch.file(size: 1 << 20), access: .readWrite, direct: direct)
        let harness = try Harness(kind)
        let source = AlignedBuffer(count: 3 * Self.page)
        for index in 0..<source.count { source.bytes[index] = UInt8(truncatingIfNeeded: index * 7) }
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 2)
        defer { vectors.deallocate() }
        vectors[0] = iovec(iov_base: source.pointer, iov_len: Self.page)
        vectors[1] = iovec(iov_base: source.pointer + Self.page, iov_len: 2 * Self.page)
        let fd = device.fileDescriptor
        harness.queue.write(fd, at: 512, vectors: vectors, count: 2, tag: 1)
        harness.queue.write(fd, at: 65536, vectors: vectors, count: 2, tag: 2)
        harness.queue.write(fd, at: 131072, vectors: vectors, count: 1, tag: 3)
        try harness.wait(1, 2, 3)
        #expect(harness.results == [1: 12288, 2: 12288, 3: 4096])
        harness.queue.flush(fd, tag: 4)
        try harness.wait(4)
        #expect(harness.results[4] == 0)
        for (tag, offset) in [(UInt64(5), UInt64(512)), (6, 65536)] {
            let target = AlignedBuffer(count: source.count)
            harness.queue.read(
                fd, at: offset, into: target.pointer, length: target.count, tag: tag)
            try harness.wait(tag)
            #expect(harness.results[tag] == 12288)
            #expect(memcmp(target.pointer, source.pointer, source.count) == 0)
        }
        withExtendedLifetime(device) {}
    }

    @Test(arguments: QueueKind.available)
    func readsShortAtTheEnd(_ kind: QueueKind) throws {
        let scratch = Scratch()
        let device = try FileDevice(
            path: scratch.file(size: 8192), access: .readOnly, direct: false)
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 8192)
        harness.queue.read(
            device.fileDescriptor, at: 4096, into: buffer.pointer, length: 8192, tag: 1)
        harness.queue.read(
            device.fileDescriptor, at: 8192, into: buffer.pointer, length: 512, tag: 2)
        try harness.wait(1, 2)
        #expect(harness.results == [1: 4096, 2: 0])
    }

    @Test(arguments: QueueKind.available)
    func errorsComeAsResults(_ kind: QueueKind) throws {
        let scratch = Scratch()
        let device = try FileDevice(path: scratch.file(size: 8192), access: .readOnly)
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 512)
        var vector = iovec(iov_base: buffer.pointer, iov_len: 512)
        try withUnsafePointer(to: &vector) { vectors in
            harness.queue.write(
                device.fileDescriptor, at: 0, vectors: vectors, count: 1, tag: 1)
            harness.queue.read(-1, at: 0, into: buffer.pointer, length: 512, tag: 2)
            harness.queue.flush(-1, tag: 3)
            harness.queue.receive(-1, into: buffer.pointer, length: 512, tag: 4)
            harness.queue.poll(-1, tag: 5)
            harness.queue.accept(-1, tag: 6)
            try harness.wait(1, 2, 3, 4, 5, 6)
        }
        for tag in UInt64(1)...6 { #expect(harness.results[tag] == -EBADF, "tag \(tag)") }
    }

    @Test(arguments: QueueKind.available)
    func allocateGivesSpaceBackAndTakesIt(_ kind: QueueKind) throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 1 << 20)
        let device = try FileDevice(path: path, access: .readWrite)
        let ones = AlignedBuffer(count: 1 << 20)
        memset(ones.pointer, 0xff, ones.count)
        try device.write(at: 0, from: UnsafeRawBufferPointer(ones.bytes))
        try device.flush()
        let full = allocatedBytes(path)
        let harness = try Harness(kind)
        harness.queue.allocate(
            device.fileDescriptor, mode: AllocateMode.punchHole, at: 0, length: 1 << 19, tag: 1)
        try harness.wait(1)
        #expect(harness.results[1] == 0)
        #expect(allocatedBytes(path) <= full - (1 << 19) + 65536)
        harness.queue.allocate(
            device.fileDescriptor, mode: AllocateMode.zeroRange, at: 0, length: 1 << 20, tag: 2)
        try harness.wait(2)
        try #require(harness.results[2] == 0 || harness.results[2] == -EOPNOTSUPP)
        guard harness.results[2] == 0 else { return }
        #expect(allocatedBytes(path) >= 1 << 20)
        try device.read(at: 0, into: ones.bytes)
        #expect(isAll(0, ones.bytes, 0..<ones.count))
    }

    /// Ten thousand reads started before the first turn, through 64 entries and a completion ring
    /// of 256: both overflow many times, and none may be lost or come twice.
    @Test(arguments: QueueKind.available)
    func neverLosesAnOperation(_ kind: QueueKind) throws {
        let count = 10_000
        let scratch = Scratch()
        let device = try FileDevice(
            path: scratch.file(size: UInt64(count) * 8), access: .readWrite, direct: false)
        let numbers = AlignedBuffer(count: count * 8)
        for index in 0..<count {
            numbers.pointer.storeBytes(of: index, toByteOffset: index * 8, as: Int.self)
        }
        try device.write(at: 0, from: UnsafeRawBufferPointer(numbers.bytes))
        let target = AlignedBuffer(count: count * 8)
        memset(target.pointer, 0xff, target.count)
        let harness = try Harness(kind, entries: 64)
        for index in 0..<count {
            harness.queue.read(
                device.fileDescriptor, at: UInt64(index) * 8, into: target.pointer + index * 8,
                length: 8, tag: UInt64(index))
        }
        #expect(harness.queue.outstanding == count + 1)
        try harness.wait { harness.results.count == count }
        #expect(harness.queue.outstanding == 1)
        #expect(harness.results.values.allSatisfy { $0 == 8 })
        #expect(memcmp(target.pointer, numbers.pointer, numbers.count) == 0)
    }

    /// Completions that start the next operation, more at once than there are entries.
    @Test(arguments: QueueKind.available)
    func operationsStartedByCompletions(_ kind: QueueKind) throws {
        let total = 10_000
        let atOnce = 200
        let scratch = Scratch()
        let device = try FileDevice(
            path: scratch.file(size: 4096), access: .readWrite, direct: false)
        let queue = try kind.make(entries: 64)
        let buffer = AlignedBuffer(count: 512 * atOnce)
        var started = 0
        var finished = 0
        func start() {
            queue.read(
                device.fileDescriptor, at: 0, into: buffer.pointer + (started % atOnce) * 512,
                length: 512, tag: UInt64(started))
            started += 1
        }
        for _ in 0..<atOnce { start() }
        let limit = monotonicSeconds() + 5
        while finished < total && monotonicSeconds() < limit {
            try queue.run(wait: true) { _, result in
                #expect(result == 512)
                finished += 1
                if started < total { start() }
            }
        }
        #expect(finished == total)
        #expect(queue.outstanding == 0)
    }
}
