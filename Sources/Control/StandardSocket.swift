// A client that comes as the standard input, from whoever started the server: libnbd's command
// transport, inetd.

import Glibc
import NBDServer

public enum StandardSocket {
    private static let firstFree: Int32 = 3

    /// The connected socket. Standard input and output are nothing any more afterwards, nor is
    /// standard error if it was the socket, too: nobody writes text between replies.
    public static func take() throws(ControlError) -> Int32 {
        guard SocketName.option(STDIN_FILENO, SO_TYPE) == Int32(SOCK_STREAM.rawValue) else {
            throw ControlError(
                .device,
                """
                standard input is not a stream socket, which --stdio serves: let a \
                program start it that gives it one (nbd_connect_command), or use --unix
                """)
        }
        var peer = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        let isConnected = withUnsafeMutablePointer(to: &peer) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                getpeername(STDIN_FILENO, $0, &length) == 0
            }
        }
        guard isConnected else {
            throw ControlError(
                .device, "standard input is a socket that is not connected (inetd: use nowait)")
        }
        let socket = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, firstFree)
        let nothing = open("/dev/null", O_RDWR | O_CLOEXEC)
        let isErrorOutput = isSameFile(STDIN_FILENO, STDERR_FILENO)
        guard socket >= 0, nothing >= 0, dup2(nothing, STDIN_FILENO) >= 0,
            dup2(nothing, STDOUT_FILENO) >= 0,
            !isErrorOutput || dup2(nothing, STDERR_FILENO) >= 0
        else { throw ControlError(cannot: "take over", "standard input", errno) }
        close(nothing)
        // Receiving is to wait, whatever the one who made it wanted.
        _ = fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) & ~O_NONBLOCK)
        return socket
    }

    private static func isSameFile(_ one: Int32, _ other: Int32) -> Bool {
        var first = stat()
        var second = stat()
        return fstat(one, &first) == 0 && fstat(other, &second) == 0
            && first.st_dev == second.st_dev && first.st_ino == second.st_ino
    }
}
