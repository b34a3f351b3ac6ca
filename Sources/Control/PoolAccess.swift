// How a command comes to a pool: through its server if one runs, else to the devices themselves.

public enum PoolAccess {
    /// Opens a pool for a verb.
    ///
    /// - Parameter changing: the verb changes the pool; otherwise nothing is written.
    public static func open(_ path: String, changing: Bool) throws(ControlError)
        -> any PoolManager
    {
        let directory = try PoolDirectory.locate(path)
        return try directory.whileBusy { () throws(ControlError) -> any PoolManager in
            if let remote = try RemotePool.connect(directory) { return remote }
            return try LocalPool(directory, purpose: changing ? .change : .inspect)
        }
    }

    /// Checks a pool, which need not be fit to be opened.
    public static func check(
        _ path: String, clearNeedsCheck: Bool, progress: (CheckAdvance) -> Void
    ) throws(ControlError) -> CheckResult {
        let directory = try PoolDirectory.locate(path)
        var server: RemotePool?
        let result = try directory.whileBusy { () throws(ControlError) -> CheckResult? in
            server = try RemotePool.connect(directory)
            guard server == nil else { return nil }
            return try PoolCheck.checkOffline(
                directory, clearNeedsCheck: clearNeedsCheck, progress: progress)
        }
        guard let server else { return result! }
        if clearNeedsCheck {
            throw ControlError(
                .busy, "\(path) is being served: stop its server before needs_check is taken back")
        }
        return try server.check(progress: progress)
    }
}

extension PoolDirectory {
    /// Milliseconds for which a pool that is locked, and that no server answers for, is tried
    /// again: its server may be starting or ending, or another command is at work.
    private static let patience = 5000
    private static let pause: UInt32 = 50

    /// Tries until nobody else has the devices, or for as long as that is worth while.
    func whileBusy<Result>(_ attempt: () throws(ControlError) -> Result) throws(ControlError)
        -> Result
    {
        var waited = 0
        while true {
            do throws(ControlError) { return try attempt() } catch {
                guard error.kind == .busy else { throw error }
                guard waited < Self.patience else { throw inUse(error) }
            }
            sleepMilliseconds(Self.pause)
            waited += Int(Self.pause)
        }
    }

    /// Says who has the devices, and what to do.
    func inUse(_ error: ControlError) -> ControlError {
        guard let holder = LockHolder.of(metadataPath) ?? LockHolder.of(dataPath) else {
            return error
        }
        return ControlError(
            .busy,
            "\(path) is in use by process \(holder), and no server answers on "
                + "\(controlSocketPath): wait until it ends, or stop it")
    }
}
