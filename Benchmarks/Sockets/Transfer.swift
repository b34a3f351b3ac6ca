// Whole messages over a blocking socket, for the handshake.

import Glibc

/// Sends all of it.
public func sendAll(_ bytes: [UInt8], to socket: Int32) throws(SocketFailure) {
    var sent = 0
    while sent < bytes.count {
        let count = bytes.withUnsafeBytes {
            send(socket, $0.baseAddress! + sent, bytes.count - sent, Int32(MSG_NOSIGNAL))
        }
        if count < 0 && errno == EINTR { continue }
        guard count > 0 else { throw SocketFailure("cannot send") }
        sent += count
    }
}

/// Receives exactly `count` bytes.
public func receive(_ count: Int, from socket: Int32) throws(SocketFailure) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var received = 0
    while received < count {
        let result = bytes.withUnsafeMutableBytes {
            recv(socket, $0.baseAddress! + received, count - received, 0)
        }
        if result < 0 && errno == EINTR { continue }
        guard result != 0 else { throw SocketFailure(reason: "the other end hung up") }
        guard result > 0 else { throw SocketFailure("cannot receive") }
        received += result
    }
    return bytes
}
