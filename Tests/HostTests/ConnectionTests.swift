// Several connections to one volume: what one of them is promised holds for all.

import Foundation
import Testing

/// Nothing is committed on its own while a test runs.
let noCommits = ["--commit-interval", "60"]

@Suite struct ConnectionTests {
    private static let block = 64 * kibibyte

    /// CAN_MULTI_CONN: a flush on one connection covers what all of them were answered.
    @Test(arguments: Engine.allCases) func flushCoversOtherConnections(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 64 * mebibyte)])
        let server = try Server(pool, engine: engine, options: noCommits + ["--reactors", "3"])
        let clients = try (0..<6).map {
            try Client(server, "vol", via: $0 % 2 == 0 ? .unix : .tcp)
        }
        for round in 0..<60 {
            let (writer, reader) = (clients[round % 6], clients[(round * 5 + 2) % 6])
            // New blocks, and old ones again.
            let offset = UInt64(round % 40) * Self.block + UInt64(round % 3) * 4096
            let bytes = pattern(UInt64(round + 1), offset, 4096)
            try writer.write(offset, bytes)
            #expect(same(try reader.read(offset, 4096), bytes), "round \(round)")
            try clients[(round + 1) % 6].flush()
        }
        server.kill()
        let again = try Server(pool, engine: engine)
        let client = try Client(again, "vol")
        for round in 20..<60 {
            let offset = UInt64(round % 40) * Self.block + UInt64(round % 3) * 4096
            let bytes = pattern(UInt64(round + 1), offset, 4096)
            #expect(same(try client.read(offset, 4096), bytes), "round \(round)")
        }
        try again.stop()
        try pool.expectClean()
    }

    /// Each FUA command is durable by itself, with the mappings that it made or removed.
    @Test(arguments: Engine.allCases) func forcedUnitAccess(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 64 * mebibyte)])
        let block = Self.block
        func at(_ index: UInt64) -> UInt64 { index * block }
        let cases: [(String, (Client) throws -> Void, (Client) throws -> Bool)] = [
            (
                "write of a new block",
                { try $0.write(at(10) + 512, pattern(1, at(10) + 512, 512), flags: Client.fua) },
                { same(try $0.read(at(10) + 512, 512), pattern(1, at(10) + 512, 512)) }
            ),
            (
                "write over many new blocks",
                { try $0.write(at(100), pattern(2, at(100), 80 << 16), flags: Client.fua) },
                { same(try $0.read(at(100), 80 << 16), pattern(2, at(100), 80 << 16)) }
            ),
            (
                "zeroes with provisioning",
                { try $0.zero(at(200), 3 * block, flags: Client.fua | Client.noHole) },
                { client in
                    let mapped = try pool.volumes()[0].mappedBytes
                    return isZero(try client.read(at(200), 3 << 16)) && mapped == 92 * block
                }
            ),
            (
                "zeroes over data",
                { try $0.zero(at(0), 2 * block, flags: Client.fua) },
                { isZero(try $0.read(at(0), 2 << 16)) }
            ),
            (
                "zeroes over part of a block",
                { try $0.zero(at(3) + 512, 1024, flags: Client.fua) },
                { client in
                    let bytes = try client.read(at(3), 2048)
                    return isZero(Array(bytes[512..<1536]))
                        && same(Array(bytes[..<512]), pattern(9, at(3), 512))
                }
            ),
            (
                "trim",
                { try $0.trim(at(5), block, flags: Client.fua) },
                { isZero(try $0.read(at(5), 1 << 16)) }
            ),
            (
                "write in place",
                { try $0.write(at(7), pattern(4, at(7), 4096), flags: Client.fua) },
                { same(try $0.read(at(7), 4096), pattern(4, at(7), 4096)) }
            ),
        ]
        do {
            let server = try Server(pool, engine: engine)
            try Client(server, "vol").write(0, pattern(9, 0, 8 << 16), flags: Client.fua)
            try server.stop()
        }
        for (what, act, holds) in cases {
            let server = try Server(pool, engine: engine, options: noCommits)
            try act(try Client(server, "vol"))
            server.kill()
            let again = try Server(pool, engine: engine)
            #expect(try holds(try Client(again, "vol")), "\(what)")
            try again.stop()
        }
        try pool.expectClean()
    }

    /// Two clients write parts of the same blocks at once. Nobody's bytes are lost when a block is
    /// provisioned or copied, and where both write, one of them wins, sector by sector.
    @Test(arguments: Engine.allCases) func overlappingBlocks(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 16 * mebibyte)])
        let server = try Server(pool, engine: engine, options: ["--reactors", "2"])
        let clients = try [Client.Transport.unix, .tcp].map { try Client(server, "vol", via: $0) }
        let blocks = 48
        let piece = 4096
        var before: [UInt64: [UInt8]] = [:]
        for round in 1...4 {
            if round > 1 {
                for block in 0..<UInt64(blocks) {
                    before[block] = try clients[0].read(block * Self.block, 65536)
                }
                try pool.snapshot("vol", "before-\(round)")
            }
            for first in stride(from: 0, to: blocks, by: 4) {
                try onThreads(2) { index in
                    var random = Generator(seed: UInt64(round * 1000 + first * 2 + index))
                    var places: [UInt64] = []
                    for block in first..<first + 4 {
                        let start = UInt64(block) * Self.block
                        // Piece 0 is both clients', the others by turns.
                        for part in 0..<16 where part == 0 || part % 2 == index {
                            places.append(start + UInt64(part * piece))
                        }
                    }
                    places.shuffle(using: &random)
                    let batch = Batch(clients[index])
                    for place in places {
                        try batch.write(place, pattern(UInt64(round * 2 + index), place, piece))
                    }
                    #expect(try batch.wait().allSatisfy { $0 == 0 })
                }
            }
            for block in 0..<blocks {
                let start = UInt64(block) * Self.block
                let found = try stamps(try clients[0].read(start, 65536), start)
                for (sector, stamp) in found.enumerated() {
                    let part = sector * 512 / piece
                    let good =
                        part == 0
                        ? [UInt64(round * 2), UInt64(round * 2 + 1)].contains(stamp)
                        : stamp == UInt64(round * 2 + part % 2)
                    #expect(good, "round \(round), block \(block), sector \(sector): \(stamp)")
                }
            }
            if round > 1 {
                let snapshot = try Client(server, "before-\(round)")
                for (block, bytes) in before {
                    #expect(same(try snapshot.read(block * Self.block, 65536), bytes))
                }
            }
        }
        try server.stop()
        try pool.expectClean()
    }

    /// The first requests after the start, over as many reactors as there are, to the same blocks.
    @Test(arguments: Engine.allCases) func firstRequestsOfAll(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 4 * mebibyte)])
        let reactors = 8
        for round in 1...8 {
            let server = try Server(pool, engine: engine, options: ["--reactors", "\(reactors)"])
            let clients = try (0..<reactors).map {
                try Client(server, "vol", via: $0 % 2 == 0 ? .unix : .tcp)
            }
            let batches = clients.map { Batch($0) }
            var pieces = Array(UInt64(0)..<512)
            var random = Generator(seed: UInt64(round))
            pieces.shuffle(using: &random)
            for (index, piece) in pieces.enumerated() {
                let bytes = pattern(UInt64(round), piece * 2048, 2048)
                try batches[index % reactors].write(piece * 2048, bytes)
            }
            for batch in batches { #expect(try batch.wait().allSatisfy { $0 == 0 }) }
            #expect(same(try clients[0].read(0, 1 << 20), pattern(UInt64(round), 0, 1 << 20)))
            try clients[1].trim(0, 4 * mebibyte)
            try server.stop()
        }
        try pool.expectClean()
    }
}
