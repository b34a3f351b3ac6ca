// Which requests are carried out. One function decides; a refusal has one sentence and one error.

/// Why a request is refused.
public enum Refusal: UInt8, CaseIterable, Sendable, CustomStringConvertible {
    case unknownCommand
    case unknownFlags
    case readOnly
    case tooLong
    case readPastEnd
    case writePastEnd
    case unaligned
    case flushWithRange

    public var error: WireError {
        switch self {
        case .readOnly: .notPermitted
        case .writePastEnd: .noSpace
        default: .invalid
        }
    }

    public var description: String {
        switch self {
        case .unknownCommand: "the command is not one that this server knows"
        case .unknownFlags: "the command has a flag that was not offered for it"
        case .readOnly: "the export is read-only"
        case .tooLong: "the payload is longer than \(Limits.maximumPayload) bytes"
        case .readPastEnd: "the range reaches past the end of the export"
        case .writePastEnd: "the range to write reaches past the end of the export"
        case .unaligned: "offset or length is not a multiple of \(Limits.minimumBlock)"
        case .flushWithRange: "a flush has no range"
        }
    }
}

/// What to do with a request.
public enum Verdict: Equatable, Sendable {
    case perform(Command)
    case refuse(Refusal)
}

extension RequestHeader {
    /// Decides on the request for an export of `size` bytes. A refused WRITE's payload still has
    /// to be taken off the stream. A disconnect is performed whatever else it says.
    public func validated(exportSize size: UInt64, isReadOnly: Bool) -> Verdict {
        guard let command = Command(rawValue: command) else { return .refuse(.unknownCommand) }
        if command == .disconnect { return .perform(.disconnect) }

        // FUA is legal with every command once it was offered, and idle where nothing is written.
        let known: CommandFlags = command == .writeZeroes ? [.fua, .noHole] : .fua
        guard flags.isSubset(of: known) else { return .refuse(.unknownFlags) }
        if command == .flush {
            return offset == 0 && length == 0 ? .perform(.flush) : .refuse(.flushWithRange)
        }

        let writes = command == .write || command == .writeZeroes
        if (writes || command == .trim) && isReadOnly { return .refuse(.readOnly) }
        if command == .read || command == .write {
            guard length <= UInt64(Limits.maximumPayload) else { return .refuse(.tooLong) }
        }
        guard offset <= size && length <= size - offset else {
            return .refuse(writes ? .writePastEnd : .readPastEnd)
        }
        guard (offset | length) & UInt64(Limits.minimumBlock - 1) == 0 else {
            return .refuse(.unaligned)
        }
        return .perform(command)
    }
}
