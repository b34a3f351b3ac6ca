// Listening sockets, and what is to be known and set of the connections that they accept.
//
// A Unix socket left over by a server that is gone is removed, but only after a connection to it
// has been refused. A socket that this server made is removed when it stops.

import Glibc

struct Listener: Sendable {
    enum Kind: Sendable {
        /// Path, and identity of what was bound there.
        case unix(path: String, device: dev_t, inode: ino_t)
        case tcp
    }

    let descriptor: Int32
    let kind: Kind
    /// Where clients find it, as an NBD URI without an export's name.
    let uri: String

    /// - Postcondition: everything is undone by `close`.
    func close() {
        if case .unix(let path, let device, let inode) = kind {
            var status = stat()
            if lstat(path, &status) == 0, status.st_dev == device, status.st_ino == inode {
                unlink(path)
            }
        }
        Glibc.close(descriptor)
    }

    // MARK: - Unix

    static func unix(path: String) throws(ServerError) -> Listener {
        let operation = "listen on \(path)"
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let capacity = MemoryLayout.size(ofValue: address.sun_path) - 1
        guard !path.isEmpty, path.utf8.count <= capacity, !path.utf8.contains(0) else {
            throw ServerError(
                operation: operation, code: ENAMETOOLONG,
                reason: "a Unix socket's path has 1 to \(capacity) bytes; give a shorter one")
        }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }

        let descriptor = try newSocket(AF_UNIX, operation)
        do throws(ServerError) {
            var code = bind(descriptor, to: &address)
            if code == EADDRINUSE {
                try removeStale(path, &address, operation)
                code = bind(descriptor, to: &address)
            }
            guard code == 0 else { throw unixError(operation, code) }
            var status = stat()
            guard lstat(path, &status) == 0 else {
                throw ServerError(operation: operation, code: errno)
            }
            try listen(descriptor, operation)
            return Listener(
                descriptor: descriptor,
                kind: .unix(path: path, device: status.st_dev, inode: status.st_ino),
                uri: "nbd+unix:///?socket=\(percentEncoded(path))")
        } catch {
            Glibc.close(descriptor)
            throw error
        }
    }

    /// Removes a socket that nobody listens on.
    private static func removeStale(
        _ path: String, _ address: inout sockaddr_un, _ operation: String
    ) throws(ServerError) {
        var status = stat()
        guard lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else {
            throw ServerError(
                operation: operation, code: EADDRINUSE,
                reason: "something that is not a socket is there; remove it or give another path")
        }
        let probe = try newSocket(AF_UNIX, operation)
        defer { Glibc.close(probe) }
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(probe, $0, length)
            }
        }
        let code = result == 0 ? 0 : errno
        guard code == ECONNREFUSED else {
            throw ServerError(
                operation: operation, code: EADDRINUSE,
                reason: code == 0 || code == EAGAIN
                    ? "another server listens there; stop it or give another path"
                    : "the socket there cannot be reached (\(ServerError.words(code)))")
        }
        unlink(path)
    }

    private static func unixError(_ operation: String, _ code: Int32) -> ServerError {
        let reason =
            switch code {
            case ENOENT, ENOTDIR: "its directory does not exist"
            case EACCES, EPERM: "permission denied; check the directory's owner and mode"
            case EROFS: "the file system is read-only"
            default: ServerError.words(code)
            }
        return ServerError(operation: operation, code: code, reason: reason)
    }

    // MARK: - TCP

    /// One listener for every address that `host` stands for; "" and "*" are all of the machine's.
    static func tcp(host: String, port: UInt16) throws(ServerError) -> [Listener] {
        let isAny = host.isEmpty || host == "*"
        let operation = "listen on \(bracketed(host)):\(port)"
        var hints = addrinfo()
        hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        var found: UnsafeMutablePointer<addrinfo>?
        let bare =
            host.hasPrefix("[") && host.hasSuffix("]") ? String(host.dropFirst().dropLast()) : host
        let result = getaddrinfo(isAny ? nil : bare, String(port), &hints, &found)
        guard result == 0 else {
            throw ServerError(
                operation: operation, code: EADDRNOTAVAIL,
                reason: "\(host) is not an address (\(String(cString: gai_strerror(result))))")
        }
        defer { freeaddrinfo(found) }

        var listeners: [Listener] = []
        var failure: ServerError?
        var next = found
        while let entry = next {
            next = entry.pointee.ai_next
            do throws(ServerError) {
                listeners.append(try tcp(entry.pointee, operation))
            } catch {
                // A machine without IPv6 still has IPv4, and the other way round.
                if error.code != EAFNOSUPPORT && error.code != EADDRNOTAVAIL {
                    for listener in listeners { listener.close() }
                    throw error
                }
                failure = error
            }
        }
        if listeners.isEmpty, let failure { throw failure }
        return listeners
    }

    private static func tcp(
        _ entry: addrinfo, _ operation: String
    ) throws(ServerError) -> Listener {
        let descriptor = try newSocket(entry.ai_family, operation)
        do throws(ServerError) {
            try set(descriptor, SOL_SOCKET, SO_REUSEADDR, 1, operation)
            if entry.ai_family == AF_INET6 {
                try set(descriptor, Int32(IPPROTO_IPV6), IPV6_V6ONLY, 1, operation)
            }
            guard Glibc.bind(descriptor, entry.ai_addr, entry.ai_addrlen) == 0 else {
                let code = errno
                let reason =
                    switch code {
                    case EADDRINUSE: "another program has the port; stop it or give another port"
                    case EACCES: "permission denied; ports below 1024 are the superuser's"
                    default: ServerError.words(code)
                    }
                throw ServerError(operation: operation, code: code, reason: reason)
            }
            try listen(descriptor, operation)
            let (host, port) = numericName(descriptor, getsockname)
            return Listener(
                descriptor: descriptor, kind: .tcp, uri: "nbd://\(bracketed(host)):\(port)")
        } catch {
            Glibc.close(descriptor)
            throw error
        }
    }

    // MARK: - Accepted connections

    /// Bytes of replies that the kernel takes before the client has read any: several of 128 KiB.
    /// A quarter more 128 KiB reads a second than with Linux's 208 KiB.
    private static let sendBuffer: Int32 = 512 << 10
    /// Seconds without traffic before a TCP connection is probed, between probes, and their number.
    private static let keepAlive: (idle: Int32, interval: Int32, count: Int32) = (60, 10, 6)

    /// Sets what a connection needs. Failures are not serious: the connection works without.
    func prepare(_ socket: Int32) {
        guard case .tcp = kind else {
            // TCP sizes its own. Beyond net.core.wmem_max, where we may.
            var room = Self.sendBuffer
            let length = socklen_t(MemoryLayout<Int32>.size)
            if setsockopt(socket, SOL_SOCKET, SO_SNDBUFFORCE, &room, length) != 0 {
                setsockopt(socket, SOL_SOCKET, SO_SNDBUF, &room, length)
            }
            return
        }
        let tcp = Int32(IPPROTO_TCP)
        let settings: [(Int32, Int32, Int32)] = [
            (tcp, TCP_NODELAY, 1), (SOL_SOCKET, SO_KEEPALIVE, 1),
            (tcp, TCP_KEEPIDLE, Self.keepAlive.idle), (tcp, TCP_KEEPINTVL, Self.keepAlive.interval),
            (tcp, TCP_KEEPCNT, Self.keepAlive.count),
        ]
        for (level, option, value) in settings {
            var value = value
            setsockopt(socket, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
        }
    }

    /// Who is at the other end, for the log.
    static func peer(of socket: Int32) -> String {
        // struct ucred: pid, uid, gid.
        var credentials: (UInt32, UInt32, UInt32) = (0, 0, 0)
        var length = socklen_t(MemoryLayout.size(ofValue: credentials))
        let (host, port) = numericName(socket, getpeername)
        if !host.isEmpty { return "\(bracketed(host)):\(port)" }
        if getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0 {
            return "pid \(credentials.0) uid \(credentials.1)"
        }
        return "unknown"
    }

    // MARK: - System calls

    private static func newSocket(
        _ family: Int32, _ operation: String
    ) throws(ServerError) -> Int32 {
        let descriptor = socket(
            family, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw ServerError(operation: operation, code: errno) }
        return descriptor
    }

    private static func set(
        _ descriptor: Int32, _ level: Int32, _ option: Int32, _ value: Int32, _ operation: String
    ) throws(ServerError) {
        var value = value
        guard
            setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size)) == 0
        else { throw ServerError(operation: operation, code: errno) }
    }

    /// 0 or an errno.
    private static func bind(_ descriptor: Int32, to address: inout sockaddr_un) -> Int32 {
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        return withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                Glibc.bind(descriptor, $0, length) == 0 ? 0 : errno
            }
        }
    }

    private static func listen(_ descriptor: Int32, _ operation: String) throws(ServerError) {
        guard Glibc.listen(descriptor, SOMAXCONN) == 0 else {
            throw ServerError(operation: operation, code: errno)
        }
    }

    private typealias NameCall = (
        Int32, UnsafeMutablePointer<sockaddr>?, UnsafeMutablePointer<socklen_t>?
    ) -> Int32

    /// Address and port in figures; "" if it is not an Internet socket.
    private static func numericName(_ socket: Int32, _ call: NameCall) -> (String, String) {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        return withUnsafeMutablePointer(to: &storage) { storage in
            storage.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                guard call(socket, address, &length) == 0,
                    [AF_INET, AF_INET6].contains(Int32(address.pointee.sa_family))
                else { return ("", "") }
                var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
                var port = [CChar](repeating: 0, count: Int(NI_MAXSERV))
                let flags = NI_NUMERICHOST | NI_NUMERICSERV
                guard
                    getnameinfo(
                        address, length, &host, socklen_t(host.count), &port,
                        socklen_t(port.count), flags) == 0
                else { return ("", "") }
                return (text(host), text(port))
            }
        }
    }

    private static func text(_ characters: [CChar]) -> String {
        String(decoding: characters.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self)
    }

    private static func bracketed(_ host: String) -> String {
        host.contains(":") && !host.hasPrefix("[") ? "[\(host)]" : host
    }

    /// For the query of a URI.
    private static func percentEncoded(_ path: String) -> String {
        let plain = Set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/".utf8)
        let digits = Array("0123456789ABCDEF")
        return path.utf8.reduce(into: "") { result, byte in
            if plain.contains(byte) {
                result.append(Character(UnicodeScalar(byte)))
            } else {
                result += "%\(digits[Int(byte >> 4)])\(digits[Int(byte & 15)])"
            }
        }
    }
}
