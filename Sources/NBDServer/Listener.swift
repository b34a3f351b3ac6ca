// Listening sockets: their own kinds are in Listener+Unix.swift and Listener+TCP.swift.

import Glibc

struct Listener: Codable, Sendable {
    enum Kind: Codable, Sendable {
        /// Path, and identity of what was bound there.
        case unix(path: String, device: dev_t, inode: ino_t)
        case tcp
        /// Somebody else's: neither removed nor shut down here, since others may still accept.
        case inherited
    }

    let descriptor: Int32
    let kind: Kind
    /// Where clients find it, as an NBD URI without an export's name.
    let uri: String

    var isInherited: Bool { if case .inherited = kind { true } else { false } }

    /// - Postcondition: everything is undone by `close`.
    func close() {
        switch kind {
        case .unix(let path, let device, let inode):
            Self.remove(path, device, inode)
            Glibc.close(descriptor)
        case .tcp: Glibc.close(descriptor)
        case .inherited: break
        }
    }

    // MARK: - Inherited

    /// A stream socket that listens already.
    static func inherited(_ descriptor: Int32) throws(ServerError) -> Listener {
        let operation = "serve on the inherited descriptor \(descriptor)"
        func refuse(_ reason: String) -> ServerError {
            ServerError(operation: operation, code: 0, reason: reason)
        }
        let family = SocketName.family(of: descriptor)
        guard [AF_UNIX, AF_INET, AF_INET6].contains(family) else {
            throw refuse("it is not a Unix or TCP socket")
        }
        guard SocketName.option(descriptor, SO_TYPE) == Int32(SOCK_STREAM.rawValue) else {
            throw refuse("it is not a stream socket (systemd: use ListenStream=)")
        }
        guard SocketName.option(descriptor, SO_ACCEPTCONN) == 1 else {
            throw refuse("it does not listen (systemd: use Accept=no)")
        }
        // Whoever else accepts may be faster; then accepting must not wait.
        let flags = fcntl(descriptor, F_GETFL)
        guard flags >= 0, fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) == 0 else {
            throw ServerError(operation: operation, code: errno)
        }
        let uri =
            if family == AF_UNIX {
                unixURI(SocketName.path(descriptor) ?? "")
            } else { tcpURI(descriptor) }
        return Listener(descriptor: descriptor, kind: .inherited, uri: uri)
    }

    // MARK: - For both kinds

    static func newSocket(_ family: Int32, _ operation: String) throws(ServerError) -> Int32 {
        let descriptor = socket(
            family, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw ServerError(operation: operation, code: errno) }
        return descriptor
    }

    static func listen(_ descriptor: Int32, _ operation: String) throws(ServerError) {
        guard Glibc.listen(descriptor, SOMAXCONN) == 0 else {
            throw ServerError(operation: operation, code: errno)
        }
    }
}
