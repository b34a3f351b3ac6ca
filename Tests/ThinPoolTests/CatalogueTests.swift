// What the catalogue says of a volume beside its size: whether it can be written, what people call
// it, and whose snapshot it is.

import CLinux
import Glibc
import Testing
import ThinMetadata

@testable import ThinPool

@Suite struct CatalogueTests {
    private static let block = Bench.blockSize

    private func info(_ bench: Bench, _ name: String) throws -> VolumeInfo {
        try #require(try bench.pool.volumeList().first { $0.name == name })
    }

    @Test func nobodyWritesToAReadOnlyVolume() throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(2 * Self.block), description: "ä home"))
        #expect(try bench.write(1, try bench.volume("v"), at: 0, length: Self.block) == 0)
        try bench.change(
            .snapshot(origin: "v", name: "s", readOnly: true, description: "before"))
        for _ in 0..<2 {
            let s = try bench.volume("s")
            #expect(s.isReadOnly && s.description == "before" && s.origin == "v")
            for fua in [false, true] {
                #expect(try bench.write(2, s, at: 0, length: 512, fua: fua) == EPERM)
                #expect(try bench.write(2, s, at: Self.block, length: 512, fua: fua) == EPERM)
            }
            #expect(try bench.perform(.trim, s, length: Self.block) == EPERM)
            #expect(try bench.perform(.writeZeroes, s, length: Self.block, noHole: true) == EPERM)
            #expect(try bench.perform(.flush, s) == 0)
            #expect(try bench.read(s, at: 0, length: 2 * Self.block)[0] == 1)
            let v = try bench.volume("v")
            #expect(!v.isReadOnly && v.description == "ä home" && v.origin == nil)
            #expect(try bench.write(3, v, at: 512, length: 512) == 0)
            #expect(try info(bench, "s").readOnly == true)
            #expect(try info(bench, "v").readOnly == false)
            #expect(try info(bench, "v").description == "ä home")
            // The same after a restart.
            try bench.rest()
            try bench.reopen()
        }
        try bench.change(.delete(name: "s"))
        #expect(bench.pool.volumeNames() == ["v"])
    }

    @Test func whatIsSetStays() throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(2 * Self.block), description: "one"))
        let v = try bench.volume("v")
        #expect(try bench.write(1, v, at: 0, length: Self.block) == 0)
        try bench.change(.set(name: "v", readOnly: true))
        #expect(v.isReadOnly && v.description == "one")
        #expect(try bench.write(2, v, at: 0, length: 512) == EPERM)
        // Its snapshot can be written all the same.
        try bench.change(.snapshot(origin: "v", name: "s"))
        #expect(try bench.write(2, v, at: 0, length: 512) == EPERM)
        #expect(try bench.write(2, try bench.volume("s"), at: 0, length: 512) == 0)
        try bench.change(.set(name: "v", readOnly: false, description: "two"))
        #expect(!v.isReadOnly && v.description == "two")
        // Shared with the snapshot's first block no more, with its second one never.
        #expect(try bench.write(3, v, at: 0, length: 512) == 0)
        #expect(try bench.read(try bench.volume("s"), at: 0, length: 512)[0] == 2)
        try bench.change(.set(name: "v", description: ""))
        #expect(v.description == nil)
        try bench.rest()
        try bench.reopen()
        let again = try bench.volume("v")
        #expect(!again.isReadOnly && again.description == nil)
    }

    /// Who has it open has been told whether it can be written.
    @Test func aVolumeInUseStaysAsItIs() throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(Self.block)))
        let v = try #require(bench.pool.open(exportNamed: "v"))
        #expect(throws: PoolError.self) { try bench.change(.set(name: "v", readOnly: true)) }
        // That changes nothing for it.
        try bench.change(.set(name: "v", readOnly: false, description: "text"))
        #expect(!v.isReadOnly && v.description == "text")
        bench.pool.close(v)
        // Opened between the question and the change.
        bench.holds = { $0.device == .data && $0.actor == .worker }
        let change = bench.ask(.set(name: "v", readOnly: true))
        try bench.settle()
        #expect(!change.isDone)
        _ = bench.pool.open(exportNamed: "v")
        bench.holds = { _ in false }
        try bench.settle()
        #expect(change.isDone && change.error?.kind == .inUse)
        #expect(!v.isReadOnly)
        #expect(try bench.write(1, v, at: 0, length: 512) == 0)
        try bench.rest()
        bench.pool.close(v)
        try bench.reopen()
        #expect(try !bench.volume("v").isReadOnly)
    }

    @Test(arguments: [
        "two\nlines", "a\ttab", "\u{7F}", "\u{85}", String(repeating: "ä", count: 128),
    ])
    func noDescriptions(text: String) throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: 512))
        for change in [
            VolumeChange.create(name: "w", size: 512, description: text),
            .snapshot(origin: "v", name: "w", description: text),
            .set(name: "v", description: text),
        ] {
            let asked = bench.ask(change)
            try bench.settle()
            #expect(asked.isDone && asked.error?.kind == .invalidDescription)
        }
        #expect(bench.pool.volumeNames() == ["v"])
    }

    @Test func theLongestDescription() throws {
        let bench = try Bench()
        let text = String(repeating: "x", count: 255)
        try bench.change(.create(name: "v", size: 512, description: text))
        try bench.reopen()
        #expect(try bench.volume("v").description == text)
    }

    // MARK: - Other versions

    private func decode(_ json: String) throws -> Catalogue {
        var bytes = [UInt8](repeating: 0, count: CatalogueLayout.payload) + Array(json.utf8)
        return try bytes.withUnsafeMutableBytes { buffer in
            let payload = UnsafeRawBufferPointer(rebasing: buffer[CatalogueLayout.payload...])
            buffer.baseAddress!.setLE32(
                CatalogueLayout.checksum, clinux_crc32c(payload.baseAddress, payload.count))
            return try Catalogue.decode(UnsafeRawBufferPointer(buffer))
        }
    }

    /// A catalogue without these fields, and one with fields that this program does not know.
    @Test func olderAndNewerCatalogues() throws {
        let old = #"{"deleting":[],"volumes":[{"created":5,"id":1,"name":"v","size":512}]}"#
        let entry = try #require(try decode(old).volumes.first)
        #expect(entry.readOnly == nil && entry.description == nil && entry.size == 512)
        let new =
            #"{"deleting":[],"more":1,"volumes":[{"created":5,"id":1,"name":"v","size":512,"#
            + #""readOnly":true,"description":"d","later":[7]}]}"#
        let other = try #require(try decode(new).volumes.first)
        #expect(other.readOnly == true && other.description == "d")
        #expect(throws: PoolError.self) {
            try decode(new.replacing("\"d\"", with: "\"d\\n\""))
        }
    }

    /// An origin that is gone, by whose name there may be another volume soon.
    @Test func lostOrigins() throws {
        let volumes = [(1, "v", "gone"), (2, "w", "v"), (3, "x", "gone"), (4, "y", "other")].map {
            #"{"created":5,"id":\#($0.0),"name":"\#($0.1)","size":512,"origin":"\#($0.2)"}"#
        }
        let old = #"{"deleting":[],"volumes":[\#(volumes.joined(separator: ","))]}"#
        let read = try decode(old).volumes
        #expect(read.map(\.origin) == [nil, "v", nil, nil])
        #expect(read.map { $0.family == read[0].family } == [true, false, true, false])
        #expect(read[1].family == nil && read[3].family != nil)
    }

    /// A volume without them is written as before.
    @Test func whatIsNotSetIsNotWritten() throws {
        var catalogue = Catalogue()
        catalogue.volumes = [.init(id: 1, name: "v", size: 512, created: 5)]
        let bytes = try catalogue.encoded(blockSize: 4096)
        let text = String(decoding: bytes[CatalogueLayout.payload...], as: UTF8.self)
        #expect(["readOnly", "description", "origin", "family"].allSatisfy { !text.contains($0) })
    }

    // MARK: - Families

    @Test func basesOfADifference() throws {
        let bench = try Bench()
        func bases(_ name: String, limit: Int = 100) throws -> [String] {
            bench.pool.extentBases(of: try bench.volume(name), limit: limit)
        }
        for name in ["a", "z"] { try bench.change(.create(name: name, size: 512)) }
        #expect(try bases("a").isEmpty)
        for (origin, name) in [("a", "c"), ("a", "b"), ("b", "d"), ("z", "y")] {
            try bench.change(.snapshot(origin: origin, name: name))
        }
        #expect(try bases("a") == ["b", "c", "d"])
        #expect(try bases("d") == ["a", "b", "c"])
        #expect(try bases("d", limit: 2) == ["a", "b"])
        #expect(try bases("y") == ["z"])
        // Those whose origin has gone are still each other's.
        try bench.change(.delete(name: "a"))
        #expect(try bases("c") == ["b", "d"])
        #expect(try bases("z") == ["y"])
        // So are those of a snapshot that has gone.
        try bench.change(.snapshot(origin: "d", name: "e"))
        for name in ["b", "d"] { try bench.change(.delete(name: name)) }
        #expect(try bases("c") == ["e"])
        try bench.rest()
        try bench.reopen()
        #expect(try bases("c") == ["e"])
    }

    /// A volume is not what another one of its name has been.
    @Test func namesComeBack() throws {
        let bench = try Bench()
        func origin(_ name: String) throws -> String? { try info(bench, name).origin }
        func bases(_ name: String) throws -> [String] {
            bench.pool.extentBases(of: try bench.volume(name), limit: 100)
        }
        try bench.change(.create(name: "a", size: 512))
        try bench.change(.snapshot(origin: "a", name: "s1"))
        try bench.change(.snapshot(origin: "s1", name: "s2"))
        try bench.change(.delete(name: "s1"))
        try bench.change(.create(name: "s1", size: 1024))
        #expect(try origin("s2") == "a" && origin("s1") == nil)
        #expect(try bases("s1").isEmpty && bases("s2") == ["a"])
        try bench.change(.delete(name: "a"))
        try bench.change(.create(name: "a", size: 512))
        #expect(try origin("s2") == nil)
        #expect(try bases("a").isEmpty && bases("s2").isEmpty)
    }
}
