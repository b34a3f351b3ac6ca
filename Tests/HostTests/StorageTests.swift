// Pools on storage that is full, fails late, or has large sectors.

import Foundation
import Testing

@Suite(.serialized, .enabled(if: geteuid() == 0, "mounts and loop devices take root"))
struct StorageTests {
    private static let block = 64 * kibibyte

    /// A write is acknowledged, and the kernel cannot bring it to the disk later. It tells so once,
    /// to whoever asks next.
    @Test(arguments: Engine.allCases, [false, true])
    func writebackThatFailed(engine: Engine, fuaFirst: Bool) throws {
        let system = try SmallFileSystem(size: 40 * mebibyte)
        let disk = try LoopDevice(over: system.file("disk"), size: 24 * mebibyte, sector: 4096)
        defer { withExtendedLifetime((system, disk)) {} }
        let pool = try TestPool(on: disk.path, volumes: [("vol", mebibyte)])
        let server = try Server(pool, engine: engine)
        let client = try Client(server, "vol")
        let first = pattern(1, 0, Int(Self.block))
        try client.write(0, first)
        try client.write(Self.block, pattern(1, Self.block, Int(Self.block)))
        try client.flush()

        // The first block loses its space, and there is no other.
        let contents = try Data(contentsOf: URL(filePath: disk.file))
        let place = try #require(contents.range(of: Data(first)))
        let punched = try Program.run(
            "fallocate",
            ["--punch-hole", "-o", "\(place.lowerBound)", "-l", "\(place.count)", disk.file],
            in: pool.scratch)
        #expect(punched.status == 0, "\(punched)")
        try system.fill()
        try client.write(0, pattern(2, 0, 4096))
        #expect(disk.writeBack() == EIO)

        if fuaFirst {
            let bytes = pattern(2, Self.block, 4096)
            #expect(try code { try client.write(Self.block, bytes, flags: Client.fua) } == EIO)
        }
        #expect(try code { try client.flush() } == EIO)
        #expect(try pool.status().mode == "failed")
        // Who still reads goes on: there is nothing that a restart could give to the next server.
        server.program.signal(SIGUSR2)
        #expect(eventually(within: 30) { server.program.error.contains("no restart") })
        #expect(try client.read(Self.block, 512).count == 512)
        server.kill()
    }

    /// What was acknowledged stays: the metadata has its space.
    @Test(arguments: Engine.allCases) func fullFileSystem(engine: Engine) throws {
        let system = try SmallFileSystem(size: 24 * mebibyte)
        defer { withExtendedLifetime(system) {} }
        let pool = try TestPool(
            at: system.file("pool"), data: 64 * mebibyte, volumes: [("vol", 64 * mebibyte)])
        var written: UInt64 = 0
        do {
            let server = try Server(pool, engine: engine)
            let client = try Client(server, "vol")
            var error: Int32 = 0
            while error == 0 {
                let place = written * Self.block
                error = try code { try client.write(place, pattern(1, place, Int(Self.block))) }
                if error == 0 { written += 1 }
            }
            // The file system is full, not the pool.
            #expect(error == ENOSPC && (200..<384).contains(written), "\(written) blocks")
            try client.flush()
            #expect(try pool.status().mode == "writable")
            server.kill()
        }
        let server = try Server(pool, engine: engine)
        let client = try Client(server, "vol")
        for place in stride(from: 0, to: written * Self.block, by: Int(Self.block)) {
            let bytes = try client.read(place, Int(Self.block))
            #expect(same(bytes, pattern(1, place, Int(Self.block))), "byte \(place)")
        }
        try client.disconnect()
        try server.stop()
        try pool.expectClean()
    }

    @Test func fileSystemWithoutRoomForAPool() throws {
        let system = try SmallFileSystem(size: 2 * mebibyte)
        defer { withExtendedLifetime(system) {} }
        let scratch = try Scratch()
        let outcome = try Program.run(
            Program.wafer,
            [
                "pool", "create", system.file("pool"), "--data-size", "64MiB",
                "--metadata-size", "4MiB",
            ], in: scratch)
        #expect(outcome.status == 1, "\(outcome)")
        #expect(outcome.error.contains("no room"), "\(outcome)")
        #expect(outcome.error.contains("--metadata-size"), "\(outcome)")
        #expect(outcome.error.split(separator: "\n").count == 1, "\(outcome)")
        #expect(try FileManager.default.contentsOfDirectory(atPath: system.path).isEmpty)
    }

    /// A pool whose metadata was copied, or made, as a sparse file.
    @Test func sparseMetadataGetsItsSpace() throws {
        let system = try SmallFileSystem(size: 8 * mebibyte)
        defer { withExtendedLifetime(system) {} }
        let pool = try TestPool(at: system.file("pool"), data: 64 * mebibyte)
        let file = pool.path + "/metadata"
        func space() throws -> UInt64 {
            var status = stat()
            guard stat(file, &status) == 0 else { throw Failure("stat: \(errno)") }
            return UInt64(status.st_blocks) * 512
        }
        func copySparsely() throws {
            let outcome = try Program.run(
                "cp", ["--sparse=always", file, file + "-copy"], in: pool.scratch)
            #expect(outcome.status == 0, "\(outcome)")
            #expect(rename(file + "-copy", file) == 0)
            #expect(try space() < mebibyte)
        }
        try copySparsely()
        try pool.create("vol", mebibyte)
        #expect(try space() >= 4 * mebibyte)
        #expect(try pool.status().problems == [])

        // No room: it is said, and served all the same, since deleting may be what makes room.
        try copySparsely()
        try system.fill()
        let server = try Server(pool)
        let problems = try pool.status().problems
        #expect(problems.count == 1 && problems[0].contains("no room"), "\(problems)")
        #expect(server.program.error.contains("no room"))
        try server.stop()
    }

    /// The device takes whole sectors only, clients zero less.
    @Test(arguments: Engine.allCases) func zeroesInLargeSectors(engine: Engine) throws {
        let scratch = try Scratch()
        let disk = try LoopDevice(over: scratch.file("disk"), size: 16 * mebibyte, sector: 4096)
        defer { withExtendedLifetime(disk) {} }
        let pool = try TestPool(on: disk.path, volumes: [("vol", mebibyte)])
        let server = try Server(pool, engine: engine)
        let client = try Client(server, "vol")
        var expected = pattern(1, 0, Int(Self.block))
        try client.write(0, expected)
        for (offset, length) in [(512, 512), (4096, 1024), (12800, 12288), (32768, 8192)] {
            try client.zero(UInt64(offset), UInt64(length), flags: Client.noHole)
            expected.replaceSubrange(
                offset..<offset + length, with: [UInt8](repeating: 0, count: length))
        }
        #expect(same(try client.read(0, expected.count), expected))
        try client.disconnect()
        try server.stop()
    }
}
