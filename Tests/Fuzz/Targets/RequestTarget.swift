// Requests' headers and the payload of BLOCK_STATUS: what is let through can be carried out.

import NBDProtocol

public enum RequestTarget: FuzzTarget {
    public static let name = "request"

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let choice = input.byte()
        let format: WireFormat = [.simple, .structured, .extended][Int(choice % 3)]
        let rules = RequestRules(
            exportSize: choice & 0x80 != 0 ? Limits.maximumExportSize & ~511 : 10 << 20,
            isReadOnly: choice & 0x40 != 0, format: format, hasContexts: choice & 0x20 != 0,
            dataBlockSize: 65_536)
        let isExtended = format == .extended
        let size = isExtended ? RequestHeader.extendedSize : RequestHeader.size
        let header = input.rest(size)
        guard header.count == size else { return }
        guard let request = RequestHeader.parse(header.baseAddress!, extended: isExtended) else {
            let magic = isExtended ? Magic.extendedRequest : Magic.request
            let first = (0..<4).reduce(UInt32(0)) { $0 << 8 | UInt32(header[$1]) }
            require(first != magic, "a header with its magic number is not parsed")
            return
        }
        if case .perform(let command) = rules.verdict(request) {
            examine(request, command, rules)
        } else {
            let isFarewell = request.command == Command.disconnect.rawValue
            require(!isFarewell, "a disconnect is refused")
        }
        status(input.rest(), rules, request.offset)
    }

    private static func examine(
        _ request: RequestHeader, _ command: Command, _ rules: RequestRules
    ) {
        let payload = request.payloadLength(extended: rules.format == .extended)
        let isStatus = command == .blockStatus && request.flags.contains(.payloadLength)
        let mayHavePayload = command == .write || isStatus || command == .disconnect
        require(payload == 0 || mayHavePayload, "\(command) with a payload is let through")
        if command == .disconnect || isStatus { return }
        require(
            request.offset <= rules.exportSize
                && request.length <= rules.exportSize - request.offset,
            "\(command) beyond the end is let through")
        require((request.offset | request.length) % 512 == 0, "an unaligned \(command)")
        let changes = [.write, .trim, .writeZeroes].contains(command)
        require(!(changes && rules.isReadOnly), "a read-only export is changed")
        if command == .read || command == .write {
            require(request.length <= Limits.maximumPayload, "a payload that is too long")
        }
    }

    private static func status(
        _ bytes: UnsafeRawBufferPointer, _ rules: RequestRules, _ offset: UInt64
    ) {
        let selected = (1...5).map { MetaContext(id: $0, name: "context:\($0)") }
        guard let payload = StatusPayload(bytes, selected: selected) else { return }
        require(
            !payload.contexts.isEmpty && payload.contexts.count <= selected.count
                && payload.contexts.allSatisfy { 1...5 ~= $0 },
            "contexts that were not selected")
        if rules.statusRefusal(offset: offset, length: payload.length) == nil {
            require(
                payload.length > 0 && offset <= rules.exportSize
                    && payload.length <= rules.exportSize - offset,
                "status beyond the end")
        }
    }
}
