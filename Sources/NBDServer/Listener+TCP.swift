// Listening on TCP: one socket for each address that a host stands for.

import BlockIO
import Glibc

extension Listener {
    /// One listener for every address that `host` stands for; "" and "*" are all of the machine's.
    static func tcp(host: String, port: UInt16) throws(ServerError) -> [Listener] {
        let isAny = host.isEmpty || host == "*"
        let operation = "listen on \(SocketName.bracketed(host)):\(port)"
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
                    default: SystemError.words(code)
                    }
                throw ServerError(operation: operation, code: code, reason: reason)
            }
            try listen(descriptor, operation)
            return Listener(descriptor: descriptor, kind: .tcp, uri: tcpURI(descriptor))
        } catch {
            Glibc.close(descriptor)
            throw error
        }
    }

    static func tcpURI(_ descriptor: Int32) -> String {
        let (host, port) = SocketName.numeric(descriptor, getsockname)
        return "nbd://\(SocketName.bracketed(host)):\(port)"
    }

    private static func set(
        _ descriptor: Int32, _ level: Int32, _ option: Int32, _ value: Int32, _ operation: String
    ) throws(ServerError) {
        var value = value
        guard
            setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size)) == 0
        else { throw ServerError(operation: operation, code: errno) }
    }
}
