// The client's side of the handshake: fixed newstyle, GO, no options besides.

import NBDProtocol
import Sockets

struct LoadFailure: Error, CustomStringConvertible {
    var description: String
    init(_ description: String) { self.description = description }
}

/// What the server says of the export.
struct OpenedExport {
    var size: UInt64
    var flags: TransmissionFlags

    private static let greetingSize = 18
    private static let replyHeaderSize = 20

    /// Takes a new connection to transmission.
    init(_ name: String, on socket: Int32) throws {
        let greeting = try receive(Self.greetingSize, from: socket)
        guard greeting.word(0) == Magic.greeting, greeting.word(8) == Magic.option else {
            throw LoadFailure("the server does not speak newstyle NBD")
        }
        var request: [UInt8] = []
        request.append(ClientFlag.fixedNewstyle | ClientFlag.noZeroes)
        request.append(Magic.option)
        request.append(OptionCode.go.rawValue)
        request.append(UInt32(4 + name.utf8.count + 2))
        request.append(UInt32(name.utf8.count))
        request.append(contentsOf: name.utf8)
        request.append(UInt16(0))
        try sendAll(request, to: socket)

        var found: OpenedExport?
        while true {
            let header = try receive(Self.replyHeaderSize, from: socket)
            guard header.word(0) == Magic.optionReply else {
                throw LoadFailure("the server's answer to GO has a wrong magic number")
            }
            let type = OptionReplyType(rawValue: header.word(12))
            let data = try receive(Int(header.word(16) as UInt32), from: socket)
            switch type {
            case .info where data.count >= 12 && data.word(0) == InfoType.export:
                found = OpenedExport(
                    size: data.word(2), flags: TransmissionFlags(rawValue: data.word(10)))
            case .info: continue
            case .ack:
                guard let found else { throw LoadFailure("the server does not tell the size") }
                self = found
                return
            default:
                let text = String(decoding: data, as: UTF8.self)
                throw LoadFailure("the server refuses export \"\(name)\": \(text)")
            }
        }
    }

    private init(size: UInt64, flags: TransmissionFlags) {
        self.size = size
        self.flags = flags
    }
}

extension [UInt8] {
    fileprivate mutating func append(_ word: some FixedWidthInteger) {
        Swift.withUnsafeBytes(of: word.bigEndian) { append(contentsOf: $0) }
    }

    /// The big-endian word at `offset`.
    fileprivate func word<Word: FixedWidthInteger>(_ offset: Int) -> Word {
        self[offset..<offset + MemoryLayout<Word>.size].reduce(0) { $0 << 8 | Word($1) }
    }
}
