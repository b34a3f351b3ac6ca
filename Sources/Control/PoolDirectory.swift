// A pool on disk: a directory that names two devices, `metadata` and `data`, each a file (data:
// sparse) or a symbolic link to a block device or file. Beside them, while a server runs, its sockets.
// Nothing else of a pool is outside of its devices.

import BlockIO
import Glibc

/// The paths of a pool. That it exists is what `locate` says.
public struct PoolDirectory: Sendable, Equatable {
    public let path: String

    /// Does not look at the file system.
    public init(path: String) { self.path = path }

    public var metadataPath: String { inside("metadata") }
    public var dataPath: String { inside("data") }
    /// Where a running server answers management verbs.
    public var controlSocketPath: String { inside(Self.controlSocketName) }
    /// Where a server listens if nobody says otherwise.
    public var nbdSocketPath: String { inside("nbd.sock") }

    static let controlSocketName = "wafer.sock"

    func inside(_ name: String) -> String { path.hasSuffix("/") ? path + name : "\(path)/\(name)" }

    /// The same name from every directory. Links in it are kept: /dev/disk/by-id outlives /dev/sdX.
    static func absolute(_ path: String) -> String {
        guard !path.hasPrefix("/"), let current = getcwd(nil, 0) else { return path }
        defer { free(current) }
        return String(cString: current) + "/" + path
    }

    /// Finds an existing pool: both devices are there and are two different ones.
    public static func locate(_ path: String) throws(ControlError) -> PoolDirectory {
        let directory = PoolDirectory(path: path)
        try directory.requireDirectory()
        let metadata = try directory.device("metadata")
        let data = try directory.device("data")
        switch (metadata, data) {
        case (nil, nil):
            throw ControlError(
                .notAPool,
                "\(path) is not a pool: it has neither \"metadata\" nor \"data\"; "
                    + "make one with \"wafer pool create\"")
        case (nil, _): throw directory.halfMade(missing: "metadata", present: "data")
        case (_, nil): throw directory.halfMade(missing: "data", present: "metadata")
        case (.some(let metadata), .some(let data)):
            guard metadata != data else {
                throw ControlError(
                    .notAPool,
                    "\(path) is not a pool: its \"metadata\" and \"data\" are the same device")
            }
        }
        return directory
    }

    private func requireDirectory() throws(ControlError) {
        var status = stat()
        guard stat(path, &status) == 0 else {
            let code = errno
            if code == ENOENT {
                throw ControlError(
                    .notAPool, "there is no pool \(path): make it with \"wafer pool create\"")
            }
            throw ControlError(cannot: "open", path, code)
        }
        guard status.st_mode & S_IFMT == S_IFDIR else {
            throw ControlError(.notAPool, "\(path) is not a pool: a pool is a directory")
        }
    }

    /// The device behind a name of the directory; nil if the name is not there.
    private func device(_ name: String) throws(ControlError) -> DeviceIdentity? {
        let path = inside(name)
        var status = stat()
        guard lstat(path, &status) == 0 else {
            let code = errno
            if code == ENOENT { return nil }
            throw ControlError(cannot: "open", path, code)
        }
        if status.st_mode & S_IFMT == S_IFLNK {
            let target = Self.linkTarget(path)
            guard stat(path, &status) == 0 else {
                let code = errno
                guard code == ENOENT || code == ELOOP else {
                    throw ControlError(cannot: "open", path, code)
                }
                throw ControlError(
                    .notAPool,
                    "\(path) is a link to \(target), which is not there: attach that device, or "
                        + "let the link point to where it is now")
            }
        }
        return DeviceIdentity(status)
    }

    private func halfMade(missing: String, present: String) -> ControlError {
        ControlError(
            .notAPool,
            "\(path) is only half a pool: it has \"\(present)\" but no \"\(missing)\"; put the "
                + "missing file or link back, or remove the rest and create the pool anew")
    }

    static func linkTarget(_ path: String) -> String {
        withUnsafeTemporaryAllocation(of: CChar.self, capacity: Int(PATH_MAX)) { buffer in
            let count = readlink(path, buffer.baseAddress!, buffer.count)
            guard count >= 0 else { return "?" }
            return String(
                decoding: UnsafeRawBufferPointer(start: buffer.baseAddress!, count: count),
                as: UTF8.self)
        }
    }
}

/// Which file or block device something is, under whatever name.
struct DeviceIdentity: Equatable {
    private let device: UInt64
    private let file: UInt64
    let isBlockDevice: Bool

    init(_ status: stat) {
        isBlockDevice = status.st_mode & S_IFMT == S_IFBLK
        device = isBlockDevice ? UInt64(status.st_rdev) : UInt64(status.st_dev)
        file = isBlockDevice ? 0 : UInt64(status.st_ino)
    }

    init?(path: String) {
        var status = stat()
        guard stat(path, &status) == 0 else { return nil }
        self.init(status)
    }
}
