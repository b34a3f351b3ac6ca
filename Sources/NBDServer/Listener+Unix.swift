// Listening on Unix sockets.
//
// 1. A socket left over by a server that is gone is removed, but only after a connection to it has
//    been refused, and under a lock on its directory: of two servers that find it one listens, and
//    the other is told so.
// 2. Nobody can connect before the socket has its owner and mode: it listens last.
// 3. A socket that this server made is removed when it stops.

import BlockIO
import Glibc

/// Mode and owner of Unix sockets. Connecting takes the permission to write.
public struct UnixAccess: Sendable {
    public var mode: UInt32 = 0o600
    /// Nil: as the system has it for new files.
    public var user: UInt32?
    public var group: UInt32?

    public init() {}
}

extension Listener {
    static func unix(path: String, access: UnixAccess) throws(ServerError) -> Listener {
        let operation = "listen on \(path)"
        guard let address = UnixAddress(path: path) else {
            throw ServerError(
                operation: operation, code: ENAMETOOLONG,
                reason: "a Unix socket's path has 1 to \(UnixAddress.longestPath) bytes; "
                    + "give a shorter one")
        }

        let lock = lockDirectory(of: path)
        defer { if let lock { Glibc.close(lock) } }
        let descriptor = try newSocket(AF_UNIX, operation)
        do throws(ServerError) {
            // The file takes this from the socket, as far as the umask lets it.
            _ = fchmod(descriptor, mode_t(access.mode))
            var code = bind(descriptor, to: address)
            if code == EADDRINUSE {
                try removeStale(path, address, operation)
                code = bind(descriptor, to: address)
            }
            guard code == 0 else { throw unixError(operation, code) }
            var status = stat()
            guard lstat(path, &status) == 0 else {
                throw ServerError(operation: operation, code: errno)
            }
            do throws(ServerError) {
                try apply(access, to: path, operation)
                try listen(descriptor, operation)
            } catch {
                unlink(path)
                throw error
            }
            return Listener(
                descriptor: descriptor,
                kind: .unix(path: path, device: status.st_dev, inode: status.st_ino),
                uri: unixURI(path))
        } catch {
            Glibc.close(descriptor)
            throw error
        }
    }

    static func unixURI(_ path: String) -> String { "nbd+unix:///?socket=\(percentEncoded(path))" }

    /// Removes the socket at `path` if it is the one that was bound there.
    static func remove(_ path: String, _ device: dev_t, _ inode: ino_t) {
        let lock = lockDirectory(of: path)
        defer { if let lock { Glibc.close(lock) } }
        var status = stat()
        if lstat(path, &status) == 0, status.st_dev == device, status.st_ino == inode {
            unlink(path)
        }
    }

    private static func apply(
        _ access: UnixAccess, to path: String, _ operation: String
    ) throws(ServerError) {
        if access.user != nil || access.group != nil {
            // -1 leaves one as it is.
            guard lchown(path, access.user ?? .max, access.group ?? .max) == 0 else {
                let code = errno
                throw ServerError(
                    operation: operation, code: code,
                    reason: code == EPERM
                        ? "only root may give a socket to another user, or to a group not its own"
                        : SystemError.words(code))
            }
        }
        guard chmod(path, mode_t(access.mode)) == 0 else {
            throw ServerError(operation: operation, code: errno)
        }
    }

    /// Milliseconds to wait for another server that is just starting here. Anybody who may read the
    /// directory can hold its lock for ever, so it is done without after that.
    private static let lockPatience = 2000
    private static let lockPause = 5

    /// The lock is held until the descriptor is closed. Nil: it cannot be had.
    private static func lockDirectory(of path: String) -> Int32? {
        var directory = "."
        if let slash = path.lastIndex(of: "/") { directory = String(path[...slash]) }
        let descriptor = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard descriptor >= 0 else { return nil }
        for _ in 0..<lockPatience / lockPause {
            if flock(descriptor, LOCK_EX | LOCK_NB) == 0 { return descriptor }
            guard errno == EWOULDBLOCK || errno == EINTR else { break }
            usleep(UInt32(lockPause) * 1000)
        }
        Glibc.close(descriptor)
        return nil
    }

    /// Removes a socket that nobody listens on.
    private static func removeStale(
        _ path: String, _ address: UnixAddress, _ operation: String
    ) throws(ServerError) {
        var status = stat()
        guard lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else {
            throw ServerError(
                operation: operation, code: EADDRINUSE,
                reason: "something that is not a socket is there; remove it or give another path")
        }
        let probe = try newSocket(AF_UNIX, operation)
        defer { Glibc.close(probe) }
        // A listener that accepts nobody is one, too, and must not be waited for.
        _ = fcntl(probe, F_SETFL, O_NONBLOCK)
        let code = address.use { connect(probe, $0, $1) == 0 ? 0 : errno }
        guard code == ECONNREFUSED else {
            throw ServerError(
                operation: operation, code: EADDRINUSE,
                reason: code == 0 || code == EAGAIN
                    ? "another server listens there; stop it or give another path"
                    : "the socket there cannot be reached (\(SystemError.words(code)))")
        }
        unlink(path)
    }

    private static func unixError(_ operation: String, _ code: Int32) -> ServerError {
        let reason =
            switch code {
            case ENOENT, ENOTDIR: "its directory does not exist"
            case EACCES, EPERM: "permission denied; check the directory's owner and mode"
            case EROFS: "the file system is read-only"
            default: SystemError.words(code)
            }
        return ServerError(operation: operation, code: code, reason: reason)
    }

    /// 0 or an errno.
    private static func bind(_ descriptor: Int32, to address: UnixAddress) -> Int32 {
        address.use { Glibc.bind(descriptor, $0, $1) == 0 ? 0 : errno }
    }

    /// For the query of a URI.
    private static func percentEncoded(_ path: String) -> String {
        let plain = Set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/".utf8)
        let digits = Array("0123456789ABCDEF")
        return path.utf8.reduce(into: "") { result, byte in
            if plain.contains(byte) {
                result.append(Character(UnicodeScalar(byte)))
            } else {
                result += "%\(digits[Int(byte >> 4)])\(digits[Int(byte & 15)])"
            }
        }
    }
}
