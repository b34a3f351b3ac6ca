// A client's options as a fuzzed sequence of decisions: mostly well formed, now and then with a length
// that is wrong, a byte that is another, or no sense at all.

import NBDProtocol

extension [UInt8] {
    mutating func appendWord(_ word: some FixedWidthInteger) {
        Swift.withUnsafeBytes(of: word.bigEndian) { append(contentsOf: $0) }
    }

    /// - Parameter length: as it is said to be, where that is not so.
    mutating func appendOption(_ code: UInt32, _ data: [UInt8], length: UInt32? = nil) {
        appendWord(Magic.option)
        appendWord(code)
        appendWord(length ?? UInt32(data.count))
        append(contentsOf: data)
    }

    mutating func appendString(_ string: String) {
        appendWord(UInt32(string.utf8.count))
        append(contentsOf: string.utf8)
    }

    /// Flags and options until the input is used up.
    static func options(
        _ input: inout FuzzInput, names: [String], contexts: [String]
    ) -> [UInt8] {
        var bytes: [UInt8] = []
        let flags = input.byte()
        bytes.appendWord(UInt32(flags < 0xF0 ? flags & 3 | 1 : flags))
        while !input.isAtEnd && bytes.count < 1 << 18 {
            bytes.appendFuzzedOption(&input, names, contexts)
        }
        return bytes
    }

    private mutating func appendFuzzedOption(
        _ input: inout FuzzInput, _ names: [String], _ contexts: [String]
    ) {
        let choice = input.byte()
        let code = UInt32(choice & 0x0F)
        var data: [UInt8] = []
        switch OptionCode(rawValue: code) {
        case .exportName: data = Array(names[input.below(names.count)].utf8)
        case .info, .go:
            data.appendString(names[input.below(names.count)])
            let count = input.byte() & 7
            data.appendWord(UInt16(count))
            for _ in 0..<count { data.appendWord(UInt16(input.byte() & 3)) }
        case .listMetaContext, .setMetaContext:
            data.appendString(names[input.below(names.count)])
            let count = input.byte() & 31
            data.appendWord(UInt32(count))
            for _ in 0..<count { data.appendString(contexts[input.below(contexts.count)]) }
        default: break
        }
        switch choice >> 4 {
        case 13:
            data += Array(input.rest(Int(input.byte())))
            appendOption(code, data)
        case 14:
            // What it says of itself is wrong; a long one may be thrown away.
            let length = input.word(UInt32.self) % (1 << 17)
            if length > Limits.maximumOption, input.byte() & 1 == 0 {
                data = [UInt8](repeating: 0x41, count: Int(length))
            }
            appendOption(code, data, length: length)
        case 15:
            if !data.isEmpty { data[input.below(data.count)] = input.byte() }
            appendOption(code, data)
        default: appendOption(code, data)
        }
    }
}
