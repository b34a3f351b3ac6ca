// What is set of connected sockets, and asked of them.

import Glibc

enum SocketSettings {
    /// Bytes of replies that the kernel takes before the client has read any: several of 128 KiB.
    /// A quarter more 128 KiB reads a second than with Linux's 208 KiB.
    private static let sendBuffer: Int32 = 512 << 10
    /// Probes without an answer after which a TCP client is gone, and how much shorter the time
    /// between them is than the time before the first: two such times in all.
    private static let probes: Int32 = 6

    /// Failures are not serious: the connection works without.
    static func prepare(_ socket: Int32, keepAliveSeconds: Int?) {
        guard SocketName.family(of: socket) != AF_UNIX else {
            // TCP sizes its own. Beyond net.core.wmem_max, where we may.
            if !set(socket, SOL_SOCKET, SO_SNDBUFFORCE, sendBuffer) {
                set(socket, SOL_SOCKET, SO_SNDBUF, sendBuffer)
            }
            return
        }
        let tcp = Int32(IPPROTO_TCP)
        set(socket, tcp, TCP_NODELAY, 1)
        guard let keepAliveSeconds else { return }
        let idle = Int32(clamping: keepAliveSeconds)
        set(socket, SOL_SOCKET, SO_KEEPALIVE, 1)
        set(socket, tcp, TCP_KEEPIDLE, idle)
        set(socket, tcp, TCP_KEEPINTVL, max(idle / probes, 1))
        set(socket, tcp, TCP_KEEPCNT, probes)
    }

    /// Nobody can receive any more what is sent. TCP cannot tell.
    static func isClosed(_ socket: Int32) -> Bool {
        var state = pollfd(fd: socket, events: 0, revents: 0)
        return poll(&state, 1, 0) > 0 && state.revents & Int16(POLLHUP | POLLERR) != 0
    }

    @discardableResult
    private static func set(
        _ socket: Int32, _ level: Int32, _ option: Int32, _ value: Int32
    ) -> Bool {
        var value = value
        return setsockopt(socket, level, option, &value, socklen_t(MemoryLayout<Int32>.size)) == 0
    }
}
