// A client that can do what well-behaved clients do, and what they do not.

import Glibc
import NBDProtocol
import Testing

struct ClientError: Error, CustomStringConvertible {
    var description: String
    init(_ text: String) { description = text }
}

func bigEndianBytes(_ word: some FixedWidthInteger) -> [UInt8] {
    withUnsafeBytes(of: word.bigEndian) { Array($0) }
}

func bigEndian<Word: FixedWidthInteger>(
    _ bytes: [UInt8], _ offset: Int, as: Word.Type
) -> Word {
    bytes[offset..<offset + MemoryLayout<Word>.size].reduce(0) { $0 << 8 | Word($1) }
}

/// One connection, with blocking calls that give up after a while.
final class Client {
    let socket: Int32
    private(set) var size: UInt64 = 0
    private(set) var flags: TransmissionFlags = []

    init(unix path: String, timeout seconds: Int = 60) throws {
        socket = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(socket, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        setTimeout(seconds)
        guard result == 0 else { throw ClientError("cannot connect: \(errno)") }
    }

    /// To 127.0.0.1.
    /// - Parameter hasLittleRoom: neither end of the connection keeps many bytes for the other.
    init(tcp port: UInt16, hasLittleRoom: Bool = false, timeout seconds: Int = 60) throws {
        socket = Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        if hasLittleRoom {
            for (level, name, var value) in [
                (SOL_SOCKET, SO_RCVBUF, Int32(16 << 10)),
                // The server's end makes room for some segments.
                (Int32(IPPROTO_TCP), TCP_MAXSEG, 1000),
            ] {
                let length = socklen_t(MemoryLayout.size(ofValue: value))
                setsockopt(socket, level, name, &value, length)
            }
        }
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = port.bigEndian
        address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(socket, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
            }
        }
        setTimeout(seconds)
        guard result == 0 else { throw ClientError("cannot connect: \(errno)") }
    }

    /// Takes over one end of a pair.
    init(connected socket: Int32, timeout seconds: Int = 60) {
        self.socket = socket
        setTimeout(seconds)
    }

    /// Connected and with the export chosen.
    convenience init(unix path: String, export: String, timeout seconds: Int = 60) throws {
        try self.init(unix: path, timeout: seconds)
        try negotiate(export)
    }

    deinit { close(socket) }

    private func setTimeout(_ seconds: Int) {
        var time = timeval(tv_sec: seconds, tv_usec: 0)
        setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
        setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
    }

    // MARK: - Bytes

    func send(_ bytes: [UInt8]) throws {
        var sent = 0
        while sent < bytes.count {
            let count = bytes.withUnsafeBytes {
                Glibc.send(socket, $0.baseAddress! + sent, bytes.count - sent, Int32(MSG_NOSIGNAL))
            }
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { throw ClientError("send: \(errno)") }
            sent += count
        }
    }

    /// What there is, at least one byte.
    func receiveSome() throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 1 << 16)
        while true {
            let result = recv(socket, &bytes, bytes.count, 0)
            if result < 0 && errno == EINTR { continue }
            guard result > 0 else {
                throw ClientError(result == 0 ? "the server hung up" : "receive: \(errno)")
            }
            return Array(bytes.prefix(result))
        }
    }

    func receive(_ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var received = 0
        while received < count {
            let result = bytes.withUnsafeMutableBytes {
                recv(socket, $0.baseAddress! + received, count - received, 0)
            }
            // Other tests' children end while this one waits.
            if result < 0 && errno == EINTR { continue }
            guard result > 0 else {
                throw ClientError(result == 0 ? "the server hung up" : "receive: \(errno)")
            }
            received += result
        }
        return bytes
    }

    /// Whether the server hangs up; what it still sends is thrown away.
    func isHungUpOn() -> Bool {
        var bytes = [UInt8](repeating: 0, count: 1 << 16)
        while true {
            let result = recv(socket, &bytes, bytes.count, 0)
            if result == 0 { return true }
            if result < 0 && errno == EINTR { continue }
            if result < 0 { return errno == ECONNRESET }
        }
    }

    /// Ends the connection so that the server sees a reset.
    func reset() {
        var linger = linger(l_onoff: 1, l_linger: 0)
        setsockopt(
            socket, SOL_SOCKET, SO_LINGER, &linger, socklen_t(MemoryLayout.size(ofValue: linger)))
        shutdown(socket, Int32(SHUT_RDWR))
    }

    // MARK: - Handshake

    func greet() throws {
        let greeting = try receive(18)
        #expect(bigEndian(greeting, 0, as: UInt64.self) == Magic.greeting)
        try send(bigEndianBytes(ClientFlag.fixedNewstyle | ClientFlag.noZeroes))
    }

    func sendOption(_ code: OptionCode, _ data: [UInt8] = []) throws {
        try send(
            bigEndianBytes(Magic.option) + bigEndianBytes(code.rawValue)
                + bigEndianBytes(UInt32(data.count)) + data)
    }

    func receiveOptionReply() throws -> (type: OptionReplyType, data: [UInt8]) {
        let header = try receive(20)
        #expect(bigEndian(header, 0, as: UInt64.self) == Magic.optionReply)
        let data = try receive(Int(bigEndian(header, 16, as: UInt32.self)))
        return (OptionReplyType(rawValue: bigEndian(header, 12, as: UInt32.self)), data)
    }

    func negotiate(_ export: String) throws {
        try greet()
        let name = Array(export.utf8)
        try sendOption(.go, bigEndianBytes(UInt32(name.count)) + name + bigEndianBytes(UInt16(0)))
        while true {
            let reply = try receiveOptionReply()
            if reply.type == .ack { return }
            guard reply.type == .info else { throw ClientError("GO refused: \(reply.type)") }
            if bigEndian(reply.data, 0, as: UInt16.self) == InfoType.export {
                size = bigEndian(reply.data, 2, as: UInt64.self)
                flags = TransmissionFlags(rawValue: bigEndian(reply.data, 10, as: UInt16.self))
            }
        }
    }

    func list() throws -> [ListedExport] {
        try sendOption(.list)
        var exports: [ListedExport] = []
        while true {
            let reply = try receiveOptionReply()
            if reply.type == .ack { return exports }
            let length = Int(bigEndian(reply.data, 0, as: UInt32.self))
            let texts = reply.data.dropFirst(4)
            exports.append(
                ListedExport(
                    name: String(decoding: texts.prefix(length), as: UTF8.self),
                    description: String(decoding: texts.dropFirst(length), as: UTF8.self)))
        }
    }

    // MARK: - Requests

    static func request(
        _ command: UInt16, cookie: UInt64, offset: UInt64 = 0, length: UInt32 = 0,
        flags: CommandFlags = []
    ) -> [UInt8] {
        bigEndianBytes(Magic.request) + bigEndianBytes(flags.rawValue) + bigEndianBytes(command)
            + bigEndianBytes(cookie) + bigEndianBytes(offset) + bigEndianBytes(length)
    }

    /// In the format that was agreed on.
    static func request(
        _ command: UInt16, cookie: UInt64, offset: UInt64 = 0, length: UInt64 = 0,
        flags: CommandFlags = [], format: WireFormat
    ) -> [UInt8] {
        guard format == .extended else {
            return request(
                command, cookie: cookie, offset: offset, length: UInt32(length), flags: flags)
        }
        return bigEndianBytes(Magic.extendedRequest) + bigEndianBytes(flags.rawValue)
            + bigEndianBytes(command) + bigEndianBytes(cookie) + bigEndianBytes(offset)
            + bigEndianBytes(length)
    }

    static func request(
        _ command: Command, cookie: UInt64, offset: UInt64 = 0, length: UInt32 = 0,
        flags: CommandFlags = []
    ) -> [UInt8] {
        request(command.rawValue, cookie: cookie, offset: offset, length: length, flags: flags)
    }

    func receiveReply() throws -> (error: WireError, cookie: UInt64) {
        let header = try receive(16)
        guard bigEndian(header, 0, as: UInt32.self) == Magic.simpleReply else {
            throw ClientError("a reply without its magic number")
        }
        return (
            WireError(rawValue: bigEndian(header, 4, as: UInt32.self)),
            bigEndian(header, 8, as: UInt64.self)
        )
    }

    private func transact(_ request: [UInt8], _ payload: [UInt8] = []) throws -> WireError {
        try send(request + payload)
        let reply = try receiveReply()
        #expect(reply.cookie == 0xC00C_1E00_1234_5678)
        return reply.error
    }

    private static let cookie: UInt64 = 0xC00C_1E00_1234_5678

    func read(_ offset: UInt64, _ length: UInt32) throws -> [UInt8] {
        let error = try transact(
            Self.request(.read, cookie: Self.cookie, offset: offset, length: length))
        guard error == .none else { throw ClientError("read: \(error)") }
        return try receive(Int(length))
    }

    func write(
        _ offset: UInt64, _ bytes: [UInt8], flags: CommandFlags = []
    ) throws -> WireError {
        try transact(
            Self.request(
                .write, cookie: Self.cookie, offset: offset, length: UInt32(bytes.count),
                flags: flags), bytes)
    }

    func simple(
        _ command: Command, _ offset: UInt64 = 0, _ length: UInt32 = 0, flags: CommandFlags = []
    ) throws -> WireError {
        try transact(
            Self.request(command, cookie: Self.cookie, offset: offset, length: length, flags: flags)
        )
    }

    func disconnect() throws {
        try send(Self.request(.disconnect, cookie: 0))
    }
}

/// A small pseudo-random generator, so that a failure can be repeated from its seed.
struct SplitMix: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
    mutating func bytes(_ count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        bytes.withUnsafeMutableBytes { memory in
            for offset in stride(from: 0, to: count - 7, by: 8) {
                memory.storeBytes(of: next(), toByteOffset: offset, as: UInt64.self)
            }
        }
        return bytes
    }
}

/// A thread that a test starts and joins.
final class TestThread {
    private final class Body: Sendable {
        let run: @Sendable () -> Void
        init(_ run: @escaping @Sendable () -> Void) { self.run = run }
    }
    private var thread = pthread_t()

    init(_ body: @escaping @Sendable () -> Void) {
        let argument = Unmanaged.passRetained(Body(body)).toOpaque()
        pthread_create(
            &thread, nil,
            { argument in
                Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue().run()
                return nil
            }, argument)
    }

    func join() { pthread_join(thread, nil) }
}
