// What a server leaves to the one that takes its place: sockets, and what is to be known of them.
// Clients notice nothing but a pause.
//
// 1. A connection is carried only when nothing of it is under way: every request that was begun is
//    answered, and what has arrived of the next ones goes along as it came.
// 2. A descriptor is in here once, and is the next server's from then on.
// 3. What has arrived may be nearly all of the payload memory. It is in a file in memory, into and
//    out of which one connection after the other is copied, once each.

import BlockIO
import CLinux
import Glibc
import NBDProtocol

public struct HandOver: Codable, Sendable {
    struct Client: Codable, Sendable {
        var connection: CarriedConnection
        /// Where in `inputFile` what has arrived is.
        var input: Range<UInt64>
    }

    var listeners: [Listener] = []
    private(set) var clients: [Client] = []
    /// Nil as long as nothing has arrived of anybody.
    private(set) var inputFile: Int32?
    /// Sockets that were accepted, and nothing said on them yet.
    var arrivals: [Int32] = []

    /// All that have to stay open for the next server.
    public var descriptors: [Int32] {
        listeners.map(\.descriptor) + clients.map(\.connection.socket) + arrivals
            + (inputFile.map { [$0] } ?? [])
    }
    public var clientCount: Int { clients.count }

    /// - Parameter input: what has arrived and was not acted on.
    mutating func append(_ connection: CarriedConnection, input: [UInt8]) throws(ServerError) {
        let start = clients.last?.input.upperBound ?? 0
        if !input.isEmpty { try write(input, at: start) }
        clients.append(Client(connection: connection, input: start..<start + UInt64(input.count)))
    }

    private mutating func write(_ input: [UInt8], at offset: UInt64) throws(ServerError) {
        let operation = "keep what has arrived for the next server"
        let file = inputFile ?? clinux_memory_file("wafer-input")
        guard file >= 0 else { throw ServerError(operation: operation, code: -file) }
        inputFile = file
        let result = input.withUnsafeBytes {
            var vector = iovec(
                iov_base: UnsafeMutableRawPointer(mutating: $0.baseAddress), iov_len: $0.count)
            return FileIO.write(file, at: offset, vectors: &vector, count: 1)
        }
        guard Int(result) == input.count else {
            throw ServerError(operation: operation, code: result < 0 ? -result : ENOMEM)
        }
    }
}

/// A connection between two messages or in the middle of one.
package struct CarriedConnection: Codable, Sendable {
    enum Stage: Codable, Sendable {
        case handshake(Handshake)
        case transmission(
            exportName: String, format: WireFormat, contexts: [MetaContext],
            refused: Transmission.Refused?)
    }
    var socket: Int32
    var stage: Stage
    /// Version and algorithms of TLS, which the kernel does; nil: there is none.
    var tls: String?

    /// The export, if it has been chosen.
    var exportName: String? {
        if case .transmission(let name, _, _, _) = stage { name } else { nil }
    }
}

/// A client of the server before, until a reactor has it.
struct InheritedClient: Sendable {
    /// Closed when the last client has been taken over, or has gone.
    private final class InputFile: Sendable {
        let descriptor: Int32
        init(_ descriptor: Int32) { self.descriptor = descriptor }
        deinit { close(descriptor) }
    }

    let connection: CarriedConnection
    private let range: Range<UInt64>
    private let file: InputFile?

    /// - Note: once, as it takes over the file.
    static func all(of inherited: HandOver) -> [InheritedClient] {
        let file = inherited.inputFile.map { InputFile($0) }
        return inherited.clients.map {
            InheritedClient(connection: $0.connection, range: $0.input, file: file)
        }
    }

    /// What had arrived. The file has it no longer.
    func takeInput() throws(ServerError) -> [UInt8] {
        guard let file, !range.isEmpty else { return [] }
        var result: Int32 = 0
        let input = [UInt8](unsafeUninitializedCapacity: range.count) { buffer, count in
            result = FileIO.read(
                file.descriptor, at: range.lowerBound, into: buffer.baseAddress!,
                length: range.count)
            count = Int(max(result, 0))
        }
        guard input.count == range.count else {
            throw ServerError(
                operation: "read what the server before had received",
                code: result < 0 ? -result : EIO)
        }
        _ = clinux_allocate(
            file.descriptor, AllocateMode.punchHole, range.lowerBound, UInt64(range.count))
        return input
    }
}
