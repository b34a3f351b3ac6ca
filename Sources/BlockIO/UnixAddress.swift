// The address of a Unix socket: a path, or an abstract name.

import Glibc

public struct UnixAddress {
    private var name = sockaddr_un()
    private let length: socklen_t

    /// Bytes of the longest path.
    public static let longestPath = MemoryLayout.size(ofValue: sockaddr_un().sun_path) - 1

    /// nil: the path is empty, too long, or has a zero byte.
    public init?(path: String) {
        self.init(path.utf8, ends: true)
    }

    /// `name` is what stands behind the "@" by which people write such a name; nil: too long.
    public init?(abstract name: String) {
        self.init("\0\(name)".utf8, ends: false)
    }

    /// - Parameter ends: with a zero byte, as paths do; an abstract name ends where the address does.
    private init?(_ bytes: String.UTF8View, ends: Bool) {
        guard !bytes.isEmpty, bytes.count <= Self.longestPath, !ends || !bytes.contains(0) else {
            return nil
        }
        name.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &name.sun_path) { $0.copyBytes(from: bytes) }
        let start = MemoryLayout<sockaddr_un>.offset(of: \.sun_path)!
        length = socklen_t(start + bytes.count + (ends ? 1 : 0))
    }

    /// Gives the address to `bind`, `connect` or `sendto`.
    public func use<Result>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Result) -> Result {
        withUnsafePointer(to: name) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, length) }
        }
    }
}
