// Who is at the other end of a socket, as far as the kernel knows it.

import Glibc

package struct Peer: Sendable {
    package enum Identity: Sendable {
        case internet(IPAddress)
        /// Whoever called connect, or socketpair; `groups` are all of its groups.
        case unix(user: UInt32, groups: [UInt32])
        case unknown
    }

    /// What the clients of one site or user have in common, for limits.
    package enum Owner: Hashable, Sendable {
        case site(IPAddress)
        case user(UInt32)
        case unknown
    }

    package let identity: Identity
    /// For the log.
    package let description: String

    package init(_ identity: Identity, description: String) {
        self.identity = identity
        self.description = description
    }

    package var owner: Owner {
        switch identity {
        case .internet(let address): .site(address.site)
        case .unix(let user, _): .user(user)
        case .unknown: .unknown
        }
    }

    /// Of a connected socket.
    init(of socket: Int32) {
        let (host, port) = SocketName.numeric(socket, getpeername)
        if let address = SocketName.address(socket, getpeername) {
            self.init(.internet(address), description: "\(SocketName.bracketed(host)):\(port)")
        } else if let credentials = Self.credentials(of: socket) {
            self.init(
                .unix(
                    user: credentials.user,
                    groups: [credentials.group] + Self.supplementaryGroups(of: socket)),
                description: "pid \(credentials.process) uid \(credentials.user)")
        } else {
            self.init(.unknown, description: "unknown")
        }
    }

    /// struct ucred.
    private static func credentials(
        of socket: Int32
    ) -> (process: UInt32, user: UInt32, group: UInt32)? {
        var credentials: (process: UInt32, user: UInt32, group: UInt32) = (0, 0, 0)
        var length = socklen_t(MemoryLayout.size(ofValue: credentials))
        guard SocketName.family(of: socket) == AF_UNIX,
            getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0
        else { return nil }
        return credentials
    }

    private static func supplementaryGroups(of socket: Int32) -> [UInt32] {
        var groups = [UInt32](repeating: 0, count: 64)
        while true {
            var length = socklen_t(groups.count * MemoryLayout<UInt32>.size)
            if getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, &groups, &length) == 0 {
                return Array(groups.prefix(Int(length) / MemoryLayout<UInt32>.size))
            }
            let needed = Int(length) / MemoryLayout<UInt32>.size
            guard errno == ERANGE, needed > groups.count else { return [] }
            groups = [UInt32](repeating: 0, count: needed)
        }
    }
}
