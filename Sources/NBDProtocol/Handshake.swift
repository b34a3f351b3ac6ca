// The fixed newstyle handshake, without I/O: bytes in, bytes out, next state.
//
// 1. One option at a time: after output the caller sends all of it before it calls again.
// 2. Memory follows what has arrived, never what a length field announces.
// 3. An option that is not understood, or too long, is read to its end and answered: the session
//    stays in step. Only what cannot be answered ends the session.
// 4. Nothing that was said in plaintext counts after STARTTLS.
//
//   greeting ──▶ client flags ──▶ option header ──▶ option data ──▶ (answer) ──▶ option header
//                                     │  ▲             │    └─▶ listing ─┘  (LIST, in pieces)
//                                     ▼  │             ▼
//                                  draining        finished (GO, EXPORT_NAME, ABORT)

/// Whether clients may, or have to, ask for TLS.
public enum TLSPolicy: String, Sendable, Codable, CaseIterable {
    case off
    /// Those that ask for it get it; exports may require it.
    case on
    case require
}

/// One client's handshake. Another process can go on with it where it was encoded.
public struct Handshake: Sendable, Codable {
    /// What the caller does next, after it has sent the output.
    public enum Outcome: Equatable, Sendable {
        /// All input was consumed; call again with more.
        case receive
        /// Output was appended. Call again once it is sent, with what is left of the input.
        case send
        /// The export that the client has chosen is busy: call again in a moment, with what is left
        /// of the input.
        case wait
        /// Requests follow; `ExportDirectory.open` has opened the export.
        case transmit(Agreement)
        /// Output was appended. Once it is sent the TLS handshake follows, then `tlsEstablished`.
        /// Input that is left was sent in plaintext by somebody who could not know the answer: the
        /// connection has to end.
        case startTLS
        case close(Ending)
    }

    /// How a handshake ends that leads nowhere.
    public enum Ending: Equatable, Sendable {
        /// The client said that it leaves.
        case aborted
        /// The client broke the protocol, or asked for what cannot be refused otherwise.
        case violation(String)
    }

    private enum State: Codable {
        case greeting
        case clientFlags
        case optionHeader
        case optionData(OptionCode, length: Int)
        case draining(OptionCode, remaining: Int)
        /// `last` is the name that was listed last, `count` how many were.
        case listing(last: String?, count: Int)
        case startingTLS
        case finished
    }

    /// The meta contexts that were selected, and for which export: they count for no other.
    struct Selection: Codable {
        var exportName = ""
        var contexts: [MetaContext] = []
    }

    /// LIST answers go out in pieces of about this size, cut between replies, for clients that
    /// read without looping.
    static let listPiece = 8 << 10

    /// Options about one export.
    private static let questions: Set<OptionCode> = [
        .info, .go, .listMetaContext, .setMetaContext,
    ]

    let tls: TLSPolicy
    /// What the server speaks at most.
    let best: WireFormat
    private var state = State.greeting
    private var isFixedNewstyle = false
    private(set) var noZeroes = false
    private(set) var isSecure = false
    var format = WireFormat.simple
    var selection = Selection()
    private var optionCount = 0
    /// Questions about single exports that do not count as options; nil until a list is complete.
    private var freeQuestions: Int?
    private var drained = 0
    /// The part of the present unit (flags, header, data) that has arrived.
    private var unit: [UInt8] = []

    public init(tls: TLSPolicy = .off, upTo best: WireFormat = .extended) {
        self.tls = tls
        self.best = best
    }

    /// Whether the session is between two messages, so that a client may leave without a word.
    public var isAtBoundary: Bool {
        switch state {
        case .greeting, .clientFlags, .optionHeader, .listing, .startingTLS, .finished:
            unit.isEmpty
        case .optionData, .draining: false
        }
    }

    /// The connection is encrypted from now on.
    public mutating func tlsEstablished() {
        guard case .startingTLS = state else {
            preconditionFailure("TLS was established that the handshake did not ask for")
        }
        isSecure = true
        format = .simple
        selection = Selection()
        freeQuestions = nil
        state = .optionHeader
    }

    /// Takes bytes from `input` and appends what is to be sent to `output`.
    /// - Returns: how many bytes were taken, and what comes next.
    public mutating func advance(
        _ input: UnsafeRawBufferPointer, output: inout [UInt8],
        exports: inout some ExportDirectory
    ) -> (consumed: Int, outcome: Outcome) {
        var consumed = 0
        while true {
            let rest = UnsafeRawBufferPointer(rebasing: input[consumed...])
            if let outcome = step(rest, &consumed, &output, &exports) {
                switch outcome {
                case .transmit, .close: state = .finished
                case .startTLS: state = .startingTLS
                case .receive, .send, .wait: break
                }
                return (consumed, outcome)
            }
        }
    }

    /// One step; nil: go on with the next.
    private mutating func step(
        _ input: UnsafeRawBufferPointer, _ consumed: inout Int, _ output: inout [UInt8],
        _ exports: inout some ExportDirectory
    ) -> Outcome? {
        switch state {
        case .greeting:
            output.appendGreeting()
            state = .clientFlags
            return .send
        case .clientFlags:
            guard fillUnit(to: 4, from: input, &consumed) else { return .receive }
            return acceptClientFlags()
        case .optionHeader:
            guard fillUnit(to: 16, from: input, &consumed) else { return .receive }
            return acceptOptionHeader()
        case .optionData(let option, let length):
            guard fillUnit(to: length, from: input, &consumed) else { return .receive }
            state = .optionHeader
            let data = unit
            unit = []
            return answer(option, data, &output, &exports)
        case .draining(let option, let remaining):
            let count = min(remaining, input.count)
            consumed += count
            state = .draining(option, remaining: remaining - count)
            guard count == remaining else { return .receive }
            state = .optionHeader
            return refuseLong(option, &output)
        case .listing(let last, let count):
            list(after: last, count, &output, &exports)
            return .send
        case .startingTLS:
            return .close(.violation("plaintext after STARTTLS"))
        case .finished:
            return .close(.violation("the handshake is over"))
        }
    }

    /// Collects `length` bytes in `unit`; false while some are missing.
    private mutating func fillUnit(
        to length: Int, from input: UnsafeRawBufferPointer, _ consumed: inout Int
    ) -> Bool {
        let count = min(length - unit.count, input.count)
        unit.append(contentsOf: input.prefix(count))
        consumed += count
        return unit.count == length
    }

    private mutating func acceptClientFlags() -> Outcome? {
        let flags = unit.word(0, as: UInt32.self)
        guard flags & ~(ClientFlag.fixedNewstyle | ClientFlag.noZeroes) == 0 else {
            return .close(.violation("unknown client flags 0x\(String(flags, radix: 16))"))
        }
        isFixedNewstyle = flags & ClientFlag.fixedNewstyle != 0
        noZeroes = flags & ClientFlag.noZeroes != 0
        unit = []
        state = .optionHeader
        return nil
    }

    private mutating func acceptOptionHeader() -> Outcome? {
        guard unit.word(0, as: UInt64.self) == Magic.option else {
            return .close(.violation("an option does not begin with its magic number"))
        }
        let option = OptionCode(rawValue: unit.word(8, as: UInt32.self))
        let length = Int(unit.word(12, as: UInt32.self))
        unit = []
        if let left = freeQuestions, left > 0, Self.questions.contains(option) {
            freeQuestions = left - 1
        } else {
            optionCount += 1
        }
        guard optionCount <= Limits.maximumOptions else {
            return .close(.violation("more than \(Limits.maximumOptions) options"))
        }
        if option == .exportName {
            guard length <= Limits.maximumString else {
                return .close(.violation("a name longer than \(Limits.maximumString) bytes"))
            }
        } else if !isFixedNewstyle {
            return .close(.violation("option \(option.rawValue) without fixed newstyle"))
        }
        if length <= Limits.maximumOption {
            state = .optionData(option, length: length)
        } else {
            drained += length
            guard drained <= Limits.maximumDrain else {
                return .close(.violation("option \(option.rawValue) of \(length) bytes"))
            }
            state = .draining(option, remaining: length)
        }
        return nil
    }

    // MARK: - States that answers lead to

    /// The option is answered when the caller comes again.
    mutating func wait(_ option: OptionCode, _ data: [UInt8]) -> Outcome {
        state = .optionData(option, length: data.count)
        unit = data
        return .wait
    }

    mutating func beginListing() {
        state = .listing(last: nil, count: 0)
    }

    /// At least one reply, so that the listing comes to its end.
    private mutating func list(
        after last: String?, _ count: Int, _ output: inout [UInt8],
        _ exports: inout some ExportDirectory
    ) {
        let start = output.count
        var (last, count) = (last, count)
        while output.count - start < Self.listPiece {
            guard let export = exports.next(after: last, secure: isSecure) else {
                output.appendReply(to: .list, .ack)
                freeQuestions = freeQuestions ?? Limits.questionsOfListedExport * count
                state = .optionHeader
                return
            }
            output.appendListed(export)
            last = export.name
            count += 1
        }
        state = .listing(last: last, count: count)
    }
}
