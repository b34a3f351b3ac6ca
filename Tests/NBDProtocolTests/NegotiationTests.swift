// What client and server agree on before transmission: formats, meta contexts, TLS.

import NBDProtocol
import Testing

private func contexts(_ code: OptionCode, _ name: String, _ queries: [String]) -> [UInt8] {
    var data = bytes(UInt32(name.utf8.count)) + Array(name.utf8) + bytes(UInt32(queries.count))
    for query in queries { data += bytes(UInt32(query.utf8.count)) + Array(query.utf8) }
    return option(code, data)
}

/// Names and ids of the contexts in the replies.
private func told(_ replies: [OptionReply]) -> [MetaContext] {
    replies.filter { $0.type == .metaContext }.map {
        MetaContext(
            id: bigEndian($0.data[0...], as: UInt32.self),
            name: String(decoding: $0.data.dropFirst(4), as: UTF8.self))
    }
}

private let structured = newstyle + option(.structuredReply)
private let extended = newstyle + option(.extendedHeaders)

@Suite struct FormatTests {
    @Test func simpleUnlessAskedFor() throws {
        let agreement = try #require(Session(newstyle + option(.go, query("alpha"))).agreement)
        #expect(agreement.format == .simple)
        #expect(!agreement.transmissionFlags.contains(.sendDF))
    }

    @Test func structuredRepliesAsOftenAsAskedFor() throws {
        let session = Session(
            structured + option(.structuredReply) + option(.go, query("alpha")))
        #expect(try #require(session.replies).prefix(2).map(\.type) == [.ack, .ack])
        #expect(session.agreement?.format == .structured)
    }

    @Test func extendedHeadersGoBeforeStructuredReplies() throws {
        let session = Session(
            structured + option(.extendedHeaders) + option(.structuredReply)
                + option(.extendedHeaders) + option(.go, query("alpha")))
        let types = try #require(session.replies).prefix(4).map(\.type)
        #expect(types == [.ack, .ack, .extendedHeadersRequired, .ack])
        let agreement = try #require(session.agreement)
        #expect(agreement.format == .extended)
    }

    @Test func flagsFollowTheFormat() throws {
        let selection = contexts(.setMetaContext, "alpha", ["base:allocation"])
        for (input, extra): ([UInt8], UInt16) in [
            (newstyle, 0), (structured, 1 << 7), (structured + selection, 1 << 7),
            // To say which contexts are meant takes some that were selected, for this export.
            (extended, 1 << 7), (extended + selection, 1 << 7 | 1 << 12),
            (extended + contexts(.setMetaContext, "beta", ["base:allocation"]), 1 << 7),
        ] {
            for code in [OptionCode.info, .go] {
                let session = Session(input + option(code, query("alpha")))
                let info = try #require(session.replies?.first { $0.info == InfoType.export })
                let flags = bigEndian(info.data[10...], as: UInt16.self)
                #expect(flags & (1 << 7 | 1 << 12) == extra)
            }
        }
    }

    @Test(arguments: [OptionCode.structuredReply, .extendedHeaders])
    func theyHaveNoData(code: OptionCode) throws {
        for length in [1, 100_000] {
            let data = [UInt8](repeating: 0, count: length)
            let session = Session(
                newstyle + option(code, data) + option(.go, query("alpha")))
            #expect(session.replies?.first?.type == .invalid)
            #expect(session.agreement?.format == .simple)
        }
    }

    @Test func exportNameAfterStructuredRepliesButNotAfterExtendedHeaders() {
        let name = option(.exportName, Array("alpha".utf8))
        #expect(Session(structured + name).agreement?.format == .structured)
        let refused = Session(extended + name)
        #expect(refused.isViolation)
        #expect(refused.directory.opened.isEmpty)
    }

    @Test func rotationalIsTold() {
        let export = Export(
            name: "", size: 0, isReadOnly: false, description: "", isRotational: true)
        #expect(Agreement(export: export).transmissionFlags.contains(.rotational))
    }

    @Test func aRefusalIsTold() throws {
        var directory = TestDirectory()
        directory.refusal = "too many"
        let session = Session(
            newstyle + option(.go, query("alpha")) + option(.list), directory: directory)
        let reply = try #require(session.replies?.first)
        #expect(reply == OptionReply(.go, .policy, Array("too many".utf8)))
        #expect(session.outcome == .receive)
        let byName = Session(
            newstyle + option(.exportName, Array("alpha".utf8)), directory: directory)
        #expect(byName.isViolation)
    }
}

@Suite struct MetaContextTests {
    @Test func selectedOnesAreTheSessions() throws {
        let session = Session(
            structured
                + contexts(
                    .setMetaContext, "alpha",
                    ["test:two", "unknown:x", "nocolon", "base:", "base:allocation", "test:two"])
                + option(.go, query("alpha")))
        let expected = [
            MetaContext(id: 1, name: "test:two"), MetaContext(id: 2, name: "base:allocation"),
        ]
        #expect(told(try #require(session.replies)) == expected)
        #expect(session.agreement?.contexts == expected)
        #expect(session.directory.openedContexts == expected)
    }

    @Test func theyNeedAFormatThatCanTellThem() throws {
        for code in [OptionCode.setMetaContext, .listMetaContext] {
            let session = Session(newstyle + contexts(code, "alpha", ["base:allocation"]))
            #expect(try #require(session.replies).map(\.type) == [.invalid])
        }
    }

    @Test func theyAreBoundToTheName() {
        let selection = contexts(.setMetaContext, "alpha", ["base:allocation"])
        #expect(
            Session(structured + selection + option(.go, query("beta"))).agreement?.contexts == [])
        // INFO of another export in between changes nothing.
        let session = Session(
            structured + selection + option(.info, query("beta")) + option(.go, query("alpha")))
        #expect(session.agreement?.contexts.count == 1)
    }

    @Test func theLastSelectionCountsEvenIfItFails() throws {
        let first = contexts(.setMetaContext, "alpha", ["base:allocation"])
        let failures: [[UInt8]] = [
            contexts(.setMetaContext, "gamma", ["base:allocation"]),
            option(.setMetaContext, [0, 0]),
            option(.setMetaContext, [UInt8](repeating: 0, count: 70_000)),
            contexts(.setMetaContext, "alpha", []),
        ]
        for failure in failures {
            let session = Session(structured + first + failure + option(.go, query("alpha")))
            #expect(session.agreement?.contexts == [])
        }
    }

    @Test func listsWhatThereIs() throws {
        let cases: [([String], [String])] = [
            ([], ["base:allocation", "test:one", "test:two"]),
            (["test:"], ["test:one", "test:two"]),
            (["base:"], ["base:allocation"]),
            (["test:one", "test:", "x:"], ["test:one", "test:two"]),
            (["nocolon"], []), ([""], []),
        ]
        for (queries, names) in cases {
            let session = Session(structured + contexts(.listMetaContext, "alpha", queries))
            let replies = try #require(session.replies)
            #expect(told(replies) == names.map { MetaContext(id: 0, name: $0) })
            #expect(replies.last == OptionReply(.listMetaContext, .ack))
        }
    }

    @Test func noMoreQueriesThanAreAnswered() throws {
        let others = (1..<Limits.maximumContexts).map { "other:\($0)" }
        let answered = Session(
            structured + contexts(.listMetaContext, "alpha", others + ["test:one"]))
        #expect(told(try #require(answered.replies)).map(\.name) == ["test:one"])
        let refused = Session(
            structured + contexts(.listMetaContext, "alpha", others + ["other:0", "test:one"])
                + option(.abort))
        #expect(try #require(refused.replies).map(\.type) == [.ack, .tooBig, .ack])
    }

    @Test func noMoreQueriesThanAreLookedAt() throws {
        for code in [OptionCode.setMetaContext, .listMetaContext] {
            let many = [String](repeating: "", count: Limits.maximumQueries + 1)
            let refused = Session(structured + contexts(code, "alpha", many))
            #expect(try #require(refused.replies).map(\.type) == [.ack, .tooBig])
        }
        let most = [String](repeating: "", count: Limits.maximumQueries - 1) + ["test:one"]
        let answered = Session(structured + contexts(.setMetaContext, "alpha", most))
        #expect(told(try #require(answered.replies)).map(\.name) == ["test:one"])
    }

    @Test func noContextIsBeyondASCII() throws {
        var directory = TestDirectory()
        directory.contexts = ["test:\u{e9}"]
        for code in [OptionCode.setMetaContext, .listMetaContext] {
            let session = Session(
                structured + contexts(code, "alpha", ["test:\u{e9}"])
                    + contexts(code, "\u{e9}", []), directory: directory)
            #expect(try #require(session.replies).map(\.type) == [.ack, .ack, .unknown])
        }
    }

    @Test func listingDoesNotSelect() {
        let session = Session(
            structured + contexts(.setMetaContext, "alpha", ["test:one"])
                + contexts(.listMetaContext, "alpha", []) + option(.go, query("alpha")))
        #expect(session.agreement?.contexts.map(\.name) == ["test:one"])
    }

    @Test func noMoreThanASessionMaySelect() throws {
        var directory = TestDirectory()
        directory.contexts = (0..<100).map { "test:\($0)" }
        let session = Session(
            structured + contexts(.setMetaContext, "alpha", directory.contexts)
                + option(.go, query("alpha")), directory: directory)
        #expect(try #require(session.replies)[1].type == .tooBig)
        #expect(session.agreement?.contexts == [])
    }

    @Test func unknownExports() throws {
        for code in [OptionCode.setMetaContext, .listMetaContext] {
            let session = Session(structured + contexts(code, "gamma", []))
            #expect(try #require(session.replies).map(\.type) == [.ack, .unknown])
        }
    }

    /// Lengths that do not fit, at every place: an error, in step, and no memory for it.
    @Test func lengthsThatLie() throws {
        let good =
            bytes(UInt32(5)) + Array("alpha".utf8) + bytes(UInt32(1)) + bytes(UInt32(8))
            + Array("test:one".utf8)
        var broken: [[UInt8]] = (0..<good.count).map { Array(good.prefix($0)) }
        broken.append(good + [0])
        for at in [0, 9, 13] {
            for lie in [0xFFFF_FFFF, 0x8000_0000, 0x7FFF_FFFF, 100] as [UInt32] {
                var data = good
                data.replaceSubrange(at..<at + 4, with: bytes(lie))
                broken.append(data)
            }
        }
        for data in broken {
            for code in [OptionCode.setMetaContext, .listMetaContext] {
                let session = Session(structured + option(code, data) + option(.list))
                let replies = try #require(session.replies)
                #expect(replies[1].type == .invalid)
                #expect(replies.last == OptionReply(.list, .ack))
            }
        }
    }

    @Test func queriesThatCannotBeNamesMatchNothing() throws {
        let long = [UInt8](repeating: 0x61, count: 5000)
        for query in [long, [0xFF, 0xFE], Array("test:one\0".utf8)] {
            let data = bytes(UInt32(5)) + Array("alpha".utf8) + bytes(UInt32(1))
                + bytes(UInt32(query.count)) + query
            let session = Session(structured + option(.setMetaContext, data))
            #expect(try #require(session.replies).map(\.type) == [.ack, .ack])
        }
    }
}

@Suite struct TLSRulesTests {
    @Test func offKnowsNothingOfIt() throws {
        let session = Session(newstyle + option(.startTLS) + option(.go, query("alpha")))
        #expect(try #require(session.replies).first?.type == .unsupported)
        #expect(session.agreement != nil)
    }

    @Test func onIsOptional() {
        #expect(Session(newstyle + option(.go, query("alpha")), tls: .on).agreement != nil)
        let session = Session(
            newstyle + option(.startTLS) + option(.go, query("alpha")), tls: .on)
        #expect(session.startedTLS == 1)
        #expect(session.agreement != nil)
    }

    @Test func whatWasAgreedOnInPlaintextIsForgotten() throws {
        let session = Session(
            extended + contexts(.setMetaContext, "alpha", ["test:one"]) + option(.startTLS)
                + option(.go, query("alpha")), tls: .on)
        let agreement = try #require(session.agreement)
        #expect(agreement.format == .simple)
        #expect(agreement.contexts == [])
        // Contexts need a format again, too.
        let again = Session(
            structured + option(.startTLS) + contexts(.setMetaContext, "alpha", []), tls: .on)
        #expect(try #require(again.replies).map(\.type) == [.ack, .ack, .invalid])
    }

    @Test(arguments: [TLSPolicy.on, .require])
    func twiceOrWithDataIsInvalid(policy: TLSPolicy) throws {
        let twice = Session(newstyle + option(.startTLS) + option(.startTLS), tls: policy)
        #expect(try #require(twice.replies).map(\.type) == [.ack, .invalid])
        for length in [1, 70_000] {
            let data = [UInt8](repeating: 0, count: length)
            let session = Session(newstyle + option(.startTLS, data), tls: policy)
            #expect(try #require(session.replies).map(\.type) == [.invalid])
            #expect(session.startedTLS == 0)
        }
    }

    @Test func requiredBeforeEverythingElse() throws {
        for code in [2, 3, 4, 6, 7, 8, 9, 10, 11, 99].map(OptionCode.init(rawValue:)) {
            for length in [0, 70_000] {
                let data = [UInt8](repeating: 0, count: length)
                let session = Session(newstyle + option(code, data), tls: .require)
                let type = try #require(session.replies?.first).type
                #expect(type == (code == .abort ? .ack : .tlsRequired))
            }
        }
        let byName = Session(
            newstyle + option(.exportName, Array("alpha".utf8)), tls: .require)
        #expect(byName.isViolation)
        let session = Session(
            newstyle + option(.list) + option(.startTLS) + option(.go, query("alpha")),
            tls: .require)
        #expect(session.agreement != nil)
    }

    @Test func exportsThatRequireIt() throws {
        var directory = TestDirectory()
        directory.secret = ["beta"]
        let options = [
            option(.go, query("beta")), option(.info, query("beta")),
        ]
        for asked in options {
            let session = Session(newstyle + asked, directory: directory, tls: .on)
            #expect(try #require(session.replies).map(\.type) == [.tlsRequired])
            #expect(session.directory.opened.isEmpty)
        }
        let context = Session(
            structured + contexts(.setMetaContext, "beta", []), directory: directory, tls: .on)
        // TLS_REQD is for INFO, GO and EXPORT_NAME.
        #expect(try #require(context.replies).last?.type == .policy)
        let byName = Session(
            newstyle + option(.exportName, Array("beta".utf8)), directory: directory, tls: .on)
        #expect(byName.isViolation)
        let listed = Session(newstyle + option(.list), directory: directory, tls: .on)
        #expect(try #require(listed.replies).count == 2)
        let secure = Session(
            newstyle + option(.startTLS) + option(.list) + option(.go, query("beta")),
            directory: directory, tls: .on)
        #expect(secure.agreement?.export.name == "beta")
        #expect(try #require(secure.replies).count(where: { $0.type == .server }) == 2)
    }

    @Test func contextsThatTellOfSuchExports() throws {
        var directory = TestDirectory()
        directory.secretContexts = ["test:two"]
        let asked =
            option(.structuredReply)
            + ["test:", "test:two"].flatMap { contexts(.listMetaContext, "alpha", [$0]) }
            + contexts(.listMetaContext, "alpha", [])
            + contexts(.setMetaContext, "alpha", ["test:two", "test:one"])
            + option(.go, query("alpha"))
        let session = Session(newstyle + asked, directory: directory, tls: .on)
        #expect(
            told(try #require(session.replies)).map(\.name)
                == ["test:one", "base:allocation", "test:one", "test:one"])
        #expect(session.agreement?.contexts.map(\.name) == ["test:one"])
        let secure = Session(
            newstyle + option(.startTLS) + asked, directory: directory, tls: .on)
        #expect(secure.agreement?.contexts.map(\.name) == ["test:two", "test:one"])
        #expect(told(try #require(secure.replies)).count(where: { $0.name == "test:two" }) == 4)
    }

    @Test func plaintextAfterTheAnswerEndsTheSession() {
        var handshake = Handshake(tls: .on)
        var directory = TestDirectory()
        var output: [UInt8] = []
        let input = newstyle + option(.startTLS) + option(.list)
        var position = 0
        var outcome = Handshake.Outcome.receive
        for _ in 0..<4 {
            let step = input[position...].withUnsafeBytes {
                handshake.advance($0, output: &output, exports: &directory)
            }
            position += step.consumed
            outcome = step.outcome
            if case .startTLS = outcome { break }
        }
        #expect(outcome == .startTLS)
        #expect(position < input.count)
        // Whoever goes on without TLS is stopped.
        let next = input[position...].withUnsafeBytes {
            handshake.advance($0, output: &output, exports: &directory)
        }
        #expect(next.consumed == 0)
        guard case .close(.violation) = next.outcome else {
            Issue.record("plaintext was taken: \(next.outcome)")
            return
        }
    }
}
