// TCP connections that have ended in order, until their clients have noticed.
//
// When a socket is closed in which there are bytes that nobody received, Linux resets the
// connection and forgets what it was still to send: the last replies would be lost to a client that
// had said anything more, be it TLS's goodbye. So at first only the server's direction is ended, and
// what the client still says is received and thrown away until it has ended its own.
//
// 1. All that is held is a socket: no volume, no payload. What is received goes into one piece of
//    memory for all, which nobody reads.
// 2. It ends in time: at a deadline, and when the server stops as soon as the client's machine has
//    everything.
// 3. A socket is given back for closing, once, when nothing is outstanding on it.

import BlockIO
import Glibc

final class Farewells {
    private struct Farewell {
        let session: Admission.Session
        /// A tick of the reactor's.
        let deadline: UInt64
        let usesKernelTLS: Bool
        var isOver = false
    }

    private let queue: any IOQueue
    private let scratch = UnsafeMutableRawPointer.allocate(
        byteCount: scratchSize, alignment: 64)
    private var farewells: [Int32: Farewell] = [:]

    private static let scratchSize = 64 << 10

    init(queue: any IOQueue) { self.queue = queue }

    deinit { scratch.deallocate() }

    var isEmpty: Bool { farewells.isEmpty }

    /// Whether there is any point in it. Closing a Unix socket takes nothing from its other end.
    static func isFor(_ socket: Int32) -> Bool { SocketName.family(of: socket) != AF_UNIX }

    /// Everything has been sent on the socket, and nothing is outstanding on it.
    func begin(
        _ socket: Int32, _ session: Admission.Session, deadline: UInt64, usesKernelTLS: Bool
    ) {
        shutdown(socket, Int32(SHUT_WR))
        farewells[socket] = Farewell(
            session: session, deadline: deadline, usesKernelTLS: usesKernelTLS)
        receive(socket)
    }

    private func receive(_ socket: Int32) {
        queue.receive(
            socket, into: scratch, length: Self.scratchSize,
            tag: Tag(.farewell, index: Int(socket)).rawValue)
    }

    /// - Returns: whose socket is to be closed now, if it is.
    func received(_ result: Int32, on socket: Int32) -> Admission.Session? {
        let farewell = farewells[socket]!
        if result > 0 && !farewell.isOver {
            receive(socket)
            return nil
        }
        // What is no data is in the socket until it is asked for.
        if result < 0 && farewell.usesKernelTLS { _ = KernelTLS.explain(-result, on: socket) }
        farewells[socket] = nil
        return farewell.session
    }

    /// Ends those whose time has come.
    func watch(tick: UInt64, stopDeadline: UInt64?) {
        for (socket, farewell) in farewells {
            let isStopping = stopDeadline.map { tick >= $0 || Self.hasEverything(socket) } ?? false
            if isStopping || tick >= farewell.deadline { end(socket) }
        }
    }

    /// Others came for whom there is no room.
    func displace(_ session: Admission.Session) {
        for (socket, farewell) in farewells where farewell.session == session { end(socket) }
    }

    private func end(_ socket: Int32) {
        farewells[socket]!.isOver = true
        shutdown(socket, Int32(SHUT_RDWR))
    }

    /// The client's machine has acknowledged all that was sent.
    static func hasEverything(_ socket: Int32) -> Bool {
        var unacknowledged: Int32 = 0
        return ioctl(socket, UInt(TIOCOUTQ), &unacknowledged) == 0 && unacknowledged == 0
    }
}
