// Request headers, what is refused and why, and replies.

import Glibc
import NBDProtocol
import Testing

private let gibibyte: UInt64 = 1 << 30

private func header(
    _ command: Command, offset: UInt64 = 0, length: UInt64 = 4096, flags: CommandFlags = []
) -> RequestHeader {
    RequestHeader(
        flags: flags, command: command.rawValue, cookie: 1, offset: offset, length: length)
}

private func verdict(_ header: RequestHeader, size: UInt64 = gibibyte, readOnly: Bool = false)
    -> Verdict
{
    RequestRules(exportSize: size, isReadOnly: readOnly).verdict(header)
}

@Suite struct RequestTests {
    @Test func parse() throws {
        let wire: [UInt8] = [
            0x25, 0x60, 0x95, 0x13, 0x00, 0x03, 0x00, 0x06, 1, 2, 3, 4, 5, 6, 7, 8,
            0, 0, 0, 1, 0, 0, 2, 0, 0xFF, 0xFF, 0xFE, 0x00,
        ]
        let request = try #require(wire.withUnsafeBytes { RequestHeader.parse($0.baseAddress!) })
        #expect(request.flags == [.fua, .noHole])
        #expect(request.command == 6)
        #expect(request.offset == 0x1_0000_0200)
        #expect(request.length == 0xFFFF_FE00)
        #expect(request.payloadLength(extended: false) == 0)
        var reply = [UInt8](repeating: 0xEE, count: 16)
        reply.withUnsafeMutableBytes {
            SimpleReply.write(to: $0.baseAddress!, error: .noSpace, cookie: request.cookie)
        }
        #expect(reply == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8])
    }

    @Test func wrongMagic() {
        for byte in 0..<4 {
            for bit in 0..<8 {
                var wire: [UInt8] = [0x25, 0x60, 0x95, 0x13] + [UInt8](repeating: 0, count: 24)
                wire[byte] ^= 1 << UInt8(bit)
                #expect(wire.withUnsafeBytes { RequestHeader.parse($0.baseAddress!) } == nil)
            }
        }
    }

    @Test func whatIsPerformed() {
        for command in [Command.read, .write, .trim, .writeZeroes, .cache] {
            for flags: CommandFlags in [[], .fua] {
                #expect(verdict(header(command, flags: flags)) == .perform(command))
            }
            #expect(
                verdict(header(command, offset: gibibyte - 512, length: 512))
                    == .perform(command))
            #expect(verdict(header(command, offset: gibibyte, length: 0)) == .perform(command))
        }
        #expect(verdict(header(.flush, length: 0, flags: .fua)) == .perform(.flush))
        #expect(verdict(header(.writeZeroes, flags: [.fua, .noHole])) == .perform(.writeZeroes))
        #expect(
            verdict(header(.disconnect, offset: 7, length: 7, flags: .fastZero))
                == .perform(.disconnect))
        for command in [Command.read, .write] {
            #expect(verdict(header(command, length: 32 << 20)) == .perform(command))
            #expect(verdict(header(command, length: 32 << 20 | 512)) == .refuse(.tooLong))
            #expect(verdict(header(command, length: 0xFFFF_FFFF)) == .refuse(.tooLong))
        }
    }

    @Test func bigRangesWithoutPayload() {
        let size: UInt64 = 1 << 50
        for command in [Command.trim, .writeZeroes, .cache] {
            #expect(verdict(header(command, length: 0xFFFF_FE00), size: size) == .perform(command))
            #expect(
                verdict(header(command, length: 0xFFFF_FFFF), size: size) == .refuse(.unaligned))
            #expect(
                verdict(header(command, offset: 1, length: 0xFFFF_FFFF), size: size)
                    == .refuse(.unaligned))
        }
    }

    @Test func beyondTheEnd() {
        let places: [(UInt64, UInt64)] = [
            (gibibyte, 512), (gibibyte - 512, 1024), (gibibyte + 512, 0), (.max, 1),
            (.max - 511, 512), (.max - 4095, 4096), (1 << 63, 1 << 20), (.max, 0),
        ]
        for (offset, length) in places {
            for command in [Command.read, .trim, .cache] {
                #expect(
                    verdict(header(command, offset: offset, length: length))
                        == .refuse(.readPastEnd))
            }
            for command in [Command.write, .writeZeroes] {
                #expect(
                    verdict(header(command, offset: offset, length: length))
                        == .refuse(.writePastEnd))
            }
        }
        #expect(verdict(header(.read), size: 0) == .refuse(.readPastEnd))
    }

    @Test func unaligned() {
        for command in [Command.read, .write, .trim, .writeZeroes, .cache] {
            #expect(verdict(header(command, offset: 1)) == .refuse(.unaligned))
            #expect(verdict(header(command, length: 511)) == .refuse(.unaligned))
            #expect(verdict(header(command, offset: 256, length: 256)) == .refuse(.unaligned))
        }
    }

    @Test func readOnly() {
        for command in [Command.write, .trim, .writeZeroes] {
            #expect(verdict(header(command), readOnly: true) == .refuse(.readOnly))
        }
        for command in [Command.read, .cache] {
            #expect(verdict(header(command), readOnly: true) == .perform(command))
        }
        #expect(verdict(header(.flush, length: 0), readOnly: true) == .perform(.flush))
    }

    @Test func unknownCommandsAndFlags() {
        for command in [8, 9, 255, 0x8000, 0xFFFF] as [UInt16] {
            let header = RequestHeader(
                flags: [], command: command, cookie: 0, offset: 0, length: 512)
            #expect(verdict(header) == .refuse(.unknownCommand))
            #expect(header.payloadLength(extended: false) == 0)
        }
        for bit in 1..<16 {
            let flags = CommandFlags(rawValue: 1 << UInt16(bit))
            for command in [Command.read, .write, .trim, .cache] {
                #expect(verdict(header(command, flags: flags)) == .refuse(.unknownFlags))
            }
            #expect(verdict(header(.flush, length: 0, flags: flags)) == .refuse(.unknownFlags))
            if bit != 1 && bit != 4 {
                #expect(verdict(header(.writeZeroes, flags: flags)) == .refuse(.unknownFlags))
            }
        }
        #expect(verdict(header(.flush, length: 512)) == .refuse(.flushWithRange))
        #expect(verdict(header(.flush, offset: 512, length: 0)) == .refuse(.flushWithRange))
    }

    @Test func errorsOfRefusals() {
        #expect(Refusal.readOnly.error == .notPermitted)
        #expect(Refusal.writePastEnd.error == .noSpace)
        #expect(Refusal.notFast.error == .notSupported)
        let others: Set<Refusal> = [.readOnly, .writePastEnd, .notFast]
        for refusal in Refusal.allCases where !others.contains(refusal) {
            #expect(refusal.error == .invalid)
        }
        #expect(Set(Refusal.allCases.map(\.description)).count == Refusal.allCases.count)
    }

    @Test func errnoOnTheWire() {
        let known: [(Int32, UInt32)] = [
            (0, 0), (EPERM, 1), (EROFS, 1), (EIO, 5), (ENOMEM, 12), (EINVAL, 22), (ENOSPC, 28),
            (EDQUOT, 28), (EFBIG, 28), (EOVERFLOW, 75), (ESHUTDOWN, 108), (ENOTSUP, 22),
            (E2BIG, 22),
        ]
        for (code, wire) in known { #expect(WireError(errno: code).rawValue == wire) }
        let legal: Set<UInt32> = [1, 5, 12, 22, 28, 75, 95, 108]
        for code in Int32(1)..<200 { #expect(legal.contains(WireError(errno: code).rawValue)) }
    }

    /// What is performed lies inside the export, in arithmetic that cannot wrap.
    @Test(arguments: 0..<20 as Range<UInt64>)
    func randomHeaders(seed: UInt64) {
        var random = SplitMix(state: seed)
        let interesting: [UInt64] = [
            0, 1, 511, 512, 4096, 1 << 25, (1 << 25) + 512, 1 << 30, 1 << 32, (1 << 32) - 512,
            1 << 63,
            .max, .max - 511, .max - 512,
        ]
        for _ in 0..<2000 {
            func number() -> UInt64 {
                let base = interesting.randomElement(using: &random)!
                return Bool.random(using: &random)
                    ? base &+ UInt64.random(in: 0...1024, using: &random) : base
            }
            let size = number() & ~511 & (.max >> 1)
            var wire = (0..<28).map { _ in UInt8.random(in: 0...255, using: &random) }
            wire.replaceSubrange(0..<4, with: bytes(Magic.request))
            wire.replaceSubrange(
                4..<8,
                with: [
                    0, UInt8.random(in: 0...3, using: &random), 0,
                    UInt8.random(in: 0...8, using: &random),
                ])
            wire.replaceSubrange(16..<24, with: bytes(number()))
            wire.replaceSubrange(24..<28, with: bytes(UInt32(truncatingIfNeeded: number())))
            let header = wire.withUnsafeBytes { RequestHeader.parse($0.baseAddress!)! }
            let readOnly = Bool.random(using: &random)
            guard
                case .perform(let command) = RequestRules(
                    exportSize: size, isReadOnly: readOnly
                ).verdict(header), command != .disconnect
            else { continue }
            let (end, overflow) = header.offset.addingReportingOverflow(header.length)
            #expect(!overflow && end <= size && end % 512 == 0, "seed \(seed)")
            #expect(!readOnly || [.read, .cache, .flush].contains(command), "seed \(seed)")
        }
    }
}
