// The data of the options that carry any. Lengths inside an option are the peer's: each is compared
// with what is there before it is used, in `Int`, so that none can wrap.

/// The data of INFO and GO:
///
///   0 name length u32 | 4 name | count u16 | count x info type u16
///
/// and not one byte more.
struct ExportQuery: Equatable {
    var name: String
    var infoTypes: [UInt16]

    static func parse(_ data: [UInt8]) throws(OptionFailure) -> ExportQuery {
        guard data.count >= 6 else {
            throw .invalid("the option is shorter than its fields")
        }
        let nameLength = Int(data.word(0, as: UInt32.self))
        guard nameLength <= data.count - 6 else {
            throw .invalid("the name is longer than the option")
        }
        guard nameLength <= Limits.maximumString else {
            throw .invalid("the name is longer than \(Limits.maximumString) bytes")
        }
        let count = Int(data.word(4 + nameLength, as: UInt16.self))
        let types = 6 + nameLength
        guard data.count == types + 2 * count else {
            throw .invalid("the option's length does not fit its fields")
        }
        guard let name = validName(data[4..<4 + nameLength]) else {
            throw .invalid("the name is not UTF-8 without NUL")
        }
        guard isPossible(name) else { throw .unknownExport(name) }
        let infoTypes = (0..<count).map { data.word(types + 2 * $0, as: UInt16.self) }
        return ExportQuery(name: name, infoTypes: infoTypes)
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT:
///
///   0 name length u32 | 4 name | count u32 | count x (length u32 | query)
///
/// and not one byte more. A query that cannot be a context's name is left out: it matches none.
struct ContextQuery: Equatable {
    var exportName: String
    /// There is not even one that is left out.
    var asksForAll: Bool
    var queries: [String]

    static func parse(_ data: [UInt8]) throws(OptionFailure) -> ContextQuery {
        var rest = data[...]
        let name = try takeString(from: &rest, "the name")
        guard let exportName = validName(name) else {
            throw .invalid(
                "the name is not UTF-8 without NUL of at most \(Limits.maximumString) bytes")
        }
        // Each query takes at least its length's bytes, so the data bounds their number.
        let count = try takeLength(from: &rest, "the number of queries")
        guard count <= rest.count / 4 else {
            throw .invalid("there are more queries than the option has room for")
        }
        guard count <= Limits.maximumQueries else {
            throw OptionFailure(
                type: .tooBig, text: "at most \(Limits.maximumQueries) queries are looked at")
        }
        var queries: [String] = []
        for _ in 0..<count {
            let bytes = try takeString(from: &rest, "a query")
            if let query = validName(bytes), isPossible(query) { queries.append(query) }
        }
        guard rest.isEmpty else { throw .invalid("the option's length does not fit its fields") }
        guard isPossible(exportName) else { throw .unknownExport(exportName) }
        return ContextQuery(exportName: exportName, asksForAll: count == 0, queries: queries)
    }

    private static func takeLength(
        from data: inout ArraySlice<UInt8>, _ what: String
    ) throws(OptionFailure) -> Int {
        guard data.count >= 4 else { throw .invalid("\(what) is missing") }
        let length = data.prefix(4).reduce(0) { $0 << 8 | Int($1) }
        data = data.dropFirst(4)
        return length
    }

    private static func takeString(
        from data: inout ArraySlice<UInt8>, _ what: String
    ) throws(OptionFailure) -> ArraySlice<UInt8> {
        let length = try takeLength(from: &data, what)
        guard length <= data.count else { throw .invalid("\(what) is longer than the option") }
        let string = data.prefix(length)
        data = data.dropFirst(length)
        return string
    }
}

/// An error reply to an option.
struct OptionFailure: Error, Equatable {
    var type: OptionReplyType
    var text: String

    static func invalid(_ text: String) -> OptionFailure {
        OptionFailure(type: .invalid, text: text)
    }

    static func unknownExport(_ name: String) -> OptionFailure {
        OptionFailure(
            type: .unknown, text: name.isEmpty ? "no default export" : "no such export")
    }

    static let tlsRequired = OptionFailure(type: .tlsRequired, text: "TLS has to come first")
    static let extendedHeadersRequired = OptionFailure(
        type: .extendedHeadersRequired, text: "extended headers have been agreed on")
}

/// A string as the protocol wants names and queries, or nil.
func validName(_ bytes: some Collection<UInt8>) -> String? {
    guard bytes.count <= Limits.maximumString, !bytes.contains(0) else { return nil }
    return String(validating: bytes, as: UTF8.self)
}

/// Whether an export or a context can have that name: they are ASCII. Beyond it, to hash or compare
/// strings is to normalize them, and a name of 4096 bytes can take 10 ms of that.
func isPossible(_ name: String) -> Bool { name.utf8.allSatisfy { $0 < 0x80 } }

extension [UInt8] {
    /// The big-endian word at `offset`, which the caller has compared with the count.
    func word<Word: FixedWidthInteger>(_ offset: Int, as: Word.Type) -> Word {
        precondition(offset >= 0 && offset + MemoryLayout<Word>.size <= count)
        return withUnsafeBytes { $0.baseAddress!.bigEndian(offset, as: Word.self) }
    }
}

/// The server's side of the haggling, appended to what goes out.
extension [UInt8] {
    mutating func appendGreeting() {
        appendBigEndian(Magic.greeting)
        appendBigEndian(Magic.option)
        appendBigEndian(HandshakeFlag.fixedNewstyle | HandshakeFlag.noZeroes)
    }

    /// The header of a reply whose `length` bytes of data the caller appends.
    mutating func appendReply(to option: OptionCode, _ type: OptionReplyType, length: Int = 0) {
        appendBigEndian(Magic.optionReply)
        appendBigEndian(option.rawValue)
        appendBigEndian(type.rawValue)
        appendBigEndian(UInt32(length))
    }

    mutating func appendFailure(of option: OptionCode, _ failure: OptionFailure) {
        appendReply(to: option, failure.type, length: failure.text.utf8.count)
        append(contentsOf: failure.text.utf8)
    }

    mutating func appendListed(_ export: ListedExport) {
        let name = export.name.utf8
        let description = export.description.utf8
        appendReply(to: .list, .server, length: 4 + name.count + description.count)
        appendBigEndian(UInt32(name.count))
        append(contentsOf: name)
        append(contentsOf: description)
    }

    mutating func appendContext(_ context: MetaContext, to option: OptionCode) {
        appendReply(to: option, .metaContext, length: 4 + context.name.utf8.count)
        appendBigEndian(context.id)
        append(contentsOf: context.name.utf8)
    }

    /// What INFO and GO tell: the size and flags, the block sizes (this server insists on them, so
    /// it says them unasked), and the texts that were asked for.
    mutating func appendInfo(
        of agreement: Agreement, to option: OptionCode, asked: [UInt16]
    ) {
        let export = agreement.export
        appendReply(to: option, .info, length: 12)
        appendBigEndian(InfoType.export)
        appendBigEndian(export.size)
        appendBigEndian(agreement.transmissionFlags.rawValue)
        appendReply(to: option, .info, length: 14)
        appendBigEndian(InfoType.blockSize)
        appendBigEndian(Limits.minimumBlock)
        appendBigEndian(Limits.preferredBlock)
        appendBigEndian(Limits.maximumPayload)
        for (type, text) in [
            (InfoType.name, export.name), (InfoType.description, export.description),
        ] where asked.contains(type) {
            appendReply(to: option, .info, length: 2 + text.utf8.count)
            appendBigEndian(type)
            append(contentsOf: text.utf8)
        }
    }

    /// The answer to EXPORT_NAME, which has no reply header.
    mutating func appendExport(of agreement: Agreement, noZeroes: Bool) {
        appendBigEndian(agreement.export.size)
        appendBigEndian(agreement.transmissionFlags.rawValue)
        if !noZeroes { append(contentsOf: repeatElement(0, count: 124)) }
    }
}
