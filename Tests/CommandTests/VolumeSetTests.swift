// Read-only volumes and descriptions, with a server and without one.

import Foundation
import Testing
import ThinPool

@Suite struct VolumeSetTests {
    let scratch: Scratch
    init() throws {
        scratch = try Scratch()
        try scratch.makePool()
    }

    private func info(_ name: String) throws -> VolumeInfo {
        let list = try scratch.must("volume", "list", scratch.pool, "--json")
        let volumes = try JSONDecoder().decode([VolumeInfo].self, from: Data(list.utf8))
        return try #require(volumes.first { $0.name == name })
    }

    @Test(arguments: [false, true]) func isSetAndListed(served: Bool) throws {
        let server = served ? try TestServer(scratch) : nil
        let made = try scratch.must(
            "volume", "snapshot", scratch.pool, "vol", "snap", "--read-only", "--description",
            "as of monday")
        #expect(made == "created volume snap, a read-only snapshot of vol\n")
        #expect(try info("snap").readOnly == true)
        #expect(try info("snap").description == "as of monday")
        #expect(try info("vol").readOnly == false && info("vol").description == nil)
        let lines = try scratch.must("volume", "list", scratch.pool).split(separator: "\n")
        #expect(lines[0].hasSuffix("  DESCRIPTION"))
        #expect(lines[1].contains("  read-only  as of monday") && lines[2].contains("  ready"))

        try scratch.must("volume", "set", scratch.pool, "snap", "--read-only", "false")
        #expect(try info("snap").readOnly == false)
        #expect(try info("snap").description == "as of monday")
        try scratch.must(
            "volume", "set", scratch.pool, "snap", "--read-only", "true", "--description", "")
        #expect(try info("snap").readOnly == true && info("snap").description == nil)
        #expect(try !scratch.must("volume", "list", scratch.pool).contains("DESCRIPTION"))
        try scratch.must(
            "volume", "create", scratch.pool, "new", "1MiB", "--description", "größer")
        #expect(try info("new").description == "größer")
        if let server { #expect(server.stop().status == 0) }
        #expect(try info("snap").readOnly == true && info("new").description == "größer")
        try scratch.must("volume", "delete", scratch.pool, "snap")
        try scratch.expectIntact(["new", "vol"])
    }

    @Test func clientsDoNotWrite() throws {
        try scratch.must("volume", "snapshot", scratch.pool, "vol", "snap", "--read-only")
        let server = try TestServer(scratch)
        let info = try scratch.tool("nbdinfo", server.export("snap"))
        #expect(info.status == 0 && info.output.contains("is_read_only: true"), "\(info)")
        // qemu-io opens it for writing, which it refuses.
        #expect(try server.client("snap", "write -P 1 0 64k").status != 0)
        #expect(server.stop().status == 0)
    }

    @Test func wrongUsage() throws {
        for arguments in [
            [], ["--read-only", "maybe"], ["--read-only"], ["--description", "a\nb"],
            ["--description", String(repeating: "x", count: 256)],
        ] {
            let outcome = try scratch.run(["volume", "set", scratch.pool, "vol"] + arguments)
            #expect(outcome.status == 64 && !outcome.error.isEmpty, "\(arguments): \(outcome)")
        }
        let outcome = try scratch.run("volume", "set", scratch.pool, "none", "--read-only", "true")
        #expect(outcome.isFailure && outcome.error.contains("no volume \"none\""), "\(outcome)")
        try scratch.expectIntact()
    }
}
