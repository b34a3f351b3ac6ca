// MemoryFile: what is copied is what the file has, and a page that cannot be had is an error.

import Foundation
import Testing

@testable import BlockIO

@Suite final class MemoryFileTests {
    private static let size = 1 << 20
    private let scratch: Scratch
    private let device: FileDevice
    private let memory: MemoryFile
    private let buffer = AlignedBuffer(count: 256 << 10)

    init() throws {
        scratch = Scratch(in: "/dev/shm")
        device = try FileDevice(
            path: scratch.file(size: UInt64(Self.size)), access: .readWrite)
        memory = try #require(MemoryFile(device))
    }

    /// One vector, filled with `value`.
    private func write(
        _ value: UInt8, at offset: Int, length: Int, isNew: Bool, to file: MemoryFile
    ) -> Int32 {
        memset(buffer.pointer, Int32(value), length)
        var vector = iovec(iov_base: buffer.pointer, iov_len: length)
        return file.write(at: UInt64(offset), vectors: &vector, count: 1, isNew: isNew)
    }

    private func read(at offset: Int, length: Int, from file: MemoryFile) -> Int32 {
        memset(buffer.pointer, 0xEE, length)
        return file.read(at: UInt64(offset), into: buffer.pointer, length: length)
    }

    @Test(arguments: [true, false])
    func bytesAreTheFiles(isNew: Bool) throws {
        #expect(write(7, at: 8192, length: 12_288, isNew: isNew, to: memory) == 12_288)
        let contents = try Data(contentsOf: URL(fileURLWithPath: device.path))
        #expect(contents.count == Self.size)
        #expect(contents[..<8192].allSatisfy { $0 == 0 })
        #expect(contents[8192..<20_480].allSatisfy { $0 == 7 })
        #expect(contents[20_480...].allSatisfy { $0 == 0 })
        #expect(read(at: 4096, length: 8192, from: memory) == 8192)
        #expect(isAll(0, buffer.bytes, 0..<4096) && isAll(7, buffer.bytes, 4096..<8192))
    }

    @Test func severalVectorsAreOneWrite() {
        memset(buffer.pointer, 1, 4096)
        memset(buffer.pointer + 4096, 2, 4096)
        let vectors = [
            iovec(iov_base: buffer.pointer, iov_len: 4096),
            iovec(iov_base: buffer.pointer + 4096, iov_len: 512),
        ]
        #expect(memory.write(at: 512, vectors: vectors, count: 2, isNew: true) == 4608)
        #expect(read(at: 0, length: 8192, from: memory) == 8192)
        #expect(isAll(1, buffer.bytes, 512..<4608) && isAll(2, buffer.bytes, 4608..<5120))
        #expect(isAll(0, buffer.bytes, 5120..<8192))
    }

    @Test func longTransfersAreShort() {
        let length = MemoryFile.longestCopy + 4096
        for isNew in [true, false] {
            let written = write(9, at: 0, length: length, isNew: isNew, to: memory)
            #expect(written == Int32(MemoryFile.longestCopy))
        }
        #expect(read(at: 0, length: length, from: memory) == Int32(MemoryFile.longestCopy))
        #expect(isAll(9, buffer.bytes, 0..<MemoryFile.longestCopy))
    }

    @Test func whatTheFileGrowsByIsThere() throws {
        try device.grow(to: UInt64(2 * Self.size))
        #expect(write(5, at: 2 * Self.size - 4096, length: 4096, isNew: false, to: memory) == 4096)
        #expect(read(at: 2 * Self.size - 4096, length: 4096, from: memory) == 4096)
        #expect(isAll(5, buffer.bytes, 0..<4096))
        #expect(read(at: 2 * Self.size, length: 4096, from: memory) == 0)
    }

    @Test func truncatedFilesEnd() {
        #expect(write(3, at: 0, length: 65_536, isNew: false, to: memory) == 65_536)
        #expect(truncate(device.path, 10_000) == 0)
        #expect(read(at: 65_536, length: 4096, from: memory) == 0)
        #expect(read(at: 8192, length: 8192, from: memory) == 10_000 - 8192)
        #expect(isAll(3, buffer.bytes, 0..<10_000 - 8192))
    }

    @Test func onDiskThereIsNone() throws {
        let scratch = Scratch()
        let device = try FileDevice(path: scratch.file(size: 65_536), access: .readWrite)
        #expect((MemoryFile(device) == nil) == !device.isInMemory)
    }

    @Test(.enabled(if: geteuid() == 0, "mounting takes root"))
    func fullFileSystemsAreAnError() throws {
        let folder = scratch.path("small")
        try FileManager.default.createDirectory(
            atPath: folder, withIntermediateDirectories: false)
        let mounted = runProgram("/bin/mount", "-t", "tmpfs", "-o", "size=256k", "none", folder)
        try #require(mounted?.status == 0)
        defer { _ = runProgram("/bin/umount", "-l", folder) }
        try FileDevice.create(path: folder + "/data", size: UInt64(Self.size))
        let device = try FileDevice(path: folder + "/data", access: .readWrite)
        let small = try #require(MemoryFile(device))
        var results: [Int32] = []
        for offset in stride(from: 0, to: Self.size, by: 65_536) {
            results.append(write(4, at: offset, length: 65_536, isNew: false, to: small))
        }
        #expect(results.first == 65_536 && results.last == -ENOSPC, "\(results)")
        // Holes are still zeroes, and what is there is still there.
        #expect(read(at: Self.size - 4096, length: 4096, from: small) == 4096)
        #expect(isAll(0, buffer.bytes, 0..<4096))
        #expect(read(at: 0, length: 4096, from: small) == 4096)
        #expect(isAll(4, buffer.bytes, 0..<4096))
        #expect(write(6, at: 0, length: 4096, isNew: false, to: small) == 4096)
    }
}
