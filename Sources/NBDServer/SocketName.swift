// Names of sockets: addresses and ports in figures, paths, families.

import Glibc

package enum SocketName {
    /// getsockname or getpeername.
    typealias Call = (
        Int32, UnsafeMutablePointer<sockaddr>?, UnsafeMutablePointer<socklen_t>?
    ) -> Int32

    /// -1: it is not a socket.
    static func family(of socket: Int32) -> Int32 { option(socket, SO_DOMAIN) ?? -1 }

    /// One of the socket's options that are numbers; nil: it has none such, or is no socket.
    package static func option(_ socket: Int32, _ name: Int32) -> Int32? {
        var value: Int32 = 0
        var length = socklen_t(MemoryLayout<Int32>.size)
        return getsockopt(socket, SOL_SOCKET, name, &value, &length) == 0 ? value : nil
    }

    static func address(_ socket: Int32, _ call: Call) -> IPAddress? {
        with(socket, call) { name, _ in
            switch Int32(name.load(as: sockaddr.self).sa_family) {
            case AF_INET: IPAddress(name.load(as: sockaddr_in.self).sin_addr)
            case AF_INET6: IPAddress(name.load(as: sockaddr_in6.self).sin6_addr)
            default: nil
            }
        }
    }

    /// Address and port in figures; "" if it is not an Internet socket.
    static func numeric(_ socket: Int32, _ call: Call) -> (host: String, port: String) {
        with(socket, call) { name, length in
            let address = name.assumingMemoryBound(to: sockaddr.self)
            guard [AF_INET, AF_INET6].contains(Int32(address.pointee.sa_family)) else { return nil }
            var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
            var port = [CChar](repeating: 0, count: Int(NI_MAXSERV))
            let flags = NI_NUMERICHOST | NI_NUMERICSERV
            guard
                getnameinfo(
                    address, length, &host, socklen_t(host.count), &port, socklen_t(port.count),
                    flags) == 0
            else { return nil }
            return (text(host), text(port))
        } ?? ("", "")
    }

    /// The path that a Unix socket is bound to; an abstract name begins with "@".
    static func path(_ socket: Int32) -> String? {
        with(socket, getsockname) { name, length in
            let start = MemoryLayout<sockaddr_un>.offset(of: \.sun_path)!
            guard Int32(name.load(as: sockaddr.self).sa_family) == AF_UNIX, Int(length) > start
            else { return nil }
            let bytes = UnsafeRawBufferPointer(start: name + start, count: Int(length) - start)
            if bytes[0] == 0 { return "@" + String(decoding: bytes.dropFirst(), as: UTF8.self) }
            return String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        }
    }

    static func bracketed(_ host: String) -> String {
        host.contains(":") && !host.hasPrefix("[") ? "[\(host)]" : host
    }

    private static func with<Value>(
        _ socket: Int32, _ call: Call, _ body: (UnsafeMutableRawPointer, socklen_t) -> Value?
    ) -> Value? {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        return withUnsafeMutableBytes(of: &storage) { storage in
            let name = storage.baseAddress!
            guard call(socket, name.assumingMemoryBound(to: sockaddr.self), &length) == 0 else {
                return nil
            }
            return body(name, length)
        }
    }

    private static func text(_ characters: [CChar]) -> String {
        String(decoding: characters.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self)
    }
}
