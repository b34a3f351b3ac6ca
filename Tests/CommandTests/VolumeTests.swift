// Volumes without a server: names, sizes, what is listed, growth, adoption.

import Control
import Foundation
import Testing
import ThinPool

@Suite struct VolumeTests {
    let scratch: Scratch
    init() throws {
        scratch = try Scratch()
        try scratch.makePool()
    }

    @Test(arguments: [
        "", "a b", "a/b", "..", ".hidden", "ä", "a\nb", "a\tb", "*",
        String(repeating: "x", count: 256),
    ])
    func invalidNames(name: String) throws {
        for verb in [
            ["volume", "create", scratch.pool, name, "1MiB"],
            ["volume", "snapshot", scratch.pool, "vol", name],
        ] {
            let outcome = try scratch.run(verb)
            #expect(outcome.isFailure && outcome.error.contains("name"), "\(verb): \(outcome)")
        }
        try scratch.expectIntact()
    }

    @Test func longestName() throws {
        let name = String(repeating: "x", count: 255)
        try scratch.must("volume", "create", scratch.pool, name, "1MiB")
        try scratch.expectIntact(["vol", name])
    }

    @Test func takenNames() throws {
        for verb in [
            ["volume", "create", scratch.pool, "vol", "1MiB"],
            ["volume", "snapshot", scratch.pool, "vol", "vol"],
        ] {
            let outcome = try scratch.run(verb)
            #expect(outcome.isFailure && outcome.error.contains("exists"), "\(outcome)")
        }
        try scratch.expectIntact()
    }

    @Test func unknownNames() throws {
        for verb in [
            ["volume", "snapshot", scratch.pool, "none", "new"],
            ["volume", "delete", scratch.pool, "none"],
        ] {
            let outcome = try scratch.run(verb)
            #expect(outcome.isFailure && outcome.error.contains("no volume \"none\""), "\(outcome)")
        }
        try scratch.expectIntact()
    }

    @Test(arguments: [
        "0", "0GiB", "-1", "-512", "1000", "513", "1.5M", "", "M", "x", "10X", "16E", "9P",
        "18446744073709551616", "18446744073709551615P", "0x200",
    ])
    func invalidSizes(size: String) throws {
        let outcome = try scratch.run("volume", "create", scratch.pool, "new", size)
        #expect(outcome.status == 64 && !outcome.error.isEmpty, "\(outcome)")
        try scratch.expectIntact()
    }

    @Test(arguments: [
        ("512", 512), ("4k", 4096), ("1KiB", 1024), ("2M", 2 << 20), ("3GiB", 3 << 30),
        ("1T", 1 << 40), ("8P", 8 << 50), ("1024B", 1024),
    ])
    func sizes(text: String, bytes: UInt64) throws {
        try scratch.must("volume", "create", scratch.pool, "new", text)
        let list = try scratch.must("volume", "list", scratch.pool, "--json")
        let volumes = try JSONDecoder().decode([VolumeInfo].self, from: Data(list.utf8))
        #expect(volumes.first { $0.name == "new" }?.size == bytes)
        try scratch.expectIntact(["new", "vol"])
    }

    @Test func describesSizes() {
        let cases: [(UInt64, String)] = [
            (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 40, "1 TiB"),
            ((1 << 30) - 1, "1023.9 MiB"), (UInt64.max, "15.9 EiB"),
        ]
        for (bytes, text) in cases { #expect(ByteSize(bytes: bytes).description == text) }
    }

    @Test func jsonDecodes() throws {
        try scratch.must("volume", "snapshot", scratch.pool, "vol", "snap")
        let list = try scratch.must("volume", "list", scratch.pool, "--json")
        let volumes = try JSONDecoder().decode([VolumeInfo].self, from: Data(list.utf8))
        #expect(volumes.map(\.name) == ["snap", "vol"])
        #expect(volumes[0].origin == "vol" && volumes[0].size == 32 << 20)
        #expect(volumes.allSatisfy { $0.state == .ready && $0.connections == 0 })
        let status = try JSONDecoder().decode(
            PoolStatus.self,
            from: Data(try scratch.must("pool", "status", scratch.pool, "--json").utf8))
        #expect(status.mode == .writable && status.volumes == 2 && status.dataBlocks == 1024)
        #expect(status.problems.isEmpty && status.reason == nil)
    }

    @Test func tablesAreAligned() throws {
        try scratch.must("volume", "create", scratch.pool, "a-longer-name", "1MiB")
        let lines = try scratch.must("volume", "list", scratch.pool)
            .split(separator: "\n").map(String.init)
        #expect(lines.count == 3 && lines[0].hasPrefix("NAME           ID  SIZE"))
        let column = try #require(lines[0].range(of: "SIZE")).lowerBound.utf16Offset(in: lines[0])
        for (line, size) in zip(lines.dropFirst(), ["1 MiB", "32 MiB"]) {
            #expect(line.dropFirst(column).hasPrefix(size), "\(line)")
        }
    }

    @Test func comesAndGoes() throws {
        for name in ["a", "b", "c"] {
            try scratch.must("volume", "snapshot", scratch.pool, "vol", name)
        }
        try scratch.must("volume", "delete", scratch.pool, "b")
        try scratch.must("volume", "delete", scratch.pool, "vol")
        try scratch.expectIntact(["a", "c"])
        let check = try scratch.tool("thin_check", scratch.pool + "/metadata")
        #expect(check.status == 0, "\(check)")
    }

    @Test func grows() throws {
        try scratch.must("pool", "grow", scratch.pool, "--data-size", "128MiB")
        try scratch.must("pool", "grow", scratch.pool, "--metadata-size", "8MiB")
        let status = try JSONDecoder().decode(
            PoolStatus.self,
            from: Data(try scratch.must("pool", "status", scratch.pool, "--json").utf8))
        #expect(status.dataBlocks == 2048 && status.metadataBlocks == 2048)
        try scratch.expectIntact()
        for arguments in [["--data-size", "64MiB"], ["--metadata-size", "2MiB"]] {
            let outcome = try scratch.run(["pool", "grow", scratch.pool] + arguments)
            #expect(outcome.isFailure && outcome.error.contains("does not shrink"), "\(outcome)")
        }
        #expect(try scratch.run("pool", "grow", scratch.pool).status == 64)
        try scratch.expectIntact()
    }

    /// Each GiB of data blocks takes a metadata block, and there are not so many.
    @Test func growsOnlyAsFarAsTheMetadataAllows() throws {
        let grow = ["pool", "grow", scratch.pool, "--data-size", "3TiB"]
        let outcome = try scratch.run(grow)
        #expect(outcome.isFailure && outcome.error.contains("no room"), "\(outcome)")
        let size = try FileManager.default.attributesOfItem(atPath: scratch.pool + "/data")[.size]
        #expect((size as? UInt64 ?? .max) < 1 << 40)
        try scratch.expectIntact()
        #expect(try scratch.run(grow + ["--metadata-size", "64MiB"]).status == 0)
        try scratch.expectIntact()
    }

    /// A pool that another program made has thin devices and no catalogue.
    @Test func adopts() throws {
        let xml = scratch.path("pool.xml")
        try """
        <superblock uuid="" time="0" transaction="1" version="2" data_block_size="128" \
        nr_data_blocks="1024">
          <device dev_id="7" mapped_blocks="2" transaction="0" creation_time="0" snap_time="0">
            <range_mapping origin_begin="0" data_begin="5" length="2" time="0"/>
          </device>
        </superblock>
        """.write(toFile: xml, atomically: true, encoding: .utf8)
        let restore = try scratch.tool("thin_restore", "-i", xml, "-o", scratch.pool + "/metadata")
        try #require(restore.status == 0, "\(restore)")
        #expect(try scratch.names() == [nil])
        #expect(try scratch.must("volume", "list", scratch.pool).contains("unnamed"))

        // Its two blocks are 64 KiB each.
        let short = try scratch.run("volume", "adopt", scratch.pool, "7", "seven", "64KiB")
        #expect(short.isFailure && short.error.contains("at least 131072 bytes"), "\(short)")
        #expect(try scratch.names() == [nil])
        try scratch.must("volume", "adopt", scratch.pool, "7", "seven", "65KiB")
        try scratch.expectIntact(["seven"])
        for (arguments, words) in [
            (["7", "again", "1MiB"], "has a name already"),
            (["8", "eight", "1MiB"], "no thin device"),
            (["16777215", "catalogue", "1MiB"], "no thin device"),
            (["7", "seven", "1MiB"], "exists"),
        ] {
            let outcome = try scratch.run(["volume", "adopt", scratch.pool] + arguments)
            #expect(outcome.isFailure && outcome.error.contains(words), "\(outcome)")
        }
        #expect(try scratch.run("volume", "adopt", scratch.pool, "-1", "x", "1MiB").status == 64)
        try scratch.expectIntact(["seven"])
    }

    @Test(arguments: [
        ["volume"], ["nothing"], ["volume", "create"], ["pool", "status"], ["serve"],
        ["pool", "status", ""], ["serve", "p", "--reactors", "0"], ["serve", "p", "--listen", "x"],
        ["serve", "p", "--listen", "::1:10809"], ["serve", "p", "--listen", "h:99999"],
        ["serve", "p", "--io", "magic"], ["serve", "p", "--commit-interval", "0"],
        ["serve", "p", "--commit-interval", "-1"], ["serve", "p", "--max-connections", "0"],
        ["serve", "p", "--cache-size", "1K"], ["serve", "p", "--log-level", "loud"],
        ["serve", "p", "--unix", ""], ["serve", "p", "--unix", "s", "--unix", "s"], ["pool"],
        ["help", "bogus"], ["help", "pool", "bogus"],
    ])
    func wrongUsage(arguments: [String]) throws {
        let outcome = try scratch.run(arguments)
        #expect(outcome.status == 64 && outcome.output.isEmpty, "\(outcome)")
    }

    @Test func helpAndVersion() throws {
        for arguments in [
            ["--help"], ["serve", "--help"], ["--version"], ["help"], ["help", "pool", "create"],
        ] {
            let outcome = try scratch.run(arguments)
            #expect(outcome.status == 0 && !outcome.output.isEmpty, "\(outcome)")
        }
    }
}
