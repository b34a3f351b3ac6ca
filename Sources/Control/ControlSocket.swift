// Unix stream sockets for the control protocol: lines in and out, none of it without a deadline.

import BlockIO
import Glibc

/// One end of a connection. Used by one thread at a time, but for `shutDown`.
final class ControlSocket: @unchecked Sendable {
    let descriptor: Int32
    private var received: [UInt8] = []

    /// Takes over the descriptor.
    init(descriptor: Int32) { self.descriptor = descriptor }

    deinit { close(descriptor) }

    /// Wakes whoever reads or writes here, with an error or the end. From any thread.
    func shutDown() { shutdown(descriptor, Int32(SHUT_RDWR)) }

    /// Whether there is room for what is sent next: the other side reads.
    var isWritable: Bool { wait(POLLOUT, until: monotonicMilliseconds() + 1) }

    /// The next line, without its end; nil if the other side has ended, or nothing came in time.
    func readLine(limit: Int, milliseconds: Int) -> [UInt8]? {
        let deadline = monotonicMilliseconds() + milliseconds
        var searched = 0
        while true {
            if let end = received[searched...].firstIndex(of: UInt8(ascii: "\n")) {
                let line = Array(received[..<end])
                received.removeFirst(end + 1)
                return line
            }
            searched = received.count
            guard received.count < limit, wait(POLLIN, until: deadline), receive() else {
                return nil
            }
        }
    }

    /// False if the other side has ended or does not take it in time.
    func write(_ bytes: [UInt8], milliseconds: Int) -> Bool {
        let deadline = monotonicMilliseconds() + milliseconds
        var sent = 0
        while sent < bytes.count {
            let count = bytes.withUnsafeBytes {
                send(
                    descriptor, $0.baseAddress! + sent, $0.count - sent,
                    Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
            }
            if count > 0 {
                sent += count
            } else if errno == EAGAIN {
                guard wait(POLLOUT, until: deadline) else { return false }
            } else if errno != EINTR {
                return false
            }
        }
        return true
    }

    private func receive() -> Bool {
        withUnsafeTemporaryAllocation(byteCount: 16 << 10, alignment: 1) { buffer in
            let count = recv(
                descriptor, buffer.baseAddress, buffer.count, Int32(MSG_DONTWAIT))
            if count < 0 { return errno == EAGAIN || errno == EINTR }
            received.append(contentsOf: buffer[..<count])
            return count > 0
        }
    }

    private func wait(_ events: Int32, until deadline: Int) -> Bool {
        while true {
            let left = deadline - monotonicMilliseconds()
            guard left > 0 else { return false }
            var state = pollfd(fd: descriptor, events: Int16(events), revents: 0)
            let count = poll(&state, 1, Int32(min(left, 60_000)))
            if count > 0 { return true }
            if count < 0 && errno != EINTR { return false }
        }
    }
}

/// A socket's place in a directory. Sockets have short paths (107 bytes), directories need not:
/// the address goes by the directory's descriptor.
final class SocketPlace {
    private let directory: Int32
    /// For messages.
    let path: String
    private let name: String

    init(_ pool: PoolDirectory, _ name: String) throws(ControlError) {
        directory = open(pool.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard directory >= 0 else { throw ControlError(cannot: "open", pool.path, errno) }
        path = pool.inside(name)
        self.name = name
    }

    deinit { close(directory) }

    /// 0 or an errno.
    func connect(_ descriptor: Int32) -> Int32 { call(descriptor, Glibc.connect) }
    func bind(_ descriptor: Int32) -> Int32 { call(descriptor, Glibc.bind) }
    func remove() { unlinkat(directory, name, 0) }

    /// What is there, if anything; itself, not what it links to.
    func status() -> stat? {
        var status = stat()
        return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0 ? status : nil
    }

    static func newSocket() throws(ControlError) -> Int32 {
        let descriptor = socket(
            AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw ControlError(cannot: "make", "a socket", errno) }
        return descriptor
    }

    private func call(
        _ descriptor: Int32, _ operation: (Int32, UnsafePointer<sockaddr>, socklen_t) -> Int32
    ) -> Int32 {
        guard let address = UnixAddress(path: "/proc/self/fd/\(directory)/\(name)") else {
            return ENAMETOOLONG
        }
        return address.use { operation(descriptor, $0, $1) == 0 ? 0 : errno }
    }
}
