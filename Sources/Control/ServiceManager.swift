// Tells a service manager how far the server is, as systemd wants it from Type=notify services
// (sd_notify(3)): one datagram for each message, to the socket that NOTIFY_SOCKET names.

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
        var name = sockaddr_un()
        name.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(address.utf8)
        let isAbstract = bytes.first == UInt8(ascii: "@")
        guard isAbstract || bytes.first == UInt8(ascii: "/"),
            bytes.count < MemoryLayout.size(ofValue: name.sun_path)
        else { return "\(Self.variable) is \"\(address)\", not a socket's path or abstract name" }
        withUnsafeMutableBytes(of: &name.sun_path) { path in
            path.copyBytes(from: bytes)
            if isAbstract { path[0] = 0 }
        }
        // An abstract name ends where the address does.
        let length = MemoryLayout<sockaddr_un>.offset(of: \.sun_path)! + bytes.count
        let socket = Glibc.socket(
            AF_UNIX, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard socket >= 0 else { return String(cString: strerror(errno)) }
        defer { close(socket) }
        let text = message.rawValue
        let sent = withUnsafePointer(to: &name) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                sendto(
                    socket, text, text.utf8.count, Int32(MSG_NOSIGNAL), $0,
                    socklen_t(isAbstract ? length : length + 1))
            }
        }
        return sent == text.utf8.count ? nil : "\(address): \(String(cString: strerror(errno)))"
    }
}
