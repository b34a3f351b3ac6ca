// What the handshake answers to each option, well formed and not, wherever the input is cut.

import FoundationEssentials
import NBDProtocol
import Testing

@Suite struct HandshakeTests {
    @Test func greeting() {
        let session = Session([])
        #expect(
            session.output == bytes(Magic.greeting) + bytes(Magic.option) + bytes(UInt16(3)))
        #expect(session.outcome == .receive)
        #expect(session.isAtBoundary)
    }

    @Test func goTellsSizeFlagsAndBlockSizesAndWhatIsAsked() throws {
        let asked = [InfoType.name, InfoType.description, 77]
        let session = Session(newstyle + option(.go, query("beta", asked)))
        let replies = try #require(session.replies)
        let flags: UInt16 = 0b1101_0110_1101
        #expect(
            replies == [
                OptionReply(.go, .info, bytes(UInt16(0)) + bytes(UInt64(1 << 30)) + bytes(flags)),
                OptionReply(
                    .go, .info,
                    bytes(UInt16(3)) + bytes(UInt32(512)) + bytes(UInt32(4096))
                        + bytes(UInt32(32 << 20))),
                OptionReply(.go, .info, bytes(UInt16(1)) + Array("beta".utf8)),
                OptionReply(.go, .info, bytes(UInt16(2)) + Array("thin volume".utf8)),
                OptionReply(.go, .ack),
            ])
        guard case .transmit(let agreement) = session.outcome else {
            Issue.record("no transmission: \(session.outcome)")
            return
        }
        #expect(agreement.export.name == "beta")
        #expect(session.directory.opened == ["beta"])
    }

    @Test(arguments: [OptionCode.go, .exportName])
    func aBusyExportIsOpenedWhenItIsAskedForAgain(code: OptionCode) {
        var directory = TestDirectory()
        directory.busy = 2
        var handshake = Handshake()
        var output: [UInt8] = []
        let data = code == .go ? query("beta") : Array("beta".utf8)
        var input = newstyle + option(code, data)
        var outcomes: [Handshake.Outcome] = []
        while outcomes.count < 10 {
            let (consumed, outcome) = input.withUnsafeBytes {
                handshake.advance($0, output: &output, exports: &directory)
            }
            input.removeFirst(consumed)
            outcomes.append(outcome)
            if case .transmit = outcome { break }
        }
        #expect(outcomes.count(where: { $0 == .wait }) == 2)
        #expect(directory.opened == ["beta"])
        guard case .transmit(let agreement) = outcomes.last else {
            Issue.record("no transmission: \(outcomes)")
            return
        }
        #expect(agreement.export.name == "beta")
    }

    @Test func infoSaysTheSameAsGoAndOpensNothing() throws {
        let session = Session(newstyle + option(.info, query("beta")) + option(.go, query("beta")))
        let replies = try #require(session.replies)
        #expect(replies.count == 6)
        #expect(replies[..<3].map(\.data) == replies[3...].map(\.data))
        #expect(replies[..<3].map(\.type) == replies[3...].map(\.type))
        #expect(session.directory.opened == ["beta"])
    }

    @Test func readOnlyFlag() {
        let export = Export(name: "", size: 0, isReadOnly: true, description: "")
        let flags = Agreement(export: export).transmissionFlags
        #expect(flags.contains([.readOnly, .hasFlags, .sendFlush, .sendFUA]))
    }

    @Test func defaultExportOnlyWhereThereIsOneVolume() throws {
        var one = TestDirectory()
        one.names = ["only"]
        let found = Session(newstyle + option(.go, query("")), directory: one)
        #expect(found.directory.opened == ["only"])
        let ambiguous = Session(newstyle + option(.go, query("")))
        #expect(try #require(ambiguous.replies).map(\.type) == [.unknown])
        #expect(ambiguous.outcome == .receive)
    }

    @Test func unknownExportKeepsTheSession() throws {
        let session = Session(
            newstyle + option(.info, query("gamma")) + option(.go, query("gamma"))
                + option(.go, query("alpha")))
        let replies = try #require(session.replies)
        #expect(replies.prefix(2).map(\.type) == [.unknown, .unknown])
        #expect(session.directory.opened == ["alpha"])
    }

    @Test(arguments: [false, true])
    func exportNameWithAndWithoutZeroes(noZeroes: Bool) {
        let flags = ClientFlag.fixedNewstyle | (noZeroes ? ClientFlag.noZeroes : 0)
        let request = [UInt8]("next bytes".utf8)
        let session = Session(
            bytes(flags) + option(.exportName, Array("alpha".utf8)) + request)
        let answer = bytes(UInt64(1 << 30)) + bytes(UInt16(0b1101_0110_1101))
        let zeroes = [UInt8](repeating: 0, count: noZeroes ? 0 : 124)
        #expect(Array(session.output.dropFirst(18)) == answer + zeroes)
        #expect(session.rest == request)
        #expect(session.directory.opened == ["alpha"])
    }

    @Test func exportNameCannotBeRefused() {
        let names: [[UInt8]] = [
            Array("gamma".utf8), [], [0xFF, 0xFE], [UInt8](repeating: 0x61, count: 4096),
            Array("alpha\0".utf8),
        ]
        for name in names {
            let session = Session(newstyle + option(.exportName, name))
            #expect(session.isViolation)
            #expect(session.output.count == 18)
            #expect(session.directory.opened.isEmpty)
        }
    }

    @Test func onlyExportNameWithoutFixedNewstyle() {
        let old = bytes(UInt32(0))
        #expect(Session(old + option(.list)).isViolation)
        #expect(Session(old + option(.go, query("alpha"))).isViolation)
        let session = Session(old + option(.exportName, Array("alpha".utf8)))
        #expect(session.output.count == 18 + 10 + 124)
    }

    @Test(arguments: [4, 8, 0x8000_0000, 0xFFFF_FFFF] as [UInt32])
    func unknownClientFlagsEndTheSession(flags: UInt32) {
        #expect(Session(bytes(flags)).isViolation)
    }

    @Test func listAndAbort() throws {
        let session = Session(newstyle + option(.list) + option(.abort))
        #expect(
            try #require(session.replies) == [
                OptionReply(.list, .server, bytes(UInt32(5)) + Array("alpha".utf8)),
                OptionReply(.list, .server, bytes(UInt32(4)) + Array("beta".utf8)),
                OptionReply(.list, .ack), OptionReply(.abort, .ack),
            ])
        #expect(session.outcome == .close(.aborted))
    }

    @Test func longListsGoOutInPiecesOfWholeReplies() throws {
        var directory = TestDirectory()
        directory.names = (0..<1000).map { "volume\($0)" }
        var handshake = Handshake()
        let input = newstyle + option(.list)
        var position = 0
        var all: [UInt8] = []
        var largest = 0
        while true {
            var piece: [UInt8] = []
            let (consumed, outcome) = input[position...].withUnsafeBytes {
                handshake.advance($0, output: &piece, exports: &directory)
            }
            position += consumed
            largest = max(largest, piece.count)
            if !all.isEmpty && !piece.isEmpty {
                #expect(bigEndian(piece[...], as: UInt64.self) == Magic.optionReply)
            }
            all += piece
            if outcome == .receive { break }
        }
        #expect(largest < 9000)
        var session = Session([])
        session.output = all
        #expect(try #require(session.replies).count == 1001)
    }

    /// A client that does not read its list costs no memory for it, and exports come and go
    /// meanwhile.
    @Test func aListIsNotKept() throws {
        var directory = TestDirectory()
        directory.names = (1000..<2000).map { "volume\($0)" }
        var handshake = Handshake()
        var input = newstyle + option(.list)
        func advance() throws -> [UInt8] {
            var output: [UInt8] = []
            let consumed = input.withUnsafeBytes {
                handshake.advance($0, output: &output, exports: &directory).consumed
            }
            input.removeFirst(consumed)
            return output
        }
        var all = try advance() + advance()
        #expect(try JSONEncoder().encode(handshake).count < 1024)
        directory.names.removeAll { $0 == "volume1999" }
        directory.names.removeFirst(500)
        directory.names.append("volume2000")
        while true {
            let piece = try advance()
            if piece.isEmpty { break }
            all += piece
        }
        var session = Session([])
        session.output = all
        let replies = try #require(session.replies)
        let listed = replies.filter { $0.type == .server }.map {
            String(decoding: $0.data.dropFirst(4), as: UTF8.self)
        }
        #expect(listed == listed.sorted() && Set(listed).count == listed.count)
        #expect(listed.first == "volume1000" && listed.last == "volume2000")
        #expect(!listed.contains("volume1999"))
        #expect(replies.last == OptionReply(.list, .ack))
    }

    @Test func noNamesAtAll() throws {
        var directory = TestDirectory()
        directory.names = []
        let session = Session(newstyle + option(.list), directory: directory)
        #expect(try #require(session.replies) == [OptionReply(.list, .ack)])
    }

    @Test(arguments: [4, 5, 12, 13, 0, 0x4E42_4431, 0xFFFF_FFFF] as [UInt32])
    func optionsOfTheFutureAreRefusedInStep(code: UInt32) throws {
        for length in [0, 1, 17, 4096, 65536, 65537, 100_000] {
            let data = [UInt8](repeating: 0xA5, count: length)
            let session = Session(
                newstyle + option(OptionCode(rawValue: code), data) + option(.list))
            let replies = try #require(session.replies)
            #expect(replies.count == 4)
            #expect(replies[0].type == .unsupported)
            #expect(replies[0].option.rawValue == code)
            #expect(replies[3] == OptionReply(.list, .ack))
        }
    }

    @Test func listWithDataIsInvalid() throws {
        for length in [1, 1025, 65536, 65537] {
            let data = [UInt8](repeating: 0, count: length)
            let session = Session(newstyle + option(.list, data) + option(.list))
            #expect(
                try #require(session.replies).map(\.type) == [.invalid, .server, .server, .ack])
        }
    }

    @Test func abortWithDataIsAcknowledged() throws {
        for length in [1, 1025, 65537] {
            let session = Session(newstyle + option(.abort, [UInt8](repeating: 7, count: length)))
            #expect(try #require(session.replies) == [OptionReply(.abort, .ack)])
            #expect(session.outcome == .close(.aborted))
        }
    }

    @Test(arguments: [OptionCode.info, .go])
    func badQueries(code: OptionCode) throws {
        let name = Array("alpha".utf8)
        let bad: [[UInt8]] = [
            [], [0], bytes(UInt32(0)), bytes(UInt32(0)) + [0],  // shorter than the fields
            query(name, nameLength: 0xFFFF_FFFF), query(name, nameLength: 0xFFFF_FFFA),
            query(name, nameLength: 0x8000_0000), query(name, nameLength: 6),
            query(name, nameLength: 7), query(name, nameLength: 4),
            query(name) + [0], query(name, [1, 2, 3]) + [0],  // bytes after the end
            Array(query(name, [1, 2, 3]).dropLast()),
            bytes(UInt32(5)) + name + bytes(UInt16(0xFFFF)),  // types that are not there
            query([UInt8](repeating: 0x61, count: 4097)), query([0xC3, 0x28]),
            query(Array("al\0pha".utf8)), [UInt8](repeating: 0xFF, count: 1025),
        ]
        for data in bad {
            let session = Session(newstyle + option(code, data) + option(.abort))
            #expect(try #require(session.replies).map(\.type) == [.invalid, .ack])
            #expect(session.directory.opened.isEmpty)
        }
        for length in [65537, 1 << 20] {
            let data = [UInt8](repeating: 0, count: length)
            let session = Session(newstyle + option(code, data) + option(.abort))
            #expect(try #require(session.replies).map(\.type) == [.tooBig, .ack])
        }
    }

    @Test(arguments: [255, 256, 257, 3000, 4096])
    func longNamesAreNamesLikeOthers(length: Int) throws {
        var directory = TestDirectory()
        let name = String(repeating: "x", count: length)
        directory.names = [name, "other"]
        let go = Session(
            newstyle + option(.list) + option(.go, query(name, [1])), directory: directory)
        #expect(go.directory.opened == [name])
        let unknown = Session(newstyle + option(.go, query(name, [1, 2])))
        let replies = try #require(unknown.replies)
        #expect(replies.map(\.type) == [.unknown])
        #expect(replies[0].data.count < 1024)
    }

    @Test func manyInfoTypesAreFine() throws {
        let types = (0..<UInt16(30_000)).map { $0 % 7 }
        let session = Session(newstyle + option(.go, query("alpha", types)))
        #expect(try #require(session.replies).compactMap(\.info) == [0, 3, 1, 2])
    }

    /// They would cost far more to compare than to send.
    @Test func noNameIsBeyondASCII() throws {
        var directory = TestDirectory()
        directory.names = ["\u{e9}"]
        for code in [OptionCode.info, .go] {
            let session = Session(
                newstyle + option(code, query("\u{e9}")), directory: directory)
            #expect(try #require(session.replies).map(\.type) == [.unknown])
        }
        let session = Session(
            newstyle + option(.exportName, Array("\u{e9}".utf8)), directory: directory)
        #expect(session.isViolation && session.directory.opened.isEmpty)
    }

    @Test(arguments: 0...11 as ClosedRange<UInt32>)
    func announcedGigabytesEndTheSessionAtOnce(code: UInt32) {
        for length in [0xFFFF_FFFF, 0x8000_0000, UInt32(Limits.maximumDrain) + 1] {
            let header = option(OptionCode(rawValue: code), length: length)
            #expect(Session(newstyle + header).isViolation)
        }
    }

    @Test func drainedBytesAreCountedOverTheSession() {
        let long = option(.startTLS, [UInt8](repeating: 0, count: 600_000))
        #expect(Session(newstyle + long).outcome == .receive)
        #expect(Session(newstyle + long + long).isViolation)
    }

    @Test func optionsAreCounted() throws {
        let asked = option(.info, query("alpha"))
        func options(_ count: Int) -> [UInt8] { (0..<count).flatMap { _ in asked } }
        let most = Limits.maximumOptions
        #expect(Session(newstyle + options(most)).outcome == .receive)
        #expect(Session(newstyle + options(most + 1)).isViolation)
        #expect(Session(newstyle + (0...most).flatMap { _ in option(.list) }).isViolation)
        // Who was told of exports may ask about each of them; being told again adds nothing.
        var directory = TestDirectory()
        directory.names = ["alpha"] + (1..<100).map { "volume\($0)" }
        for lists in [1, 10] {
            let listed = newstyle + (0..<lists).flatMap { _ in option(.list) }
            let left = most + 100 * Limits.questionsOfListedExport - lists
            #expect(Session(listed + options(left), directory: directory).outcome == .receive)
            #expect(Session(listed + options(left + 1), directory: directory).isViolation)
        }
    }

    @Test func notNBDAtAll() {
        for text in ["GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0"] {
            #expect(Session(Array(text.utf8)).isViolation)
        }
        #expect(Session(newstyle + [UInt8](repeating: 0x20, count: 16)).isViolation)
    }

    @Test func leavingIsCleanOnlyBetweenMessages() {
        let input = newstyle + option(.info, query("alpha"))
        for end in 0...input.count {
            let session = Session(Array(input[..<end]))
            #expect(session.isAtBoundary == (end == 0 || end == 4 || end == input.count))
        }
    }

    @Test func everyOrderOfTwoOptions() throws {
        let options = (1...12).map { code -> [UInt8] in
            code == 6 || code == 7
                ? option(OptionCode(rawValue: UInt32(code)), query("nobody"))
                : option(OptionCode(rawValue: UInt32(code)))
        }
        for first in options {
            for second in options {
                let session = Session(newstyle + first + second + second)
                if !session.isViolation { #expect(session.replies != nil) }
                #expect(session.directory.opened.isEmpty)
            }
        }
    }

    @Test func cutAtEveryByte() {
        let input =
            newstyle + option(.structuredReply) + option(.list)
            + option(.info, query("beta", [1, 3]))
            + option(.go, query("nobody")) + option(.startTLS, [1, 2, 3])
            + option(.go, query("alpha", [2])) + [9, 8, 7]
        let whole = Session(input)
        #expect(whole.rest == [9, 8, 7])
        for cut in 0..<input.count {
            let session = Session(input, cuts: [cut])
            #expect(session.output == whole.output)
            #expect(session.outcome == whole.outcome)
            #expect(session.rest == whole.rest)
        }
        let bytewise = Session(input, cuts: Array(0..<input.count))
        #expect(bytewise.output == whole.output)
    }

    /// Random, mutated and random-structured input: no crash, whole replies, bounded output, and
    /// the same answer however the input is cut.
    @Test(arguments: 0..<40 as Range<UInt64>)
    func randomInput(seed: UInt64) {
        var random = SplitMix(state: seed)
        for _ in 0..<50 {
            var input = newstyle
            for _ in 0..<Int.random(in: 1...8, using: &random) {
                let code = OptionCode(rawValue: UInt32.random(in: 0...13, using: &random))
                var data = query(
                    ["alpha", "beta", "", "\u{1F600}"].randomElement(using: &random)!,
                    (0..<3).map { _ in UInt16.random(in: 0...4, using: &random) })
                if Bool.random(using: &random) { data = [] }
                input += option(code, data)
            }
            for _ in 0..<Int.random(in: 0...6, using: &random) {
                let index = Int.random(in: 0..<input.count, using: &random)
                switch Int.random(in: 0..<4, using: &random) {
                case 0: input[index] = UInt8.random(in: 0...255, using: &random)
                case 1: input[index] ^= 1 << UInt8.random(in: 0..<8, using: &random)
                case 2: input.remove(at: index)
                default: input.insert(UInt8.random(in: 0...255, using: &random), at: index)
                }
                if input.isEmpty { input = [0] }
            }
            let whole = Session(input)
            let cuts = (0..<5).map { _ in Int.random(in: 0...input.count, using: &random) }.sorted()
            let cut = Session(input, cuts: cuts)
            #expect(whole.output == cut.output, "seed \(seed)")
            #expect(whole.outcome == cut.outcome, "seed \(seed)")
            #expect(whole.output.count < 100_000)
        }
    }
}
