// The management verbs, whoever has the pool open.

import ThinPool

/// What can be asked of a pool. Each call blocks until it is answered; a change is durable then.
public protocol PoolManager: AnyObject {
    /// For messages: whether a server does the work.
    var isRemote: Bool { get }
    func status() throws(ControlError) -> PoolStatus
    func volumes() throws(ControlError) -> [VolumeInfo]
    func change(_ change: PoolChange) throws(ControlError)
}

/// A change of the pool's volumes that a person can ask for.
public enum PoolChange: Codable, Sendable, Equatable {
    case create(name: String, size: UInt64, description: String? = nil)
    case snapshot(
        origin: String, name: String, readOnly: Bool? = nil, description: String? = nil)
    case set(name: String, readOnly: Bool?, description: String?)
    case delete(name: String)
    case adopt(id: UInt32, name: String, size: UInt64)

    var volumeChange: VolumeChange {
        switch self {
        case .create(let name, let size, let description):
            .create(name: name, size: size, description: description)
        case .snapshot(let origin, let name, let readOnly, let description):
            .snapshot(
                origin: origin, name: name, readOnly: readOnly ?? false, description: description)
        case .set(let name, let readOnly, let description):
            .set(name: name, readOnly: readOnly, description: description)
        case .delete(let name): .delete(name: name)
        case .adopt(let id, let name, let size): .adopt(id: id, name: name, size: size)
        }
    }
}

/// How far a check has come.
public struct CheckAdvance: Codable, Sendable, Equatable {
    /// What is being looked at, in words.
    public var phase: String
    public var blocksRead: UInt64
    public var blocksExpected: UInt64
}

/// What a check found.
public struct CheckResult: Codable, Sendable, Equatable {
    /// In words, the worst first; possibly cut short.
    public var findings: [String]
    /// All of them.
    public var findingCount: Int
    /// "leak", "suspicious" or "damage"; nil if there is nothing.
    public var worst: String?
    public var devices: Int
    public var mappings: UInt64
    public var metadataBlocksUsed: UInt64
    public var dataBlocksUsed: UInt64
    public var needsCheck: Bool

    public var isClean: Bool { findingCount == 0 }
}

/// Opens a pool for a verb: through its server if one runs, else the devices themselves.
public enum PoolAccess {
    /// Milliseconds for which a pool that is locked, and that no server answers for, is tried
    /// again: its server may be starting or ending, or another command is at work.
    private static let patience = 5000
    private static let pause: UInt32 = 50

    /// - Parameter changing: the verb changes the pool; otherwise nothing is written.
    public static func open(_ path: String, changing: Bool) throws(ControlError)
        -> any PoolManager
    {
        let directory = try PoolDirectory.locate(path)
        var waited = 0
        while true {
            if let remote = try RemotePool.connect(directory) { return remote }
            do throws(ControlError) {
                return try LocalPool(directory, purpose: changing ? .change : .inspect)
            } catch {
                guard error.kind == .busy else { throw error }
                guard waited < patience else { throw busy(directory, error) }
            }
            sleepMilliseconds(pause)
            waited += Int(pause)
        }
    }

    /// Checks a pool, which need not be fit to be opened.
    public static func check(
        _ path: String, clearNeedsCheck: Bool, progress: (CheckAdvance) -> Void
    ) throws(ControlError) -> CheckResult {
        let directory = try PoolDirectory.locate(path)
        var waited = 0
        while true {
            if let remote = try RemotePool.connect(directory) {
                if clearNeedsCheck {
                    throw ControlError(
                        .busy,
                        "\(path) is being served: stop its server before needs_check is taken back")
                }
                return try remote.check(progress: progress)
            }
            do throws(ControlError) {
                return try PoolCheck.checkOffline(
                    directory, clearNeedsCheck: clearNeedsCheck, progress: progress)
            } catch {
                guard error.kind == .busy else { throw error }
                guard waited < patience else { throw busy(directory, error) }
            }
            sleepMilliseconds(pause)
            waited += Int(pause)
        }
    }

    /// Says who has the devices, and what to do.
    static func busy(_ directory: PoolDirectory, _ error: ControlError) -> ControlError {
        let holder =
            LockHolder.of(directory.metadataPath) ?? LockHolder.of(directory.dataPath)
        guard let holder else { return error }
        return ControlError(
            .busy,
            "\(directory.path) is in use by process \(holder), and no server answers on "
                + "\(directory.controlSocketPath): wait until it ends, or stop it")
    }
}
