// What goes over the control socket: JSON, one message a line.
//
//     {"volumes":{}}                                           status, volumes, change, check
//     {"change":{"_0":{"delete":{"name":"vol0"}}}}
//
// is answered by any number of progress lines and then one answer:
//
//     {"progress":{...}}  ...  {"done":{}}   or   {"failed":{"_0":{"kind":…,"message":…}}}
//
// A connection may ask again after an answer. A client of another version that is not understood
// gets `failed`; also one that asks for more than this server knows of: half of a request is not
// what was asked for. An answer that says more than its reader knows is fine.

import FoundationEssentials
import ThinPool

enum ControlRequest: Codable, Equatable, Sendable {
    case status
    case volumes
    case change(PoolChange)
    case check
}

enum ControlResponse: Codable, Equatable, Sendable {
    /// The server is alive and at work; a check says how far.
    case progress(CheckAdvance?)
    case done
    case status(PoolStatus)
    case volumes([VolumeInfo])
    case check(CheckResult)
    case failed(ControlError)
}

enum ControlLine {
    /// A request is a few names; anything longer is not one.
    static let maxRequestBytes = 64 << 10
    /// A list of volumes has a few hundred bytes for each.
    static let maxResponseBytes = 1 << 30

    static func encode(_ message: some Encodable) throws(ControlError) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        do { return [UInt8](try encoder.encode(message)) + [UInt8(ascii: "\n")] } catch {
            throw ControlError(.connection, "a message cannot be encoded: \(error)")
        }
    }

    /// A request that this version would say in the same bytes: nothing in it was passed over.
    static func decodeRequest(_ line: [UInt8]) throws(ControlError) -> ControlRequest {
        let request = try decode(ControlRequest.self, line)
        guard try encode(request).dropLast() == line[...] else { throw otherVersion }
        return request
    }

    static func decode<Message: Decodable>(_ type: Message.Type, _ line: [UInt8])
        throws(ControlError) -> Message
    {
        do { return try JSONDecoder().decode(type, from: Data(line)) } catch { throw otherVersion }
    }

    private static var otherVersion: ControlError {
        ControlError(
            .connection,
            "what came over the control socket cannot be understood: are both sides the same "
                + "version of wafer?")
    }
}
