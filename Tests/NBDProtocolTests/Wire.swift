// The client's side of the protocol, as far as the tests need it: builds options and requests,
// takes replies apart, and drives a handshake with input cut wherever a test wants.

import NBDProtocol
import Testing

/// Big-endian bytes.
func bytes(_ word: some FixedWidthInteger) -> [UInt8] {
    withUnsafeBytes(of: word.bigEndian) { Array($0) }
}

func bigEndian<Word: FixedWidthInteger>(_ slice: ArraySlice<UInt8>, as: Word.Type) -> Word {
    slice.prefix(MemoryLayout<Word>.size).reduce(0) { $0 << 8 | Word($1) }
}

/// An option; `length` lies about the data's length where given.
func option(_ code: OptionCode, _ data: [UInt8] = [], length: UInt32? = nil) -> [UInt8] {
    bytes(Magic.option) + bytes(code.rawValue) + bytes(length ?? UInt32(data.count)) + data
}

/// The data of INFO and GO.
func query(_ name: [UInt8], nameLength: UInt32? = nil, _ infos: [UInt16] = []) -> [UInt8] {
    bytes(nameLength ?? UInt32(name.count)) + name + bytes(UInt16(infos.count))
        + infos.flatMap { bytes($0) }
}

func query(_ name: String, _ infos: [UInt16] = []) -> [UInt8] { query(Array(name.utf8), infos) }

let newstyle = bytes(ClientFlag.fixedNewstyle | ClientFlag.noZeroes)

/// A small pseudo-random generator, so that a failure can be repeated from its seed.
struct SplitMix: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}

/// A directory with the volumes given; counts what stays open.
struct TestDirectory: ExportDirectory {
    var names = ["alpha", "beta"]
    var opened: [String] = []

    func next(after last: String?, secure: Bool) -> ListedExport? {
        names.filter { name in
            (secure || !secret.contains(name)) && (last.map { name > $0 } ?? true)
        }.min().map { ListedExport(name: $0, description: "") }
    }
    func describe(_ name: String) -> Export? {
        let name = name.isEmpty && names.count == 1 ? names[0] : name
        guard names.contains(name) else { return nil }
        return Export(
            name: name, size: 1 << 30, isReadOnly: false, description: "thin volume",
            requiresTLS: secret.contains(name))
    }
    /// Meta contexts of every export.
    var contexts = ["base:allocation", "test:one", "test:two"]
    /// Exports, and contexts, that plaintext clients are not to see.
    var secret: Set<String> = []
    var secretContexts: Set<String> = []
    /// Why opening is refused.
    var refusal: String?
    var openedContexts: [MetaContext] = []

    func contextNames(of: String, beginningWith prefix: String, secure: Bool) -> [String] {
        shown(secure).filter { $0.hasPrefix(prefix) }
    }
    func hasContext(_ context: String, of: String, secure: Bool) -> Bool {
        shown(secure).contains(context)
    }
    private func shown(_ secure: Bool) -> [String] {
        contexts.filter { secure || !secretContexts.contains($0) }
    }

    /// How often it is still busy when somebody wants to open one of them.
    var busy = 0

    mutating func open(_ name: String, contexts: [MetaContext], secure: Bool) -> ExportOpening {
        guard let export = describe(name) else { return .absent }
        if export.requiresTLS && !secure { return .requiresTLS }
        if busy > 0 {
            busy -= 1
            return .busy
        }
        if let refusal { return .refused(refusal) }
        opened.append(export.name)
        openedContexts = contexts
        return .opened(export)
    }
}

/// A reply to an option, taken apart.
struct OptionReply: Equatable {
    var option: OptionCode
    var type: OptionReplyType
    var data: [UInt8]
    init(_ option: OptionCode, _ type: OptionReplyType, _ data: [UInt8] = []) {
        self.option = option
        self.type = type
        self.data = data
    }
    var info: UInt16? { type == .info ? bigEndian(data[0...], as: UInt16.self) : nil }
}

/// What a whole handshake came to.
struct Session {
    var output: [UInt8] = []
    var outcome = Handshake.Outcome.receive
    /// Input that the handshake left for the transmission.
    var rest: [UInt8] = []
    var directory: TestDirectory
    var isAtBoundary = true
    /// How often TLS was started; it always succeeds, and is not to be seen in the output.
    var startedTLS = 0
    var agreement: Agreement? {
        if case .transmit(let agreement) = outcome { return agreement }
        return nil
    }

    /// Feeds `input` in pieces that end at the given places, as a connection would.
    init(
        _ input: [UInt8], cuts: [Int] = [], directory: TestDirectory = TestDirectory(),
        tls: TLSPolicy = .off
    ) {
        self.directory = directory
        var handshake = Handshake(tls: tls)
        var position = 0
        for end in cuts + [input.count] {
            while true {
                let (consumed, outcome) = input[position..<end].withUnsafeBytes {
                    handshake.advance($0, output: &output, exports: &self.directory)
                }
                precondition(consumed >= 0 && consumed <= end - position)
                position += consumed
                self.outcome = outcome
                isAtBoundary = handshake.isAtBoundary
                if outcome == .send { continue }
                if outcome == .startTLS {
                    startedTLS += 1
                    handshake.tlsEstablished()
                    continue
                }
                if outcome == .receive {
                    precondition(position == end, "input was left though more is wanted")
                    break
                }
                rest = Array(input[position...])
                return
            }
        }
    }

    /// The replies after the greeting; nil if the output is not whole replies.
    var replies: [OptionReply]? {
        guard output.count >= 18 else { return nil }
        var rest = output[18...]
        var replies: [OptionReply] = []
        while !rest.isEmpty {
            guard rest.count >= 20, bigEndian(rest, as: UInt64.self) == Magic.optionReply else {
                return nil
            }
            let code = OptionCode(rawValue: bigEndian(rest.dropFirst(8), as: UInt32.self))
            let type = OptionReplyType(rawValue: bigEndian(rest.dropFirst(12), as: UInt32.self))
            let length = Int(bigEndian(rest.dropFirst(16), as: UInt32.self))
            guard rest.count >= 20 + length else { return nil }
            replies.append(OptionReply(code, type, Array(rest.dropFirst(20).prefix(length))))
            rest = rest.dropFirst(20 + length)
        }
        return replies
    }

    var isViolation: Bool {
        if case .close(.violation) = outcome { return true }
        return false
    }
}
