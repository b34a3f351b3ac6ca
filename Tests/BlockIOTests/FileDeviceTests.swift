// FileDevice on regular files: opening, owning, transferring, and the space behind it.

import Foundation
import Testing

@testable import BlockIO

@Suite struct FileDeviceTests {
    // MARK: - Opening

    @Test func errorsSayWhatIsWrong() throws {
        let scratch = Scratch()
        func opening(_ path: String) -> DeviceError? {
            deviceError { () throws(DeviceError) in
                _ = try FileDevice(path: path, access: .readWrite)
            }
        }
        let missing = opening(scratch.path("missing"))
        #expect(missing?.code == ENOENT)
        #expect(missing?.description.contains("no such file") == true)
        #expect(missing?.path == scratch.path("missing"))
        #expect(opening(scratch.directory)?.code == EISDIR)
        #expect(opening("/dev/null")?.reason.contains("neither a regular file nor") == true)
        let fifo = scratch.path("fifo")
        #expect(mkfifo(fifo, 0o600) == 0)
        #expect(opening(fifo)?.reason.contains("neither a regular file nor") == true)
        let empty = scratch.path("empty")
        #expect(FileManager.default.createFile(atPath: empty, contents: nil))
        #expect(opening(empty)?.reason.contains("too short: 0 bytes") == true)
    }

    @Test(.enabled(if: geteuid() != 0, "root may do everything"))
    func permissionIsDenied() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 4096)
        chmod(path, 0)
        let error = deviceError { () throws(DeviceError) in
            _ = try FileDevice(path: path, access: .readOnly)
        }
        #expect(error?.code == EACCES)
        #expect(error?.reason.contains("permission denied") == true)
    }

    @Test func turnsAsItsDiskDoes() throws {
        // A disk that turns with a partition, one that does not, and one that does not say.
        let scratch = Scratch()
        let files = FileManager.default
        for (disk, answer) in [("sda/", "1\n"), ("vda/", "0\n"), ("dm/", "")] {
            let queue = scratch.path("devices/" + disk + "queue")
            try files.createDirectory(atPath: queue, withIntermediateDirectories: true)
            try answer.write(toFile: queue + "/rotational", atomically: true, encoding: .utf8)
        }
        try files.createDirectory(
            atPath: scratch.path("devices/sda/sda1"), withIntermediateDirectories: true)
        let blocks = scratch.path("block")
        try files.createDirectory(atPath: blocks, withIntermediateDirectories: true)
        for (number, disk) in [("8:0", "sda"), ("8:1", "sda/sda1"), ("9:0", "vda"), ("7:0", "dm")] {
            try files.createSymbolicLink(
                atPath: blocks + "/" + number,
                withDestinationPath: scratch.path("devices/" + disk))
        }
        let turns = [(8, 0), (8, 1), (9, 0), (7, 0), (5, 5)].map {
            Rotation.isRotational(major: $0.0, minor: $0.1, in: blocks)
        }
        #expect(turns == [true, true, false, false, false])
    }

    @Test func filesInMemoryDoNotTurn() throws {
        let path = "/dev/shm/wafer-rotation-\(getpid())"
        try FileDevice.create(path: path, size: 4096)
        defer { unlink(path) }
        let device = try FileDevice(path: path, access: .readWrite)
        #expect(device.isInMemory && !device.isRotational)
    }

    @Test func createdFilesAreSparseAndNew() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 1 << 30)
        #expect(allocatedBytes(path) < 1 << 20)
        let device = try FileDevice(path: path, access: .readWrite)
        #expect(device.size == 1 << 30)
        #expect(!device.isBlockDevice)
        #expect(device.sectorSize == 512)
        #expect(device.isDirect == (device.directRefusal == nil))
        let again = deviceError { () throws(DeviceError) in
            try FileDevice.create(path: path, size: 4096)
        }
        #expect(again?.code == EEXIST)
        #expect(device.size == 1 << 30, "the refused creation changed the file")
        let nowhere = deviceError { () throws(DeviceError) in
            try FileDevice.create(path: scratch.path("no/where"), size: 4096)
        }
        #expect(nowhere?.code == ENOENT)
    }

    @Test func reservedFilesHaveTheirSpace() throws {
        let scratch = Scratch()
        let path = scratch.path("device")
        try FileDevice.create(path: path, size: 1 << 20, reserving: true)
        #expect(allocatedBytes(path) >= 1 << 20)
        let device = try FileDevice(path: path, access: .readWrite)
        try expectZero(0..<1 << 20, in: device)
        try device.grow(to: 2 << 20, reserving: true)
        #expect(allocatedBytes(path) >= 2 << 20)
        // No file system has room for that: the file is as it was.
        let growing = deviceError { () throws(DeviceError) in
            try device.grow(to: 1 << 42, reserving: true)
        }
        #expect(growing != nil && device.size == 2 << 20)
        let creating = deviceError { () throws(DeviceError) in
            try FileDevice.create(path: scratch.path("large"), size: 1 << 42, reserving: true)
        }
        #expect(creating != nil)
        #expect(access(scratch.path("large"), F_OK) != 0)
    }

    @Test func reservingFillsHolesOnly() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 4 << 20)
        let device = try FileDevice(path: path, access: .readWrite)
        let bytes = AlignedBuffer(count: 4096)
        memset(bytes.pointer, 7, bytes.count)
        try device.write(at: 1 << 20, from: UnsafeRawBufferPointer(bytes.bytes))
        #expect(allocatedBytes(path) < 1 << 20)
        try device.reserve()
        #expect(allocatedBytes(path) >= 4 << 20)
        #expect(device.size == 4 << 20)
        memset(bytes.pointer, 0, bytes.count)
        try device.read(at: 1 << 20, into: bytes.bytes)
        #expect(isAll(7, bytes.bytes, 0..<bytes.count))
    }

    @Test func symbolicLinksAreFollowed() throws {
        let scratch = Scratch()
        let target = try scratch.file(size: 8192)
        #expect(symlink(target, scratch.path("link")) == 0)
        #expect(try FileDevice(path: scratch.path("link"), access: .readOnly).size == 8192)
    }

    @Test func sizesThatAreNoWholeSectorsAreBuffered() throws {
        let scratch = Scratch()
        let device = try FileDevice(path: scratch.file(size: 4000), access: .readWrite)
        #expect(!device.isDirect)
        #expect(device.directRefusal?.contains("4000 bytes") == true)
        let bytes = AlignedBuffer(count: 100)
        memset(bytes.pointer, 7, 100)
        try device.write(at: 3900, from: UnsafeRawBufferPointer(bytes.bytes))
        memset(bytes.pointer, 0, 100)
        try device.read(at: 3900, into: bytes.bytes)
        #expect(isAll(7, bytes.bytes, 0..<bytes.count))
        #expect(device.size == 4000)
    }

    // MARK: - Owning

    @Test func onlyOneOwner() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 4096)
        var first: FileDevice? = try FileDevice(path: path, access: .readWrite)
        for access in [FileDevice.Access.readOnly, .readWrite] {
            let error = deviceError { () throws(DeviceError) in
                _ = try FileDevice(path: path, access: access)
            }
            #expect(error?.operation == "lock")
            #expect(error?.code == EBUSY)
            #expect(error?.reason.contains("another process has it open") == true)
        }
        _ = try FileDevice(path: path, access: .readOnly, locking: .none)
        withExtendedLifetime(first) {}
        first = nil
        _ = try FileDevice(path: path, access: .readOnly)
    }

    private static let flockPath = "/usr/bin/flock"

    @Test(
        .enabled(
            if: FileManager.default.isExecutableFile(atPath: flockPath), "flock(1) is missing"))
    func otherProcessesAreOwnersToo() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 4096)
        let device = try FileDevice(path: path, access: .readWrite)
        // flock(1) fails with 1 when it does not get the lock at once.
        #expect(runProgram(Self.flockPath, "-n", path, "true")?.status == 1)
        withExtendedLifetime(device) {}

        let other = try scratch.file("other", size: 4096)
        let holder = Process()
        holder.executableURL = URL(fileURLWithPath: Self.flockPath)
        holder.arguments = [other, "sh", "-c", "echo held; exec cat"]
        let (input, output) = (Pipe(), Pipe())
        holder.standardInput = input
        holder.standardOutput = output
        try holder.run()
        #expect(output.fileHandleForReading.readData(ofLength: 4).count == 4)
        let error = deviceError { () throws(DeviceError) in
            _ = try FileDevice(path: other, access: .readWrite)
        }
        #expect(error?.code == EBUSY)
        try input.fileHandleForWriting.close()
        holder.waitUntilExit()
        _ = try FileDevice(path: other, access: .readWrite)
    }

    // MARK: - Transferring

    @Test func whatReachesBeyondTheEndIsRefused() throws {
        let scratch = Scratch()
        let device = try FileDevice(path: scratch.file(size: 8192), access: .readWrite)
        let bytes = AlignedBuffer(count: 4096)
        for offset in [4608, 8192, 1 << 40, .max - 100] as [UInt64] {
            let writing = deviceError { () throws(DeviceError) in
                try device.write(at: offset, from: UnsafeRawBufferPointer(bytes.bytes))
            }
            #expect(writing?.operation == "write" && writing?.offset == offset)
            let reading = deviceError { () throws(DeviceError) in
                try device.read(at: offset, into: bytes.bytes)
            }
            #expect(reading?.operation == "read" && reading?.offset == offset)
            _ = deviceError { () throws(DeviceError) in
                try device.discard(at: offset, length: 4096)
            }
            _ = deviceError { () throws(DeviceError) in
                try device.zero(at: offset, length: 4096)
            }
        }
        #expect(device.size == 8192)
    }

    @Test func readOnlyMeansSo() throws {
        let scratch = Scratch()
        let device = try FileDevice(path: scratch.file(size: 8192), access: .readOnly)
        let bytes = AlignedBuffer(count: 4096)
        try device.read(at: 0, into: bytes.bytes)
        let errors = [
            deviceError { () throws(DeviceError) in
                try device.write(at: 0, from: UnsafeRawBufferPointer(bytes.bytes))
            },
            deviceError { () throws(DeviceError) in try device.discard(at: 0, length: 4096) },
            deviceError { () throws(DeviceError) in try device.zero(at: 0, length: 4096) },
            deviceError { () throws(DeviceError) in try device.grow(to: 16384) },
        ]
        for error in errors {
            #expect(error?.code == EROFS)
            #expect(error?.reason.contains("read-only") == true)
        }
    }

    /// Reads and writes of any offset, length and memory address, compared with a copy in memory;
    /// with direct I/O most of them go through the bounce buffer.
    @Test(arguments: [true, false])
    func anyRangeAndAnyMemory(direct: Bool) throws {
        let size = 4 << 20
        let scratch = Scratch()
        let device = try FileDevice(
            path: scratch.file(size: UInt64(size)), access: .readWrite, direct: direct)
        #expect(direct || !device.isDirect)
        #expect(direct || device.directRefusal == nil)
        let model = AlignedBuffer(count: size)
        let memory = AlignedBuffer(count: size + 4096)
        var random = RepeatableRandom(state: 42)
        for round in 0..<150 {
            let isSector = round % 3 == 0
            let unit = isSector ? 512 : 1
            let longest = round % 10 == 0 ? 3 << 20 : 20_000
            let length = Int.random(in: 1...longest / unit, using: &random) * unit
            let offset = Int.random(in: 0...(size - length) / unit, using: &random) * unit
            let shift = round % 2 == 0 ? 0 : Int.random(in: 0..<4096, using: &random)
            let start = memory.pointer + shift
            if round % 2 == 0 || Bool.random(using: &random) {
                for index in 0..<length {
                    start.storeBytes(
                        of: UInt8(truncatingIfNeeded: index &* 31 &+ round), toByteOffset: index,
                        as: UInt8.self)
                }
                try device.write(
                    at: UInt64(offset),
                    from: UnsafeRawBufferPointer(start: start, count: length))
                memcpy(model.pointer + offset, start, length)
            } else {
                try device.read(
                    at: UInt64(offset),
                    into: UnsafeMutableRawBufferPointer(start: start, count: length))
                try #require(memcmp(start, model.pointer + offset, length) == 0, "round \(round)")
            }
        }
        try device.flush()
        try device.read(
            at: 0, into: UnsafeMutableRawBufferPointer(start: memory.pointer, count: size))
        #expect(memcmp(memory.pointer, model.pointer, size) == 0)
        #expect(device.size == UInt64(size))
    }

    /// Threads that write neighbouring bytes of the same sectors do not undo each other.
    @Test func partsOfOneSectorFromManyThreads() throws {
        let scratch = Scratch()
        let device = try FileDevice(path: scratch.file(size: 4096), access: .readWrite)
        DispatchQueue.concurrentPerform(iterations: 4) { worker in
            for index in stride(from: worker, to: 512, by: 4) {
                let byte = UInt8(truncatingIfNeeded: index | 1)
                withUnsafeBytes(of: byte) { bytes in
                    do {
                        try device.write(at: UInt64(index), from: bytes)
                    } catch {
                        Issue.record(error)
                    }
                }
            }
        }
        let bytes = AlignedBuffer(count: 512)
        try device.read(at: 0, into: bytes.bytes)
        for index in 0..<512 {
            #expect(bytes.bytes[index] == UInt8(truncatingIfNeeded: index | 1))
        }
    }

    // MARK: - Space

    private func filled(_ path: String, direct: Bool = true) throws -> FileDevice {
        let device = try FileDevice(path: path, access: .readWrite, direct: direct)
        let ones = AlignedBuffer(count: Int(device.size))
        memset(ones.pointer, 0xff, ones.count)
        try device.write(at: 0, from: UnsafeRawBufferPointer(ones.bytes))
        try device.flush()
        return device
    }

    /// Checks that `range` reads as zeroes and all else as 0xff.
    private func expectZero(
        _ range: Range<Int>, in device: FileDevice, _ location: SourceLocation = #_sourceLocation
    ) throws {
        let bytes = AlignedBuffer(count: Int(device.size))
        try device.read(at: 0, into: bytes.bytes)
        #expect(isAll(0xff, bytes.bytes, 0..<range.lowerBound), sourceLocation: location)
        #expect(isAll(0, bytes.bytes, range), sourceLocation: location)
        #expect(
            isAll(0xff, bytes.bytes, range.upperBound..<bytes.count), sourceLocation: location)
    }

    @Test func discardGivesSpaceBack() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 4 << 20)
        let device = try filled(path)
        let before = allocatedBytes(path)
        #expect(before >= 4 << 20)
        try device.discard(at: 1 << 20, length: 2 << 20)
        #expect(allocatedBytes(path) <= before - (2 << 20) + 65536)
        try expectZero(1 << 20..<3 << 20, in: device)
        #expect(device.size == 4 << 20)
        try device.discard(at: 0, length: 0)
    }

    @Test(arguments: ["/dev/shm", NSTemporaryDirectory()])
    func holesAreWhereNothingWasWritten(folder: String) throws {
        let block: UInt64 = 65_536
        let scratch = Scratch(in: folder)
        let device = try FileDevice(
            path: scratch.file(size: 3 * block), access: .readWrite)
        if folder == "/dev/shm" { #expect(device.isInMemory) }
        let descriptor = device.fileDescriptor
        func isHole(_ index: UInt64) -> Bool {
            FileIO.isHole(descriptor, at: index * block, length: block)
        }
        #expect([0, 1, 2].map(isHole) == [true, true, true])
        let page = AlignedBuffer(count: 4096)
        memset(page.pointer, 7, page.count)
        var vector = iovec(iov_base: page.pointer, iov_len: page.count)
        // In the middle of a block: all of it is no hole any more.
        let place = block + block / 2
        #expect(FileIO.write(descriptor, at: place, vectors: &vector, count: 1) == 4096)
        #expect([0, 1, 2].map(isHole) == [true, false, true])
        try device.discard(at: block, length: block)
        #expect([0, 1, 2].map(isHole) == [true, true, true])
        #expect(FileIO.read(descriptor, at: place, into: page.pointer, length: 4096) == 4096)
        let bytes = UnsafeRawBufferPointer(start: page.pointer, count: page.count)
        #expect(bytes.allSatisfy { $0 == 0 })
    }

    @Test func zeroKeepsSpace() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 4 << 20)
        let device = try filled(path)
        try device.zero(at: (1 << 20) + 512, length: 2 << 20)
        try expectZero((1 << 20) + 512..<(3 << 20) + 512, in: device)
        #expect(allocatedBytes(path) >= 4 << 20)
        // A hole is filled with space that later writes need not look for.
        try device.discard(at: 0, length: 1 << 20)
        try device.zero(at: 0, length: 1 << 20)
        #expect(allocatedBytes(path) >= 4 << 20)
    }

    private static let memoryFileSystem = "/dev/shm"

    /// tmpfs knows no ZERO_RANGE: the zeroes are written.
    @Test(
        .enabled(
            if: FileManager.default.isWritableFile(atPath: memoryFileSystem), "no /dev/shm"))
    func zeroIsWrittenWhereItIsNotKnown() throws {
        let scratch = Scratch(in: Self.memoryFileSystem)
        let path = try scratch.file(size: 4 << 20)
        let device = try filled(path)
        try device.zero(at: 1000, length: 3_000_000)
        try expectZero(1000..<3_001_000, in: device)
        #expect(allocatedBytes(path) >= 4 << 20)
        try device.discard(at: 1 << 20, length: 1 << 20)
        #expect(allocatedBytes(path) <= 3 << 20)
    }

    @Test func growsAndReadsZeroThere() throws {
        let scratch = Scratch()
        let device = try filled(scratch.file(size: 8192))
        try device.grow(to: 65536)
        #expect(device.size == 65536)
        try expectZero(8192..<65536, in: device)
        let bytes = AlignedBuffer(count: 4096)
        try device.write(at: 61440, from: UnsafeRawBufferPointer(bytes.bytes))
        let shrinking = deviceError { () throws(DeviceError) in try device.grow(to: 4096) }
        #expect(shrinking?.reason.contains("does not shrink") == true)
        #expect(device.size == 65536)
    }

    /// A file made longer by somebody else can be used as far as it reaches.
    @Test func sizeFollowsTheFile() throws {
        let scratch = Scratch()
        let path = try scratch.file(size: 4096)
        let device = try FileDevice(path: path, access: .readWrite)
        #expect(truncate(path, 16384) == 0)
        let bytes = AlignedBuffer(count: 4096)
        try device.write(at: 12288, from: UnsafeRawBufferPointer(bytes.bytes))
        #expect(device.size == 16384)
    }
}

/// The same numbers in every run.
struct RepeatableRandom: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var mixed = state
        mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
        mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
        return mixed ^ (mixed >> 31)
    }
}
