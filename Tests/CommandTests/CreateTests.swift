// wafer pool create: what it makes, what it refuses, and that a refusal leaves nothing behind.

import Control
import Foundation
import Testing

@Suite struct CreateTests {
    let scratch: Scratch
    init() throws { scratch = try Scratch() }

    private func size(_ path: String) throws -> UInt64 {
        var status = stat()
        try #require(stat(path, &status) == 0)
        return UInt64(status.st_size)
    }

    /// Bytes that it takes on disk.
    private func space(_ path: String) throws -> UInt64 {
        var status = stat()
        try #require(stat(path, &status) == 0)
        return UInt64(status.st_blocks) * 512
    }

    @Test func makesFiles() throws {
        try scratch.must("pool", "create", scratch.pool, "--data-size", "100GiB")
        #expect(try size(scratch.pool + "/data") == 100 << 30)
        // 64 bytes for each of 1,638,400 blocks.
        #expect(try size(scratch.pool + "/metadata") == 104_857_600)
        try scratch.expectIntact([])
        // Only the data is sparse.
        #expect(try space(scratch.pool + "/data") < 1 << 20)
        #expect(try space(scratch.pool + "/metadata") >= 104_857_600)
    }

    @Test func metadataHasBounds() throws {
        try scratch.must("pool", "create", scratch.path("small"), "--data-size", "1MiB")
        #expect(try size(scratch.path("small/metadata")) == 64 << 20)
        #expect(
            PoolPlan.defaultMetadataSize(dataSize: 16380 << 30, blockSize: 64 << 10)
                == 4_161_600 * 4096)
    }

    @Test func linksToGivenDevices() throws {
        let metadata = try scratch.file("m", size: 8 << 20)
        let data = try scratch.file("d", size: 32 << 20)
        try scratch.must(
            "pool", "create", scratch.pool, "--metadata", metadata, "--data", data,
            "--block-size", "128KiB")
        let target = try FileManager.default.destinationOfSymbolicLink(
            atPath: scratch.pool + "/metadata")
        #expect(target == metadata)
        try scratch.expectIntact([])
        let status = try scratch.must("pool", "status", scratch.pool, "--json")
        #expect(status.contains("\"blockSize\" : 131072"))
        #expect(status.contains("\"dataBlocks\" : 256"))
    }

    @Test func takesAnEmptyDirectory() throws {
        mkdir(scratch.pool, 0o755)
        try scratch.must("pool", "create", scratch.pool, "--data-size", "16MiB")
        try scratch.expectIntact([])
    }

    @Test func refusesAnExistingPool() throws {
        try scratch.makePool()
        let before = try scratch.contents(scratch.pool + "/metadata")
        let outcome = try scratch.run(
            "pool", "create", scratch.pool, "--data-size", "16MiB", "--force")
        #expect(outcome.isFailure && outcome.error.contains("is a pool already"), "\(outcome)")
        #expect(try scratch.contents(scratch.pool + "/metadata") == before)
        try scratch.expectIntact()
    }

    @Test func refusesADirectoryInUse() throws {
        mkdir(scratch.pool, 0o755)
        _ = try scratch.file("pool/letter", size: 3)
        let outcome = try scratch.run("pool", "create", scratch.pool, "--data-size", "16MiB")
        #expect(outcome.isFailure && outcome.error.contains("not empty"), "\(outcome)")
        #expect(try FileManager.default.contentsOfDirectory(atPath: scratch.pool) == ["letter"])
    }

    @Test func refusesAPlaceThatIsNot() throws {
        _ = try scratch.file("file", size: 0)
        for place in ["file", "nowhere/pool"] {
            let outcome = try scratch.run(
                "pool", "create", scratch.path(place), "--data-size", "16MiB")
            #expect(outcome.isFailure && outcome.error.contains(place), "\(outcome)")
        }
    }

    @Test func refusesMetadataThatIsNotBlank() throws {
        let metadata = try scratch.file("m", size: 8 << 20, bytes: Array(repeating: 7, count: 10))
        let before = try scratch.contents(metadata)
        let arguments = [
            "pool", "create", scratch.pool, "--metadata", metadata, "--data-size", "16MiB",
        ]
        let outcome = try scratch.run(arguments)
        #expect(outcome.isFailure && outcome.error.contains("--force"), "\(outcome)")
        #expect(try scratch.contents(metadata) == before)
        #expect(!scratch.exists(scratch.pool))
        #expect(try scratch.run(arguments + ["--force"]).status == 0)
        try scratch.expectIntact([])
    }

    @Test func refusesAnotherPoolsMetadata() throws {
        try scratch.makePool()
        let outcome = try scratch.run(
            "pool", "create", scratch.path("other"), "--metadata", scratch.pool + "/metadata",
            "--data-size", "16MiB")
        #expect(outcome.isFailure && outcome.error.contains("thin pool"), "\(outcome)")
        #expect(!scratch.exists(scratch.path("other")))
        try scratch.expectIntact()
    }

    @Test func refusesOneDeviceForBoth() throws {
        let device = try scratch.file("m", size: 8 << 20)
        symlink(device, scratch.path("link"))
        let outcome = try scratch.run(
            "pool", "create", scratch.pool, "--metadata", device, "--data", scratch.path("link"))
        #expect(outcome.isFailure && outcome.error.contains("same device"), "\(outcome)")
        #expect(!scratch.exists(scratch.pool))
    }

    @Test(arguments: [100, 4096, 40_960])
    func refusesShortMetadata(size: UInt64) throws {
        let metadata = try scratch.file("m", size: size)
        let before = try scratch.contents(metadata)
        let outcome = try scratch.run(
            "pool", "create", scratch.pool, "--metadata", metadata, "--data-size", "16MiB")
        #expect(outcome.isFailure && outcome.error.contains(metadata), "\(outcome)")
        #expect(try scratch.contents(metadata) == before)
        #expect(!scratch.exists(scratch.pool))
    }

    @Test func refusesShortData() throws {
        let data = try scratch.file("d", size: 1 << 19)
        for arguments in [["--data", data], ["--data-size", "1023KiB"], ["--data-size", "5000"]] {
            let outcome = try scratch.run(["pool", "create", scratch.pool] + arguments)
            #expect(outcome.isFailure && outcome.error.contains("too small"), "\(outcome)")
            #expect(!scratch.exists(scratch.pool))
        }
    }

    @Test func refusesMissingDevices() throws {
        for option in ["--metadata", "--data"] {
            let outcome = try scratch.run(
                ["pool", "create", scratch.pool, option, scratch.path("none")]
                    + (option == "--metadata" ? ["--data-size", "16MiB"] : []))
            #expect(outcome.isFailure && outcome.error.contains("none"), "\(outcome)")
            #expect(!scratch.exists(scratch.pool))
        }
        let outcome = try scratch.run("pool", "create", scratch.pool, "--data", "/dev/null")
        #expect(outcome.isFailure && outcome.error.contains("/dev/null"), "\(outcome)")
    }

    @Test func refusesDevicesInUse() throws {
        try scratch.makePool()
        let server = try TestServer(scratch)
        let outcome = try scratch.run(
            "pool", "create", scratch.path("other"), "--data", scratch.pool + "/data")
        #expect(outcome.isFailure && outcome.error.contains("has it open"), "\(outcome)")
        #expect(!scratch.exists(scratch.path("other")))
        #expect(server.stop().status == 0)
        try scratch.expectIntact()
    }

    @Test(arguments: ["65535", "96KiB", "32KiB", "2GiB"])
    func refusesBlockSizes(size: String) throws {
        let outcome = try scratch.run(
            "pool", "create", scratch.pool, "--data-size", "16GiB", "--block-size", size)
        #expect(outcome.isFailure && outcome.error.contains("64 KiB"), "\(outcome)")
        #expect(!scratch.exists(scratch.pool))
    }

    /// The file system refuses the file: nothing may stay.
    @Test func takesBackWhatItMade() throws {
        let outcome = try scratch.run("pool", "create", scratch.pool, "--data-size", "8191P")
        #expect(outcome.isFailure, "\(outcome)")
        #expect(!scratch.exists(scratch.pool))
    }

    @Test(arguments: [
        [], ["--data-size"], ["--data-size", "0"], ["--data-size", "-5"],
        ["--data-size", "16EiB"], ["--data-size", "1.5GiB"], ["--data-size", "x"],
        ["--data-size", "99999999999999999999"], ["--data-size", "16384P"],
        ["--data", "d", "--data-size", "1G"], ["--data-size", "1G", "--surprise"],
    ])
    func wrongUsage(arguments: [String]) throws {
        let outcome = try scratch.run(["pool", "create", scratch.pool] + arguments)
        #expect(outcome.status == 64 && !outcome.error.isEmpty, "\(outcome)")
        #expect(!scratch.exists(scratch.pool))
    }
}
