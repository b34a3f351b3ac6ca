// Where a server listens and a client connects: a Unix socket or a TCP port.

import Glibc

/// What a program of the benchmark ends with: one line.
public struct SocketFailure: Error, CustomStringConvertible {
    public var description: String

    init(_ operation: String, code: Int32 = errno) {
        description = "\(operation): \(String(cString: strerror(code)))"
    }

    init(reason: String) { description = reason }
}

public enum Address: Sendable, CustomStringConvertible {
    case unix(path: String)
    /// An address in figures, IPv4.
    case tcp(host: String, port: UInt16)

    /// Of host:port.
    public init?(hostAndPort text: String) {
        let parts = text.split(separator: ":", omittingEmptySubsequences: false)
        guard parts.count == 2, !parts[0].isEmpty, let port = UInt16(parts[1]) else { return nil }
        self = .tcp(host: String(parts[0]), port: port)
    }

    public var description: String {
        switch self {
        case .unix(let path): path
        case .tcp(let host, let port): "\(host):\(port)"
        }
    }

    /// A connected socket.
    public func connect() throws(SocketFailure) -> Int32 {
        let descriptor = try newSocket()
        let result = try withSocketAddress { Glibc.connect(descriptor, $0, $1) }
        guard result == 0 else { throw SocketFailure("cannot connect to \(self)") }
        prepare(descriptor)
        return descriptor
    }

    /// A listening socket. A Unix socket that is there already is replaced.
    public func listen() throws(SocketFailure) -> Int32 {
        let descriptor = try newSocket()
        switch self {
        case .unix(let path): unlink(path)
        case .tcp: set(descriptor, SOL_SOCKET, SO_REUSEADDR, 1)
        }
        let result = try withSocketAddress { bind(descriptor, $0, $1) }
        guard result == 0, Glibc.listen(descriptor, SOMAXCONN) == 0 else {
            throw SocketFailure("cannot listen on \(self)")
        }
        return descriptor
    }

    /// The next client of a listening socket.
    public func accept(_ listener: Int32) throws(SocketFailure) -> Int32 {
        while true {
            let descriptor = Glibc.accept(listener, nil, nil)
            if descriptor >= 0 {
                prepare(descriptor)
                return descriptor
            }
            guard errno == EINTR || errno == ECONNABORTED else {
                throw SocketFailure("cannot accept on \(self)")
            }
        }
    }

    private func newSocket() throws(SocketFailure) -> Int32 {
        let family =
            switch self {
            case .unix: AF_UNIX
            case .tcp: AF_INET
            }
        let kind = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue)
        let descriptor = socket(family, kind, 0)
        guard descriptor >= 0 else { throw SocketFailure("cannot make a socket") }
        return descriptor
    }

    private func prepare(_ descriptor: Int32) {
        if case .tcp = self { set(descriptor, Int32(IPPROTO_TCP), TCP_NODELAY, 1) }
    }

    private func set(_ descriptor: Int32, _ level: Int32, _ option: Int32, _ value: Int32) {
        var value = value
        setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
    }

    private func withSocketAddress<Result>(
        _ body: (UnsafePointer<sockaddr>, socklen_t) -> Result
    ) throws(SocketFailure) -> Result {
        switch self {
        case .unix(let path):
            var address = sockaddr_un()
            address.sun_family = sa_family_t(AF_UNIX)
            guard path.utf8.count < MemoryLayout.size(ofValue: address.sun_path) else {
                throw SocketFailure(reason: "\(path) is too long for a Unix socket")
            }
            withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
            return Self.generic(&address, body)
        case .tcp(let host, let port):
            var address = sockaddr_in()
            address.sin_family = sa_family_t(AF_INET)
            address.sin_port = port.bigEndian
            guard inet_pton(AF_INET, host, &address.sin_addr) == 1 else {
                throw SocketFailure(reason: "\(host) is not an IPv4 address in figures")
            }
            return Self.generic(&address, body)
        }
    }

    private static func generic<Specific, Result>(
        _ address: inout Specific, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Result
    ) -> Result {
        withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                body($0, socklen_t(MemoryLayout<Specific>.size))
            }
        }
    }
}
