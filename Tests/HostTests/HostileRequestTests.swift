// Attacks by those who have an export: what other servers fell to, by its number, and memory.

import Foundation
import Testing

@Suite struct HostileRequestTests {
    private typealias Raw = RawClient
    private static let volume = AttackedServer.volume
    private static let invalid: UInt32 = 22
    private static let noSpace: UInt32 = 28

    private static func client(_ attacked: AttackedServer, _ index: Int) throws -> RawClient {
        if index % 2 == 0 { return try RawClient(attacked.server, volume) }
        let client = try RawClient(attacked.server, from: "127.0.0.1")
        guard try client.choose(volume) else { throw Failure("GO is refused") }
        return client
    }

    // MARK: - Numbers

    @Test(
        "CVE-2025-47712, CVE-2017-15118: ranges around 2^31, 2^32, 2^63 and 2^64",
        arguments: RawClient.Format.allCases)
    func rangesThatWrap(format: RawClient.Format) throws {
        let size: UInt64 = 16 << 40
        let attacked = try AttackedServer(volumes: [("vol", size)])
        let client = try RawClient(attacked.server, "vol", format)
        let edges: [UInt64] = [0, 1 << 31, 1 << 32, size, 1 << 62, 1 << 63]
        var numbers: Set<UInt64> = [UInt64.max, 511, 512]
        for edge in edges {
            for distance: UInt64 in [0, 1, 512] {
                numbers.formUnion([edge &- distance, edge &+ distance])
            }
        }
        let commands = [Raw.read, Raw.trim, Raw.cache, Raw.writeZeroes, Raw.blockStatus]
        let sector = [UInt8](repeating: 0, count: 512)
        for offset in numbers {
            let written = try client.answer(
                format, to: Raw.write, flags: format == .extended ? Raw.hasPayload : 0,
                offset: offset, length: 512, payload: sector)
            let fits = offset % 512 == 0 && offset <= size - 512
            #expect((written.error == 0) == fits, "write at \(offset): \(written.error)")
            for wide in numbers {
                let length = format == .extended ? wide : wide & 0xffff_ffff
                let isInside = offset <= size && length <= size - offset
                let isAligned = (offset | length) % 512 == 0
                for command in commands {
                    if command == Raw.read && length > 1 << 20 && isInside { continue }
                    let flags = command == Raw.blockStatus ? Raw.requestOne : 0
                    let answer = try client.answer(
                        format, to: command, flags: flags, offset: offset, length: length)
                    let isServed =
                        isInside && isAligned
                        && (command != Raw.blockStatus || length > 0 && format != .simple)
                    #expect(
                        (answer.error == 0) == isServed,
                        "\(command) at \(offset), \(length): \(answer.error)")
                    for extent in answer.extents { #expect(extent > 0 && extent <= length) }
                }
            }
        }
        try attacked.finish()
    }

    @Test(
        "CVE-2025-47711, CVE-2025-47712: extents of the longest ranges that can be asked for",
        arguments: [RawClient.Format.structured, .extended])
    func longestStatus(format: RawClient.Format) throws {
        let size: UInt64 = 16 << 40
        let attacked = try AttackedServer(volumes: [("vol", size)])
        let client = try RawClient(attacked.server, "vol", format)
        // Extents of all lengths: blocks at powers of two, and at the very end.
        let sector = [UInt8](repeating: 1, count: 512)
        let places = (16..<44).map { UInt64(1) << $0 } + [size - 512]
        for place in places {
            let flags = format == .extended ? Raw.hasPayload : 0
            let answer = try client.answer(
                format, to: Raw.write, flags: flags, offset: place, length: 512, payload: sector)
            #expect(answer.error == 0)
        }
        let longest: UInt64 = format == .extended ? size : 0xffff_fe00
        let offsets: [UInt64] = [
            0, 512, 1 << 32, (1 << 32) - 512, size / 2, size - longest, size - 512,
        ]
        let lengths: [UInt64] = [512, 65536, (1 << 31) - 512, 1 << 31, longest - 512, longest]
        for offset in offsets {
            for wanted in lengths {
                let length = min(wanted, size - offset)
                for flags: UInt16 in [0, Raw.requestOne] {
                    let extents = try client.answer(
                        format, to: Raw.blockStatus, flags: flags, offset: offset, length: length
                    ).extents
                    let told = extents.reduce(0, +)
                    let words: Comment = "\(offset), \(length): \(extents)"
                    #expect(!extents.isEmpty && extents.allSatisfy { $0 > 0 }, words)
                    #expect(told - (extents.last ?? 0) < length && told <= size - offset, words)
                    #expect(extents.allSatisfy { $0 % 512 == 0 }, words)
                    if flags != 0 { #expect(extents.count == 1 && told <= length, words) }
                }
            }
        }
        try attacked.finish()
    }

    @Test("Magic numbers of other formats, and no magic numbers")
    func magicNumbers() throws {
        let attacked = try AttackedServer()
        for format in RawClient.Format.allCases {
            for magic: UInt32 in [
                0, 0x2560_9513, 0x2560_9514, 0x21e4_1c71, 0x6744_6698, 0x668e_33ef, 0x6e8a_278c,
                0x4948_4156, 0x1609_0301, UInt32.max,
            ] where magic != (format == .extended ? Raw.extendedMagic : Raw.requestMagic) {
                let client = try RawClient(attacked.server, "vol", format)
                let header = Raw.header(format, Raw.trim, length: 65536)
                try client.send(bigEndianBytes(magic) + header[4...])
                #expect(client.isHungUpOn(), "\(magic) in \(format)")
            }
        }
        try attacked.finish()
    }

    // MARK: - Payloads

    @Test("Payloads that are announced and do not belong there; of 64-bit lengths")
    func announcedPayloads() throws {
        let attacked = try AttackedServer()
        let commands: [UInt16] = [0, 1, 3, 4, 5, 6, 7, 8, 9, 0x7fff, 0xffff]
        let client = try RawClient(attacked.server, "vol", .extended)
        for command in commands {
            for length: UInt64 in [1, 7, 8, 73, 511, 513, 4097] {
                // What is announced is taken off the stream, whatever it looks like.
                let payload = Array(
                    Array(repeating: Raw.header(.extended, Raw.trim, length: 65536), count: 129)
                        .joined().prefix(Int(length)))
                let answer = try client.answer(
                    .extended, to: command, flags: Raw.hasPayload, offset: 0, length: length,
                    payload: payload)
                #expect(answer.error == Self.invalid, "\(command) with \(length) bytes")
            }
            for length: UInt64 in [(32 << 20) + 1, 1 << 32, 1 << 63, UInt64.max] {
                let greedy = try RawClient(attacked.server, "vol", .extended)
                try greedy.send(
                    Raw.header(.extended, command, flags: Raw.hasPayload, length: length))
                #expect(greedy.isHungUpOn(), "\(command) with \(length) bytes")
            }
        }
        #expect(try client.answer(.extended, to: Raw.read, length: 512).error == 0)
        // Of 32-bit lengths, with what is announced still to come.
        for format in [Raw.Format.simple, .structured] {
            for flags: UInt16 in [0, Raw.hasPayload] {
                let greedy = try RawClient(attacked.server, "vol", format)
                try greedy.send(
                    Raw.header(format, Raw.write, flags: flags, length: UInt64(UInt32.max)))
                for _ in 0..<4 { try greedy.send([UInt8](repeating: 1, count: 1 << 20)) }
                try attacked.expectService()
            }
        }
        try attacked.finish()
    }

    @Test("Contexts that were not selected, twice, half, or by the hundred")
    func contextsOfStatus() throws {
        let attacked = try AttackedServer()
        let client = try RawClient(
            attacked.server, "vol", .extended, contexts: ["base:allocation", "wafer:shared"])
        func ask(_ effect: UInt64, _ ids: [UInt32], cut: Int = 0) throws -> UInt32 {
            let payload = (bigEndianBytes(effect) + ids.flatMap(bigEndianBytes)).dropLast(cut)
            return try client.answer(
                .extended, to: Raw.blockStatus, flags: Raw.hasPayload,
                length: UInt64(payload.count), payload: Array(payload)
            ).error
        }
        #expect(try ask(65536, [1, 2]) == 0)
        for ids: [UInt32] in [
            [], [0], [3], [1, 3], [1, 1], [2, 1, 2], [UInt32.max], [1 << 31], [1 << 24],
            (0..<16).map { $0 }, (0..<1000).map { $0 }, Array(repeating: 1, count: 5000),
        ] {
            #expect(try ask(65536, ids) == Self.invalid, "\(ids.prefix(5))")
        }
        for cut in 1..<12 { #expect(try ask(65536, [1, 2], cut: cut) == (cut == 4 ? 0 : 22)) }
        for effect: UInt64 in [0, 1, 511, 513, 1 << 63, UInt64.max, UInt64.max - 511] {
            #expect(try ask(effect, [1]) == Self.invalid, "\(effect)")
        }
        try attacked.finish()
    }

    // MARK: - Leaving

    @Test(
        "Leaving at every byte of a request: it is done whole or not at all",
        arguments: RawClient.Departure.allCases)
    func leavingAtEveryByte(departure: RawClient.Departure) throws {
        let attacked = try AttackedServer()
        let payload = [UInt8](repeating: 0xaa, count: 512)
        for length in 0..<28 + payload.count where length < 64 || length % 31 == 0 {
            let client = try Self.client(attacked, length)
            let write = Raw.header(.simple, Raw.write, offset: UInt64(length) * 512, length: 512)
            try client.send(Array((write + payload).prefix(length)))
            client.leave(departure)
        }
        try attacked.expectNobody()
        #expect(isZero(try Client(attacked.server, "vol").read(0, 512 << 10)))
        try attacked.finish()
    }

    @Test(
        "Leaving at every byte of the replies", arguments: RawClient.Departure.allCases)
    func leavingAtEveryByteOfTheReplies(departure: RawClient.Departure) throws {
        let attacked = try AttackedServer()
        let replies = 16 + 4096 + 16 + 16
        for length in 0...replies where length < 40 || length > replies - 40 || length % 53 == 0 {
            let client = try Self.client(attacked, length)
            try client.send(
                Raw.header(.simple, Raw.read, length: 4096) + Raw.header(.simple, Raw.flush)
                    + Raw.header(.simple, Raw.trim, length: 65536))
            _ = try client.receive(length)
            client.leave(departure)
        }
        try attacked.expectNobody()
        try attacked.finish()
    }

    @Test(
        "Clients that reset the connection with replies in flight", arguments: Engine.allCases)
    func resetWithRepliesInFlight(engine: Engine) throws {
        let attacked = try AttackedServer(engine: engine)
        let reads = (0..<64 as Range<UInt64>).flatMap {
            Raw.header(.simple, Raw.read, offset: $0 << 17, length: 1 << 17)
        }
        let writes = (0..<16 as Range<UInt64>).flatMap {
            Raw.header(.simple, Raw.write, offset: $0 << 17, length: 4096)
                + [UInt8](repeating: 7, count: 4096)
        }
        try onThreads(4) { worker in
            var random = Generator(seed: UInt64(worker))
            for index in 0..<40 {
                let client = try Self.client(attacked, index + worker)
                client.stuff(index % 4 < 2 ? reads : writes + reads)
                _ = try client.receive(random.below(400_000))
                client.leave(.reset)
            }
        }
        try attacked.expectNobody()
        try attacked.finish()
    }

    @Test("DISC with replies in flight: all are delivered, and nothing behind it is done")
    func disconnecting() throws {
        let attacked = try AttackedServer()
        for index in 0..<4 {
            let client = try Self.client(attacked, index)
            let count: UInt64 = 120
            let reads = (0..<count).flatMap {
                Raw.header(.simple, Raw.read, offset: $0 << 16, length: 65536, cookie: $0)
            }
            let late =
                Raw.header(.simple, Raw.write, length: 512, cookie: 999)
                + [UInt8](repeating: 5, count: 512)
            let disconnect = Raw.header(.simple, Raw.disconnect)
            let rest = disconnect + Array(repeating: late, count: 30).joined()
            try client.send(reads)
            client.stuff(rest)
            usleep(100_000)
            var cookies = Set<UInt64>()
            for _ in 0..<count {
                let answer = try client.answer(.simple, dataLength: 65536)
                #expect(answer.error == 0 && cookies.insert(answer.cookie).inserted)
            }
            #expect(cookies.count == count && client.isHungUpOn())
        }
        #expect(isZero(try Client(attacked.server, "vol").read(0, 4096)))
        try attacked.finish()
    }

    // MARK: - Memory

    private static let memory = 64 << 20
    /// What a server may hold apart from payloads: the kept inputs of the clients, and its own.
    private static let slack = 48 << 20

    @Test("Writes whose data does not come: memory is bounded, and others are served")
    func writesWithoutData() throws {
        let attacked = try AttackedServer(["--payload-memory", "\(Self.memory)"])
        try attacked.expectService()
        let before = try attacked.residentBytes()
        let write =
            Raw.header(.simple, Raw.write, length: 32 << 20)
            + [UInt8](repeating: 1, count: 31 << 20)
        let clients = try (0..<24).map { try Self.client(attacked, $0) }
        try onThreads(4) {
            for index in stride(from: $0, to: 24, by: 4) { clients[index].stuff(write) }
        }
        try attacked.expectMemory(before, grownByAtMost: Self.memory + Self.slack)
        try attacked.expectService()
        for client in clients { client.leave() }
        try attacked.expectNobody()
        try attacked.finish()
    }

    @Test("Reads by the gigabyte that nobody takes: memory is bounded, and others are served")
    func repliesNobodyReads() throws {
        let attacked = try AttackedServer(["--payload-memory", "\(Self.memory)"])
        try Client(attacked.server, "vol").write(0, [UInt8](repeating: 3, count: 32 << 20))
        let before = try attacked.residentBytes()
        let reads = Array(
            Array(repeating: Raw.header(.simple, Raw.read, length: 32 << 20), count: 256).joined())
        let clients = try (0..<24).map { try Self.client(attacked, $0) }
        for client in clients { client.stuff(reads) }
        try attacked.expectMemory(before, grownByAtMost: Self.memory + Self.slack)
        try attacked.expectService()
        for client in clients { client.leave(.reset) }
        try attacked.expectNobody()
        try attacked.finish()
    }

    @Test("Block status without end that nobody reads")
    func statusFlood() throws {
        let attacked = try AttackedServer(["--payload-memory", "\(Self.memory)"])
        let writer = try RawClient(attacked.server, "vol")
        for block in stride(from: 0, to: AttackedServer.size, by: 128 << 10) {
            try writer.request(
                RawClient.write, offset: block, length: 512,
                payload: [UInt8](repeating: 1, count: 512), cookie: block)
            _ = try writer.receive(16)
        }
        writer.leave()
        let before = try attacked.residentBytes()
        for format in [RawClient.Format.structured, .extended] {
            let asks = Array(
                Array(
                    repeating: Raw.header(
                        format, Raw.blockStatus, length: AttackedServer.size), count: 5000
                ).joined())
            let clients = try (0..<20).map { _ in
                try RawClient(
                    attacked.server, "vol", format, contexts: ["base:allocation", "wafer:shared"])
            }
            for client in clients { client.stuff(asks) }
            try attacked.expectMemory(before, grownByAtMost: Self.memory + Self.slack)
            // What was asked before takes its time, in a debug build seconds.
            try attacked.expectService(within: 4 * AttackedServer.soon)
            // Who reads gets what it has asked for.
            #expect(try !clients[0].answer(format).extents.isEmpty)
            for client in clients { client.leave(.reset) }
        }
        try attacked.expectNobody()
        try attacked.finish()
    }

    @Test("Requests of 28 bytes that zero a thousand blocks, by the thousand")
    func zeroesFlood() throws {
        let attacked = try AttackedServer()
        let before = try attacked.residentBytes()
        let asks = Array(
            Array(
                repeating: Raw.header(
                    .simple, Raw.writeZeroes, flags: Raw.noHole,
                    length: AttackedServer.size), count: 256
            ).joined())
        let clients = try (0..<100).map { _ in try RawClient(attacked.server, "vol") }
        for client in clients { client.stuff(asks) }
        try attacked.expectMemory(before, grownByAtMost: Self.slack)
        try attacked.expectService()
        // What nobody can be told of any more is left undone: minutes of zeroes.
        for client in clients.dropFirst() { client.leave() }
        #expect(try eventually(within: AttackedServer.soon) { try attacked.openSockets() < 50 })
        try attacked.expectService()
        try attacked.finish()
    }
}
