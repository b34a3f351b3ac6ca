// The handshake. However its input is cut into pieces it gives the same answers, and they can be taken
// apart.

import NBDProtocol

public enum HandshakeTarget: FuzzTarget {
    public static let name = "handshake"

    private static let names = ["alpha", "", "beta", "secret", "nothing", "refused", "b\u{e9}ta"]
    private static let contexts = [
        "base:allocation", "base:", "test:one", "test:", "", "other:x", "test:two",
        String(repeating: "x", count: 4096),
    ]
    /// More than any session may send before it is ended.
    private static let mostOutput =
        (Limits.maximumOptions + 2 * Limits.questionsOfListedExport * FuzzedDirectory.names.count)
        * (64 << 10)

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let choice = input.byte()
        let policy: TLSPolicy = [.off, .on, .require][Int(choice % 3)]
        let cuts = UInt64(input.byte())
        let stream =
            choice & 0x80 != 0
            ? Array(input.rest())
            : [UInt8].options(&input, names: names, contexts: contexts)
        let whole = session(stream, policy) { _ in stream.count }
        verify(whole, stream)
        require(
            session(stream, policy) { _ in 1 } == whole, "single bytes are answered otherwise")
        var state = cuts
        let cut = session(stream, policy) { _ in
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            return 1 + Int(state >> 33) % 40
        }
        require(cut == whole, "pieces are answered otherwise")
    }

    private struct Session: Equatable {
        var output: [UInt8] = []
        var consumed = 0
        var ending: Handshake.Outcome?
        var opened: [String] = []
        var isSecure = false
    }

    private static func session(
        _ stream: [UInt8], _ policy: TLSPolicy, piece: (Int) -> Int
    ) -> Session {
        var handshake = Handshake(tls: policy)
        var exports = FuzzedDirectory()
        var session = Session()
        var arrived = 0
        while true {
            let before = session.output.count
            let (consumed, outcome) = stream.withUnsafeBytes {
                handshake.advance(
                    UnsafeRawBufferPointer(rebasing: $0[session.consumed..<arrived]),
                    output: &session.output, exports: &exports)
            }
            session.consumed += consumed
            require(session.consumed <= arrived, "more was taken than there was")
            require(session.output.count < mostOutput, "a session's answers have no end")
            session.opened = exports.opened
            switch outcome {
            case .receive:
                require(session.consumed == arrived, "input is left over and more is wanted")
                if arrived == stream.count { return session }
                arrived = min(stream.count, arrived + piece(arrived))
            case .send: require(session.output.count > before, "nothing is sent")
            case .wait: break
            case .startTLS:
                // That no plaintext follows is the caller's business: here all of it is secure.
                handshake.tlsEstablished()
                session.isSecure = true
            case .transmit, .close:
                session.ending = outcome
                return session
            }
        }
    }

    /// Takes the answers apart.
    private static func verify(_ session: Session, _ stream: [UInt8]) {
        var rest = session.output[...]
        require(rest.count >= 18, "no greeting")
        rest = rest.dropFirst(18)
        while rest.count >= 20 && word(rest, 0, 8) == Magic.optionReply {
            let type = word(rest, 12, 4)
            let length = Int(word(rest, 16, 4))
            require(rest.count >= 20 + length, "a reply is cut short")
            require(type == 1 || (2...4).contains(type) || type >> 31 == 1, "a reply type \(type)")
            require(type != 1 || length == 0, "an acknowledgement with data")
            rest = rest.dropFirst(20 + length)
        }
        if case .transmit(let agreement)? = session.ending {
            require(session.opened == [agreement.export.name], "an export that is not open")
            require([0, 10, 134].contains(rest.count), "\(rest.count) bytes at the end")
            require(
                agreement.contexts.count <= Limits.maximumContexts
                    && (agreement.contexts.isEmpty || agreement.format > .simple),
                "contexts that were not agreed on")
        } else {
            require(rest.isEmpty, "\(rest.count) bytes that are no reply")
            require(session.opened.isEmpty, "an export stays open")
        }
    }

    private static func word(_ bytes: ArraySlice<UInt8>, _ offset: Int, _ size: Int) -> UInt64 {
        bytes.dropFirst(offset).prefix(size).reduce(0) { $0 << 8 | UInt64($1) }
    }
}

/// Some exports: "alpha" is busy at first, "secret" requires TLS, "refused" is not given to anybody.
private struct FuzzedDirectory: ExportDirectory {
    static let names = ["alpha", "beta", "secret", "refused"]
    private static let contexts =
        ["base:allocation"] + ["one", "two"].map { "test:\($0)" } + (0..<20).map { "many:\($0)" }
    private var busy = 2
    private(set) var opened: [String] = []

    func next(after last: String?, secure: Bool) -> ListedExport? {
        Self.names.filter { name in
            (secure || name != "secret") && (last.map { name > $0 } ?? true)
        }.min().map { ListedExport(name: $0, description: "an export") }
    }

    func describe(_ name: String) -> Export? {
        let name = name.isEmpty ? "alpha" : name
        guard Self.names.contains(name) else { return nil }
        return Export(
            name: name, size: 1 << 30, isReadOnly: name == "beta", description: "fuzzed",
            requiresTLS: name == "secret")
    }

    mutating func open(_ name: String, contexts: [MetaContext], secure: Bool) -> ExportOpening {
        guard let export = describe(name) else { return .absent }
        if export.requiresTLS && !secure { return .requiresTLS }
        if export.name == "refused" { return .refused("not for you") }
        if export.name == "alpha", busy > 0 {
            busy -= 1
            return .busy
        }
        opened.append(export.name)
        return .opened(export)
    }

    func contextNames(of: String, beginningWith prefix: String, secure: Bool) -> [String] {
        Self.contexts.filter { $0.hasPrefix(prefix) }
    }
    func hasContext(_ context: String, of name: String, secure: Bool) -> Bool {
        Self.contexts.contains(context)
    }
}
