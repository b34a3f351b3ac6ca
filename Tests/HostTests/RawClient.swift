// A client that says what no library lets one say.

import Foundation

func bigEndianBytes(_ word: some FixedWidthInteger) -> [UInt8] {
    withUnsafeBytes(of: word.bigEndian) { Array($0) }
}

/// One connection. Numbers here are the protocol's, written out once more: this is a second opinion.
/// Used by one thread at a time.
final class RawClient: @unchecked Sendable {
    private var socket: Int32

    static let read: UInt16 = 0
    static let write: UInt16 = 1
    static let disconnect: UInt16 = 2
    static let flush: UInt16 = 3
    static let trim: UInt16 = 4
    static let cache: UInt16 = 5
    static let writeZeroes: UInt16 = 6
    static let blockStatus: UInt16 = 7
    static let requestMagic: UInt32 = 0x2560_9513
    private static let patience = 20

    /// Connected to the server's Unix socket, nothing said.
    init(_ server: Server) throws {
        socket = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: server.unixPath.utf8) }
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                Glibc.connect(socket, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        guard result == 0 else { throw Failure("connect: \(errno)") }
        limitWaiting()
    }

    /// Connected to the server's port from another address of the loopback network.
    init(_ server: Server, from source: String) throws {
        socket = Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        func name(_ address: String, _ port: UInt16) -> sockaddr_in {
            var name = sockaddr_in()
            name.sin_family = sa_family_t(AF_INET)
            name.sin_port = port.bigEndian
            inet_pton(AF_INET, address, &name.sin_addr)
            return name
        }
        for (call, name) in [
            (Glibc.bind, name(source, 0)), (Glibc.connect, name("127.0.0.1", server.port)),
        ] {
            var name = name
            let result = withUnsafePointer(to: &name) {
                $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    call(socket, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
                }
            }
            guard result == 0 else { throw Failure("from \(source): \(errno)") }
        }
        limitWaiting()
    }

    private func limitWaiting() {
        var time = timeval(tv_sec: Self.patience, tv_usec: 0)
        let length = socklen_t(MemoryLayout<timeval>.size)
        setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &time, length)
        setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &time, length)
    }

    /// In transmission with an export.
    convenience init(_ server: Server, _ export: String) throws {
        try self.init(server)
        guard try choose(export) else { throw Failure("GO is refused") }
    }

    /// The handshake; false: GO is refused.
    func choose(_ export: String) throws -> Bool {
        _ = try receive(18)
        try send(Self.clientFlags + Self.go(export))
        return try outcome() == Self.acknowledged
    }

    deinit { leave() }

    /// How a client goes away.
    enum Departure: CaseIterable {
        /// The end of the stream.
        case closed
        /// What the server still sends cannot be delivered, and it is told so.
        case reset
    }

    /// - Note: a Unix socket is reset only if something was not read.
    func leave(_ departure: Departure = .closed) {
        guard socket >= 0 else { return }
        if departure == .reset {
            var linger = linger(l_onoff: 1, l_linger: 0)
            let length = socklen_t(MemoryLayout.size(ofValue: linger))
            setsockopt(socket, SOL_SOCKET, SO_LINGER, &linger, length)
        }
        close(socket)
        socket = -1
    }

    /// Nothing more will be sent.
    func endSending() { shutdown(socket, Int32(SHUT_WR)) }

    /// Sends as much as the server takes: until it has taken nothing for a while.
    @discardableResult
    func stuff(_ bytes: [UInt8]) -> Int {
        var sent = 0
        while sent < bytes.count {
            let count = bytes.withUnsafeBytes {
                Glibc.send(
                    socket, $0.baseAddress! + sent, bytes.count - sent,
                    Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
            }
            if count > 0 {
                sent += count
                continue
            }
            guard errno == EAGAIN else { break }
            var state = pollfd(fd: socket, events: Int16(POLLOUT), revents: 0)
            if poll(&state, 1, Self.stuffedMilliseconds) <= 0 { break }
        }
        return sent
    }

    private static let stuffedMilliseconds: Int32 = 100

    /// What the server says until it hangs up, but not more than `most` bytes.
    func receiveAll(most: Int = 1 << 20) -> [UInt8] {
        var bytes: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 64 << 10)
        while bytes.count < most {
            let count = recv(socket, &piece, min(piece.count, most - bytes.count), 0)
            guard count > 0 else { break }
            bytes += piece[..<count]
        }
        return bytes
    }

    static func word(_ bytes: some Sequence<UInt8>) -> UInt64 {
        bytes.reduce(0) { $0 << 8 | UInt64($1) }
    }

    func send(_ bytes: [UInt8]) throws {
        var sent = 0
        while sent < bytes.count {
            let count = bytes.withUnsafeBytes {
                Glibc.send(socket, $0.baseAddress! + sent, bytes.count - sent, Int32(MSG_NOSIGNAL))
            }
            guard count > 0 else { throw Failure("send: \(errno)") }
            sent += count
        }
    }

    func receive(_ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var received = 0
        while received < count {
            let result = bytes.withUnsafeMutableBytes {
                recv(socket, $0.baseAddress! + received, count - received, 0)
            }
            guard result > 0 else {
                throw Failure(result == 0 ? "the server hung up" : "receive: \(errno)")
            }
            received += result
        }
        return bytes
    }

    /// Whether the server hangs up, without another byte.
    func isHungUpOn() -> Bool {
        var byte: UInt8 = 0
        let result = recv(socket, &byte, 1, 0)
        return result == 0 || result < 0 && errno == ECONNRESET
    }

    func request(
        _ command: UInt16, flags: UInt16 = 0, offset: UInt64 = 0, length: UInt32 = 0,
        payload: [UInt8] = [], magic: UInt32 = RawClient.requestMagic, cookie: UInt64
    ) throws {
        try send(
            bigEndianBytes(magic) + bigEndianBytes(flags) + bigEndianBytes(command)
                + bigEndianBytes(cookie) + bigEndianBytes(offset) + bigEndianBytes(length)
                + payload)
    }

    /// The error in the reply to one request, which is the only one under way.
    func error(
        _ command: UInt16, flags: UInt16 = 0, offset: UInt64 = 0, length: UInt32 = 0,
        payload: [UInt8] = []
    ) throws -> Int32 {
        let cookie = UInt64.random(in: 0...UInt64.max)
        try request(
            command, flags: flags, offset: offset, length: length, payload: payload,
            cookie: cookie)
        let reply = try receive(16)
        guard Self.word(reply[0..<4]) == 0x6744_6698, Self.word(reply[8..<16]) == cookie else {
            throw Failure("the stream is out of step: \(reply)")
        }
        let error = Int32(Self.word(reply[4..<8]))
        if command == Self.read, error == 0 { _ = try receive(Int(length)) }
        return error
    }
}
