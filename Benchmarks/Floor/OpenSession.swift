// The handshake, which is the server's own; whatever the name, it opens the one export.

import Foundation
import NBDProtocol
import Sockets

private struct OneExport: ExportDirectory {
    let export: Export

    mutating func next(after name: String?, secure: Bool) -> ListedExport? { nil }
    mutating func describe(_ name: String) -> Export? { export }
    mutating func open(_: String, contexts: [MetaContext], secure: Bool) -> ExportOpening {
        .opened(export)
    }
}

/// Takes a new connection to transmission.
func openSession(_ socket: Int32, _ memory: Memory) throws {
    var exports = OneExport(
        export: Export(
            name: "", size: UInt64(memory.size), isReadOnly: false, description: "memory"))
    var handshake = Handshake(upTo: .simple)
    var input: [UInt8] = []
    while true {
        var output: [UInt8] = []
        let (consumed, outcome) = input.withUnsafeBytes {
            handshake.advance($0, output: &output, exports: &exports)
        }
        input.removeFirst(consumed)
        try sendAll(output, to: socket)
        switch outcome {
        case .send, .wait: continue
        // A byte at a time: nothing of the transmission is to be taken.
        case .receive: input += try receive(1, from: socket)
        case .transmit: return
        case .startTLS: preconditionFailure("TLS is not offered")
        case .close(let ending): throw FloorFailure("the handshake ended: \(ending)")
        }
    }
}
