// Commands: what they do, and what is refused with which error.

import CLibNBD
import Foundation
import Testing

@Suite struct TransmissionTests {
    /// Not a whole number of blocks.
    private static let size = 64 * mebibyte + 1536

    private func serve(_ engine: Engine) throws -> Server {
        try Server(try TestPool(volumes: [("vol", Self.size)]), engine: engine)
    }

    /// Against an array that is changed alike.
    @Test(arguments: Engine.allCases) func readsAreWhatWasWritten(engine: Engine) throws {
        let server = try serve(engine)
        let client = try Client(server, "vol")
        // The last part of the volume, whose end is inside of a block.
        let base = Self.size - 1024 * kibibyte
        var model = [UInt8](repeating: 0, count: 1 << 20)
        var random = Generator(seed: 7)
        for round in 1...300 {
            let start = random.below(2048)
            let most = random.chance(20) ? 2048 : 96
            let sectors = 1 + random.below(min(2048 - start, most))
            let (offset, length) = (base + UInt64(start * 512), sectors * 512)
            let range = start * 512..<start * 512 + length
            let flags = random.chance(20) ? Client.fua : 0
            switch random.below(8) {
            case 0...3:
                let bytes = pattern(UInt64(round), offset, length)
                try client.write(offset, bytes, flags: flags)
                model.replaceSubrange(range, with: bytes)
            case 4, 5:
                let hole = random.chance(50) ? Client.noHole : 0
                try client.zero(offset, UInt64(length), flags: flags | hole)
                model.replaceSubrange(range, with: repeatElement(0, count: length))
            case 6:
                let found = try client.read(offset, length)
                #expect(same(found, Array(model[range])), "round \(round)")
            default:
                try client.flush()
                try client.cache(offset, UInt64(length))
            }
        }
        #expect(same(try client.read(base, model.count), model))
        #expect(isZero(try client.read(0, 1 << 20)))
        // The same over the other transport, and after a restart with the other engine.
        #expect(same(try Client(server, "vol", via: .tcp).read(base, model.count), model))
        try server.stop()
        let again = try Server(server.pool, engine: engine == .ring ? .poll : .ring)
        #expect(same(try Client(again, "vol").read(base, model.count), model))
        try again.stop()
        try server.pool.expectClean()
    }

    /// Whole blocks are given back, parts of blocks are left as they are.
    @Test(arguments: Engine.allCases) func trims(engine: Engine) throws {
        let server = try serve(engine)
        let client = try Client(server, "vol")
        let block = 64 * kibibyte
        let bytes = pattern(1, 0, 8 << 16)
        try client.write(0, bytes)
        try client.trim(block / 2, 4 * block)
        var expected = bytes
        let gone = Int(block)..<Int(4 * block)
        expected.replaceSubrange(gone, with: repeatElement(0, count: gone.count))
        #expect(same(try client.read(0, 8 << 16), expected))
        try client.flush()
        #expect(try server.pool.volumes()[0].mappedBytes == 5 * block)
        try client.write(2 * block + 512, pattern(2, 2 * block + 512, 512))
        let around = try client.read(2 * block, 65536)
        #expect(isZero(Array(around[..<512])) && isZero(Array(around[1024...])))
        // To the end of the volume, which is inside of a block.
        try client.write(Self.size - 512, pattern(3, Self.size - 512, 512))
        try client.trim(Self.size - 1536, 1536)
        #expect(isZero(try client.read(Self.size - 1536, 1536)))
        try client.flush()
        #expect(try server.pool.volumes()[0].mappedBytes == 6 * block)
    }

    @Test func longestPayloads() throws {
        let server = try serve(.ring)
        let client = try Client(server, "vol")
        let bytes = pattern(9, 1536, 32 << 20)
        try client.write(1536, bytes)
        #expect(same(try client.read(1536, 32 << 20), bytes))
    }

    @Test(arguments: Engine.allCases) func sixtyFourAtOnce(engine: Engine) throws {
        let server = try serve(engine)
        let client = try Client(server, "vol", via: .tcp)
        let lengths = (0..<64).map { 512 * (1 + $0 * 7 % 64) }
        func offset(_ index: Int) -> UInt64 { UInt64((index * 37) % 64) * 32 * kibibyte }
        let writes = Batch(client)
        for (index, length) in lengths.enumerated() {
            let bytes = pattern(UInt64(index + 1), offset(index), length)
            try writes.write(offset(index), bytes)
        }
        #expect(try writes.wait() == [Int32](repeating: 0, count: 64))
        let reads = Batch(client)
        for (index, length) in lengths.enumerated() { try reads.read(offset(index), length) }
        #expect(try reads.wait() == [Int32](repeating: 0, count: 64))
        for (index, length) in lengths.enumerated() {
            let bytes = pattern(UInt64(index + 1), offset(index), length)
            #expect(same(reads.results[index], bytes), "command \(index)")
        }
        // Everything mixed, and some of it refused: every command has the answer that is its own.
        let mixed = Batch(client)
        var expected: [Int32] = []
        for index in 0..<64 {
            let place = UInt64(index) * 64 * kibibyte
            switch index % 8 {
            case 0: try mixed.write(Self.size, pattern(1, 0, 4096))
            case 1: try mixed.read(Self.size - 512, 1024)
            case 2: try mixed.zero(place, 65536)
            case 3: try mixed.flush()
            case 4: try mixed.trim(place, 65536)
            case 5: try mixed.write(place, pattern(77, place, 65536), flags: Client.fua)
            case 6: try mixed.zero(place, 8192, flags: Client.noHole | Client.fua)
            default: try mixed.read(place, 65536)
            }
            expected.append(index % 8 == 0 ? ENOSPC : index % 8 == 1 ? EINVAL : 0)
        }
        #expect(try mixed.wait() == expected)
        #expect(same(try client.read(5 << 16, 1 << 16), pattern(77, 5 << 16, 1 << 16)))
    }

    // MARK: - Refusals

    @Test(arguments: Engine.allCases) func refusals(engine: Engine) throws {
        let server = try serve(engine)
        let client = try Client(server, "vol")
        let sector = pattern(1, 0, 512)
        let end = Self.size
        func expect(_ error: Int32, _ what: String, _ body: () throws -> Void) throws {
            #expect(try code(body) == error, "\(what)")
        }
        try expect(EINVAL, "read past the end") { _ = try client.read(end, 512) }
        try expect(EINVAL, "read over the end") { _ = try client.read(end - 512, 1024) }
        try expect(EINVAL, "read far beyond") { _ = try client.read(UInt64.max - 511, 512) }
        try expect(ENOSPC, "write past the end") { try client.write(end, sector) }
        let two = pattern(1, 0, 1024)
        try expect(ENOSPC, "write over the end") { try client.write(end - 512, two) }
        try expect(ENOSPC, "write far beyond") { try client.write(1 << 62, sector) }
        try expect(ENOSPC, "zero over the end") { try client.zero(end - 512, 1024) }
        try expect(EINVAL, "trim over the end") { try client.trim(end - 512, 1024) }
        try expect(EINVAL, "cache over the end") { try client.cache(end - 512, 1024) }
        try expect(EINVAL, "offset of a read") { _ = try client.read(1, 512) }
        try expect(EINVAL, "length of a read") { _ = try client.read(0, 511) }
        try expect(EINVAL, "offset of a write") { try client.write(256, sector) }
        try expect(EINVAL, "length of a write") { try client.write(0, Array(sector[..<100])) }
        try expect(EINVAL, "offset of zeroes") { try client.zero(1, 512) }
        try expect(EINVAL, "length of a trim") { try client.trim(0, 65537) }
        #expect(isZero(try client.read(0, 1 << 20)))
        #expect(isZero(try client.read(end - 512, 512)))
        try client.write(end - 512, sector)
        #expect(same(try client.read(end - 512, 512), sector))
        #expect(try server.pool.volumes()[0].mappedBytes == 64 * kibibyte)
    }

    @Test(arguments: Engine.allCases) func unknownCommandsAndFlags(engine: Engine) throws {
        let server = try serve(engine)
        let client = try RawClient(server, "vol")
        typealias Raw = RawClient
        let payload = [UInt8](repeating: 0xaa, count: 4096)
        for command: UInt16 in [7, 8, 9, 0x8000, 0xffff] {
            #expect(try client.error(command, length: 512) == EINVAL, "command \(command)")
        }
        // NO_HOLE and FAST_ZERO are for zeroes alone, and parts of blocks are not zeroed fast; DF,
        // REQ_ONE and PAYLOAD_LEN are not offered with simple replies.
        for bit in 1..<16 {
            let flags = UInt16(1) << bit
            for command in [Raw.read, Raw.flush, Raw.trim, Raw.cache] {
                let length: UInt32 = command == Raw.flush ? 0 : 512
                let error = try client.error(command, flags: flags, length: length)
                #expect(error == EINVAL, "command \(command), flags \(flags)")
            }
            let error = try client.error(Raw.write, flags: flags, length: 4096, payload: payload)
            #expect(error == EINVAL, "write, flags \(flags)")
            #expect(
                try client.error(Raw.writeZeroes, flags: flags, length: 512)
                    == (flags == 2 ? 0 : flags == 16 ? ENOTSUP : EINVAL), "zeroes, flags \(flags)")
        }
        // FUA is good with everything.
        for command in [Raw.read, Raw.flush, Raw.trim, Raw.cache, Raw.writeZeroes] {
            let length: UInt32 = command == Raw.flush ? 0 : 512
            #expect(try client.error(command, flags: 1, length: length) == 0, "command \(command)")
        }
        #expect(try client.error(Raw.flush, offset: 512) == EINVAL)
        #expect(try client.error(Raw.flush, length: 512) == EINVAL)
        #expect(isZero(try Client(server, "vol").read(0, 65536)))
    }

    /// Behind a refused WRITE its payload is taken off the stream, whatever its length.
    @Test(arguments: Engine.allCases) func refusedPayloadsAreDrained(engine: Engine) throws {
        let server = try serve(engine)
        let client = try RawClient(server, "vol")
        // A payload that looks like requests.
        let header =
            bigEndianBytes(RawClient.requestMagic) + bigEndianBytes(UInt16(0))
            + bigEndianBytes(RawClient.trim) + [UInt8](repeating: 0, count: 20)
        for length in [512, 4096, 65536, 1 << 20, 40 << 20] {
            var payload = [UInt8](repeating: 0, count: length)
            for start in stride(from: 0, to: min(length, 65536) - 28, by: 28) {
                payload.replaceSubrange(start..<start + 28, with: header)
            }
            let wire = UInt32(length)
            let beyond = try client.error(
                RawClient.write, offset: Self.size, length: wire, payload: payload)
            // Longer than the longest payload is refused for that.
            #expect(beyond == (length > 32 << 20 ? EINVAL : ENOSPC), "\(length) bytes")
            let flagged = try client.error(
                RawClient.write, flags: 8, length: wire, payload: payload)
            #expect(flagged == EINVAL)
            #expect(try client.error(RawClient.read, length: 4096) == 0)
        }
    }

    @Test(arguments: Engine.allCases) func badMagicEndsOneConnection(engine: Engine) throws {
        let server = try serve(engine)
        let neighbour = try Client(server, "vol")
        for magic: UInt32 in [0, 0x2560_9514, 0x21e4_1c71, 0x6744_6698, UInt32.max] {
            let client = try RawClient(server, "vol")
            #expect(
                try client.error(
                    RawClient.write, length: 512, payload: [UInt8](repeating: 1, count: 512)) == 0)
            try client.request(RawClient.read, length: 512, magic: magic, cookie: 1)
            #expect(client.isHungUpOn(), "magic \(magic)")
            try neighbour.write(4096, pattern(UInt64(magic) + 1, 4096, 512))
            let bytes = try neighbour.read(4096, 512)
            #expect(same(bytes, pattern(UInt64(magic) + 1, 4096, 512)))
        }
        // In the handshake, too.
        let client = try RawClient(server)
        _ = try client.receive(18)
        try client.send([0, 0, 0, 3] + Array("IHAVEOPS".utf8) + [UInt8](repeating: 0, count: 8))
        #expect(client.isHungUpOn())
        try neighbour.flush()
        try neighbour.disconnect()
        try server.stop()
    }

    // MARK: - Sizes

    /// The longest requests that the kernel sends, over a volume that is almost all holes.
    @Test(arguments: Engine.allCases) func hugeTrimsAndZeroes(engine: Engine) throws {
        let size: UInt64 = 16 << 40
        let server = try Server(try TestPool(volumes: [("vast", size)]), engine: engine)
        let client = try Client(server, "vast")
        let longest = 4 * gibibyte - 512
        let places = [0, 5 * gibibyte + 512, size / 2 - 512, size - longest]
        for place in places {
            // One block at each end of the range and one beyond, where that is in the volume.
            for at in [place, place + longest - 512] { try client.write(at, pattern(5, at, 512)) }
            if place > 0 { try client.write(place - 512, pattern(6, place - 512, 512)) }
        }
        let began = Date()
        for (index, place) in places.enumerated() {
            if index % 2 == 0 {
                try client.trim(place, longest)
            } else {
                try client.zero(place, longest)
            }
            try client.zero(place, longest, flags: Client.fua)
        }
        let seconds = Date().timeIntervalSince(began)
        #expect(seconds < 5, "8 requests took \(seconds) s")
        for place in places {
            for at in [place, place + longest - 512] {
                #expect(isZero(try client.read(at, 512)), "at \(at)")
            }
            if place > 0 {
                #expect(same(try client.read(place - 512, 512), pattern(6, place - 512, 512)))
            }
        }
        // As mkfs does: the whole device, many requests at once. In whole blocks, so that nothing
        // is left.
        let piece = 4 * gibibyte - 64 * kibibyte
        let whole = Date()
        var next: UInt64 = 0
        while next < size {
            let batch = Batch(client)
            for _ in 0..<64 where next < size {
                try batch.trim(next, min(piece, size - next))
                next += min(piece, size - next)
            }
            #expect(try batch.wait().allSatisfy { $0 == 0 })
        }
        try client.flush()
        #expect(Date().timeIntervalSince(whole) < 20)
        try client.disconnect()
        try server.stop()
        #expect(try server.pool.volumes()[0].mappedBytes == 0)
        try server.pool.expectClean()
    }
}
