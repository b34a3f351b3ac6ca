// The bytes of chunks, extended requests and the payload of BLOCK_STATUS.

import NBDProtocol
import Testing

private let cookie: UInt64 = 0x0807_0605_0403_0201
private let cookieBytes: [UInt8] = [1, 2, 3, 4, 5, 6, 7, 8]

private func written(_ count: Int, _ body: (UnsafeMutableRawPointer) -> Void) -> [UInt8] {
    var memory = [UInt8](repeating: 0xEE, count: count + 8)
    memory.withUnsafeMutableBytes { body($0.baseAddress!) }
    #expect(memory.suffix(8).allSatisfy { $0 == 0xEE }, "written beyond its size")
    return Array(memory.prefix(count))
}

/// A chunk's header as the protocol has it.
private func header(_ extended: Bool, _ flags: UInt16, _ type: UInt16, _ length: Int) -> [UInt8] {
    let beginning =
        bytes(extended ? UInt32(0x6e8a_278c) : 0x668e_33ef) + bytes(flags) + bytes(type)
        + cookieBytes
    return extended
        ? beginning + bytes(UInt64(0x1000)) + bytes(UInt64(length))
        : beginning + bytes(UInt32(length))
}

@Suite struct ChunkTests {
    @Test(arguments: [false, true])
    func layouts(extended: Bool) {
        let chunk = ChunkHeader(extended: extended, cookie: cookie, offset: 0x1000)
        #expect(
            written(chunk.size) { chunk.writeNone(to: $0) } == header(extended, 1, 0, 0))
        #expect(
            written(chunk.dataSize) {
                chunk.writeData(to: $0, at: 0x1200, length: 512, isLast: false)
            } == header(extended, 0, 1, 520) + bytes(UInt64(0x1200)))
        #expect(
            written(chunk.holeSize) {
                chunk.writeHole(to: $0, at: 0x1400, length: 1024, isLast: true)
            } == header(extended, 1, 2, 12) + bytes(UInt64(0x1400)) + bytes(UInt32(1024)))
        #expect(
            written(chunk.errorSize("full")) { chunk.writeError(to: $0, .noSpace, "full") }
                == header(extended, 1, 0x8001, 10) + bytes(UInt32(28)) + bytes(UInt16(4))
                + Array("full".utf8))
    }

    @Test func status() {
        let compact = ChunkHeader(extended: false, cookie: cookie, offset: 0x1000)
        #expect(
            written(compact.statusSize(extents: 2)) {
                var at = compact.beginStatus(to: $0, context: 7, extents: 2, isLast: true)
                at = compact.writeExtent(to: at, length: 0xFFFF_FE00, status: 3)
                at = compact.writeExtent(to: at, length: 512, status: 0)
                precondition(at == $0 + compact.statusSize(extents: 2))
            }
                == header(false, 1, 5, 20) + bytes(UInt32(7)) + bytes(UInt32(0xFFFF_FE00))
                + bytes(UInt32(3)) + bytes(UInt32(512)) + bytes(UInt32(0)))
        let wide = ChunkHeader(extended: true, cookie: cookie, offset: 0x1000)
        #expect(
            written(wide.statusSize(extents: 1)) {
                let at = wide.beginStatus(to: $0, context: 7, extents: 1, isLast: false)
                _ = wide.writeExtent(to: at, length: 1 << 50, status: 3)
            }
                == header(true, 0, 6, 24) + bytes(UInt32(7)) + bytes(UInt32(1))
                + bytes(UInt64(1 << 50)) + bytes(UInt64(3)))
    }

    @Test func extendedRequests() throws {
        let wire =
            bytes(UInt32(0x21e4_1c71)) + bytes(UInt16(0)) + bytes(UInt16(6)) + cookieBytes
            + bytes(UInt64(1 << 40)) + bytes(UInt64(1 << 41))
        let request = try #require(
            wire.withUnsafeBytes { RequestHeader.parse($0.baseAddress!, extended: true) })
        #expect(request.offset == 1 << 40 && request.length == 1 << 41)
        #expect(request.cookie == cookie)
        #expect(request.payloadLength(extended: true) == 0)
        #expect(wire.withUnsafeBytes { RequestHeader.parse($0.baseAddress!) } == nil)
    }

    @Test func payloads() {
        func length(_ command: Command, _ flags: CommandFlags, extended: Bool) -> UInt64 {
            RequestHeader(
                flags: flags, command: command.rawValue, cookie: 0, offset: 0, length: 512
            ).payloadLength(extended: extended)
        }
        #expect(length(.write, [], extended: false) == 512)
        #expect(length(.write, [], extended: true) == 512)
        #expect(length(.write, .payloadLength, extended: true) == 512)
        #expect(length(.trim, .payloadLength, extended: true) == 512)
        #expect(length(.trim, .payloadLength, extended: false) == 0)
        #expect(length(.blockStatus, [], extended: true) == 0)
    }

    @Test func statusPayloads() throws {
        let selected = [MetaContext(id: 1, name: "a:a"), MetaContext(id: 2, name: "b:b")]
        func parse(_ data: [UInt8]) -> StatusPayload? {
            data.withUnsafeBytes { StatusPayload($0, selected: selected) }
        }
        let good = try #require(parse(bytes(UInt64(1 << 40)) + bytes(UInt32(2))))
        #expect(good.length == 1 << 40 && good.contexts == [2])
        let bad: [[UInt8]] = [
            [], bytes(UInt64(512)), bytes(UInt64(512)) + bytes(UInt32(3)),
            bytes(UInt64(512)) + bytes(UInt32(1)) + bytes(UInt32(1)),
            bytes(UInt64(512)) + bytes(UInt32(1)) + [0],
            bytes(UInt64(512)) + [UInt8](repeating: 0, count: 4 * 17),
        ]
        for data in bad { #expect(parse(data) == nil) }
    }
}

@Suite struct RulesTests {
    private func verdict(
        _ command: Command, _ flags: CommandFlags = [], offset: UInt64 = 0, length: UInt64 = 65536,
        _ format: WireFormat = .extended, contexts: Bool = true
    ) -> Verdict {
        RequestRules(
            exportSize: (1 << 40) + 4096, isReadOnly: false, format: format, hasContexts: contexts,
            dataBlockSize: 65536
        ).verdict(
            RequestHeader(
                flags: flags, command: command.rawValue, cookie: 0, offset: offset,
                length: length))
    }

    @Test func flagsOfTheFormats() {
        #expect(verdict(.read, .dontFragment, .simple) == .refuse(.unknownFlags))
        #expect(verdict(.read, .dontFragment, .structured) == .perform(.read))
        #expect(verdict(.write, .payloadLength, .structured) == .refuse(.unknownFlags))
        #expect(verdict(.write, .payloadLength) == .perform(.write))
        #expect(verdict(.trim, .payloadLength) == .refuse(.unknownFlags))
        #expect(verdict(.blockStatus, .requestOne, .structured) == .perform(.blockStatus))
        #expect(
            verdict(.blockStatus, .payloadLength, .structured) == .refuse(.unknownFlags))
        #expect(
            verdict(.blockStatus, [.payloadLength, .requestOne]) == .perform(.blockStatus))
    }

    @Test func blockStatusNeedsAContextAndARange() {
        #expect(verdict(.blockStatus, contexts: false) == .refuse(.noContext))
        #expect(verdict(.blockStatus, length: 0) == .refuse(.emptyStatus))
        #expect(verdict(.blockStatus, length: 1 << 41) == .refuse(.readPastEnd))
        #expect(verdict(.blockStatus, length: 1 << 40) == .perform(.blockStatus))
    }

    @Test func rangesInPayloads() {
        let rules = RequestRules(
            exportSize: 1 << 30, isReadOnly: true, format: .extended, hasContexts: true)
        #expect(rules.statusRefusal(offset: 0, length: 1 << 30) == nil)
        #expect(rules.statusRefusal(offset: 512, length: 1 << 30) == .readPastEnd)
        #expect(rules.statusRefusal(offset: 0, length: 0) == .emptyStatus)
        #expect(rules.statusRefusal(offset: 1, length: 512) == .unaligned)
        #expect(rules.statusRefusal(offset: .max, length: .max) == .readPastEnd)
    }

    @Test func fastIsWhatOnlyChangesTheMap() {
        let fast: CommandFlags = .fastZero
        #expect(verdict(.writeZeroes, fast) == .perform(.writeZeroes))
        #expect(verdict(.writeZeroes, fast, length: 1 << 40) == .perform(.writeZeroes))
        #expect(
            verdict(.writeZeroes, fast, length: (1 << 40) + 4096) == .perform(.writeZeroes))
        #expect(verdict(.writeZeroes, fast, length: 4096) == .refuse(.notFast))
        #expect(verdict(.writeZeroes, fast, offset: 4096) == .refuse(.notFast))
        #expect(verdict(.writeZeroes, [fast, .noHole]) == .refuse(.notFast))
        #expect(verdict(.writeZeroes, .noHole) == .perform(.writeZeroes))
        #expect(verdict(.write, fast) == .refuse(.unknownFlags))
    }
}
