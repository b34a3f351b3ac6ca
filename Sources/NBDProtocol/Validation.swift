// Which requests are carried out. One function decides; a refusal has one sentence and one error.

/// Why a request is refused.
public enum Refusal: UInt8, CaseIterable, Sendable, Codable, CustomStringConvertible {
    case unknownCommand
    case unknownFlags
    case readOnly
    case tooLong
    case readPastEnd
    case writePastEnd
    case unaligned
    case flushWithRange
    case notFast
    case noContext
    case emptyStatus
    case damagedStatusPayload

    public var error: WireError {
        switch self {
        case .readOnly: .notPermitted
        case .writePastEnd: .noSpace
        case .notFast: .notSupported
        default: .invalid
        }
    }

    public var text: StaticString {
        switch self {
        case .unknownCommand: "the command is not one that this server knows"
        case .unknownFlags: "the command has a flag that was not offered for it"
        case .readOnly: "the export is read-only"
        case .tooLong: "the payload is longer than 33554432 bytes"
        case .readPastEnd: "the range reaches past the end of the export"
        case .writePastEnd: "the range to write reaches past the end of the export"
        case .unaligned: "offset or length is not a multiple of 512"
        case .flushWithRange: "a flush has no range"
        case .notFast: "zeroing this would take as long as writing it"
        case .noContext: "no meta context was selected"
        case .emptyStatus: "a range of no bytes has no status"
        case .damagedStatusPayload: "the payload does not name contexts that were selected"
        }
    }

    public var description: String { "\(text)" }
}

/// What to do with a request.
public enum Verdict: Equatable, Sendable {
    case perform(Command)
    case refuse(Refusal)
}

/// What requests of one session are judged by.
public struct RequestRules: Sendable {
    public var exportSize: UInt64
    public var isReadOnly: Bool
    public var format: WireFormat
    public var hasContexts: Bool
    /// Bytes: whole blocks of this size are zeroed by forgetting them, which is fast.
    public var dataBlockSize: UInt64

    public init(
        exportSize: UInt64, isReadOnly: Bool, format: WireFormat = .simple,
        hasContexts: Bool = false, dataBlockSize: UInt64 = 4096
    ) {
        self.exportSize = exportSize
        self.isReadOnly = isReadOnly
        self.format = format
        self.hasContexts = hasContexts
        self.dataBlockSize = dataBlockSize
    }

    /// Decides on the request. A refused one's payload still has to be taken off the stream. A
    /// disconnect is performed whatever else it says. The range of a BLOCK_STATUS with a payload
    /// is in there, and judged by `validatesStatus`.
    public func verdict(_ header: RequestHeader) -> Verdict {
        guard let command = Command(rawValue: header.command) else {
            return .refuse(.unknownCommand)
        }
        if command == .disconnect { return .perform(.disconnect) }
        guard header.flags.isSubset(of: knownFlags(command)) else { return .refuse(.unknownFlags) }
        if command == .flush {
            return header.offset == 0 && header.length == 0
                ? .perform(.flush) : .refuse(.flushWithRange)
        }
        if command == .blockStatus {
            guard hasContexts else { return .refuse(.noContext) }
            if header.flags.contains(.payloadLength) { return .perform(.blockStatus) }
            if header.length == 0 { return .refuse(.emptyStatus) }
        }
        if let refusal = refusal(command, header.flags, header.offset, header.length) {
            return .refuse(refusal)
        }
        return .perform(command)
    }

    /// Nil if the range of a BLOCK_STATUS, which came in its payload, is a good one.
    public func statusRefusal(offset: UInt64, length: UInt64) -> Refusal? {
        if length == 0 { return .emptyStatus }
        return refusal(.blockStatus, [], offset, length)
    }

    private func refusal(
        _ command: Command, _ flags: CommandFlags, _ offset: UInt64, _ length: UInt64
    ) -> Refusal? {
        let writes = command == .write || command == .writeZeroes
        if (writes || command == .trim) && isReadOnly { return .readOnly }
        if command == .read || command == .write {
            guard length <= UInt64(Limits.maximumPayload) else { return .tooLong }
        }
        guard offset <= exportSize && length <= exportSize - offset else {
            return writes ? .writePastEnd : .readPastEnd
        }
        guard (offset | length) & UInt64(Limits.minimumBlock - 1) == 0 else { return .unaligned }
        if flags.contains(.fastZero) && !isFast(flags, offset, length) { return .notFast }
        return nil
    }

    /// FUA is legal with every command once it was offered, and idle where nothing is written.
    private func knownFlags(_ command: Command) -> CommandFlags {
        var known: CommandFlags = .fua
        switch command {
        case .writeZeroes: known.formUnion([.noHole, .fastZero])
        case .read where format >= .structured: known.insert(.dontFragment)
        case .write where format == .extended: known.insert(.payloadLength)
        case .blockStatus:
            known.insert(.requestOne)
            if format == .extended { known.insert(.payloadLength) }
        default: break
        }
        return known
    }

    /// Nothing but the map changes.
    private func isFast(_ flags: CommandFlags, _ offset: UInt64, _ length: UInt64) -> Bool {
        let end = offset + length
        return !flags.contains(.noHole) && offset % dataBlockSize == 0
            && (end % dataBlockSize == 0 || end == exportSize)
    }
}
