// Tells a service manager how far the server is, as systemd wants it from Type=notify services
// (sd_notify(3)): one datagram for each message, to the socket that NOTIFY_SOCKET names.

import BlockIO
import Glibc

public final class ServiceManager: Sendable {
    public enum Message: String, Sendable {
        case ready = "READY=1"
        case stopping = "STOPPING=1"
        case reloading = "RELOADING=1"
    }

    /// Path, or "@" and an abstract name; nil: nobody wants to know.
    private let address: String?
    private static let variable = "NOTIFY_SOCKET"

    /// Call it before there are threads: it takes the variable out of the environment.
    public init() {
        address = getenv(Self.variable).map { String(cString: $0) }
        unsetenv(Self.variable)
    }

    /// For the program that takes this one's place.
    public func stayInEnvironment() {
        if let address { setenv(Self.variable, address, 1) }
    }

    /// - Returns: nil, or what went wrong: nothing that would keep the server from serving.
    public func tell(_ message: Message) -> String? {
        guard let address else { return nil }
        let name =
            switch address.first {
            case "/": UnixAddress(path: address)
            case "@": UnixAddress(abstract: String(address.dropFirst()))
            default: nil as UnixAddress?
            }
        guard let name else {
            return "\(Self.variable) is \"\(address)\", not a socket's path or abstract name"
        }
        let socket = Glibc.socket(
            AF_UNIX, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard socket >= 0 else { return SystemError.words(errno) }
        defer { close(socket) }
        let text = message.rawValue
        let sent = name.use {
            sendto(socket, text, text.utf8.count, Int32(MSG_NOSIGNAL), $0, $1)
        }
        return sent == text.utf8.count ? nil : "\(address): \(SystemError.words(errno))"
    }
}
