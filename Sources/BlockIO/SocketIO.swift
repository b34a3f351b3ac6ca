// Socket I/O that does not wait. Results as an `IOQueue` delivers them: bytes, or -errno; -EAGAIN
// where it would have to wait.

import Glibc

enum SocketIO {
    private static let withoutWaiting = Int32(MSG_DONTWAIT)
    private static let withoutSignal = Int32(MSG_NOSIGNAL)

    static func send(_ fd: Int32, _ message: UnsafePointer<msghdr>) -> Int32 {
        while true {
            let result = sendmsg(fd, message, withoutWaiting | withoutSignal)
            if result >= 0 { return Int32(clamping: result) }
            if errno != EINTR { return -errno }
        }
    }

    static func receive(_ fd: Int32, into memory: UnsafeMutableRawPointer, length: Int) -> Int32 {
        while true {
            let result = recv(fd, memory, length, withoutWaiting)
            if result >= 0 { return Int32(clamping: result) }
            if errno != EINTR { return -errno }
        }
    }
}
