// A pool being served: its devices, the NBD server, the management socket, started and stopped in
// the order in which they need each other.
//
//     devices locked, pool open ──> control socket answers ──> NBD sockets accept
//     control socket closed ──> NBD drained ──> last commit ──> devices given up
//
// What the last commands are still waited for, clients do not notice.

import BlockIO
import Glibc
import Logging
import NBDServer
import ThinPool

/// `start`, `stop` and the release are one thread's.
public final class PoolServer {
    private let local: LocalPool
    private let control: ControlServer
    private let server: Server
    private let logger: Logger
    private var isStopped = false

    /// Descriptors that a reactor has beside its connections'.
    private static let filesOfReactor = 4
    /// What the pool, listeners, the management socket, its clients and a restart may have open.
    private static let otherFiles = 64

    /// Opens the pool. Call it on the main thread before there are others: they inherit what is
    /// set here for the process.
    public init(_ path: String, _ options: ServeOptions, logger: Logger) throws(ControlError) {
        self.logger = logger
        let directory = try PoolDirectory.locate(path)
        let tls = try options.tls.map { tls throws(ControlError) in
            try tls.configuration(logger)
        }
        Self.prepareProcess(logger)
        if options.requiresRing { try Self.requireRing() }
        var options = options
        options.limits.connections = Self.connectionLimit(options, logger)
        let local = try Self.open(directory, options, logger)
        self.local = local
        do throws(ControlError) {
            control = try ControlServer(local, logger: logger)
        } catch {
            try? local.close()
            throw error
        }
        var configuration = Self.configuration(directory, local, options)
        configuration.tls = tls
        let names = Set(local.pool.volumeNames())
        for name in tls?.requiredExports.subtracting(names).sorted() ?? [] {
            logger.warning("there is no volume \(name) yet, whose clients have to use TLS")
        }
        if let name = options.defaultExport, !names.contains(name) {
            logger.warning("there is no volume \(name) yet, the default export")
        }
        server = Server(pool: local.pool, configuration: configuration, logger: logger)
        describe(local)
    }

    /// Throws if another server could not start like this one now, as far as that can be told
    /// while this one has the pool open.
    public static func rehearse(_ path: String, _ options: ServeOptions) throws(ControlError) {
        _ = try PoolDirectory.locate(path)
        _ = try options.tls?.configuration(nil)
    }

    private static func configuration(
        _ directory: PoolDirectory, _ local: LocalPool, _ options: ServeOptions
    ) -> Server.Configuration {
        var configuration = Server.Configuration(dataFileDescriptor: local.data.fileDescriptor)
        configuration.dataInMemory = MemoryFile(local.data)
        configuration.dataIsRotational = local.data.isRotational
        configuration.listening = options.listening
        if options.listening.isEmpty {
            configuration.listening.unixPaths = [directory.nbdSocketPath]
        }
        configuration.listening.unixPaths = configuration.listening.unixPaths.map(socketPath)
        configuration.limits = options.limits
        configuration.rules = options.rules
        configuration.reactors = options.reactors
        configuration.readOnly = options.pool.readOnly
        configuration.defaultExport = options.defaultExport
        return configuration
    }

    /// A URI is of use everywhere if its path is absolute; but a socket's path is short.
    private static func socketPath(_ path: String) -> String {
        let absolute = PoolDirectory.absolute(path)
        return absolute.utf8.count <= UnixAddress.longestPath ? absolute : path
    }

    /// Accepts connections.
    ///
    /// - Returns: where, as NBD URIs.
    public func start() throws(ControlError) -> [String] {
        do throws(ControlError) {
            try control.start()
            do throws(ServerError) { return try server.start() } catch {
                throw ControlError(.device, error.description)
            }
        } catch {
            try? stop()
            throw error
        }
    }

    /// Answers what was begun, commits, and gives up the devices.
    public func stop() throws(ControlError) {
        guard !isStopped else { return }
        isStopped = true
        control.stop()
        server.stop()
        try local.close()
    }

    /// Who reads from a failed pool is served on, but there is nothing that a next server could open as
    /// this one has it.
    public var hasFailed: Bool { local.pool.hasFailed }

    /// The same, but clients and listening sockets are left to the next server.
    public func handOver() throws(ControlError) -> HandOver {
        precondition(!isStopped, "a stopped server has nothing to hand over")
        isStopped = true
        control.stop()
        let handOver = server.handOver()
        try local.close()
        return handOver
    }

    // MARK: - Opening

    private static func open(
        _ directory: PoolDirectory, _ options: ServeOptions, _ logger: Logger
    ) throws(ControlError) -> LocalPool {
        try directory.whileBusy { () throws(ControlError) in
            do throws(ControlError) {
                return try LocalPool(
                    directory, purpose: .change, options: options.pool, logger: logger)
            } catch {
                guard error.kind == .busy, try RemotePool.connect(directory) != nil else {
                    throw error
                }
                let holder = LockHolder.of(directory.metadataPath)
                throw ControlError(
                    .refused,
                    "\(directory.path) is being served already"
                        + (holder.map { " by process \($0)" } ?? "") + ": stop that server first")
            }
        }
    }

    private static func prepareProcess(_ logger: Logger) {
        logger.info("wafer \(waferVersion)")
        do throws(DeviceError) {
            try ProcessSettings.setIOFlusher()
            logger.info("marked as an I/O flusher: may serve the machine it runs on")
        } catch {
            logger.info("not marked as an I/O flusher: \(error.reason)")
        }
        guard mayLockMemory else {
            logger.info("memory is not locked: not root, and RLIMIT_MEMLOCK is limited")
            return
        }
        do throws(DeviceError) {
            try ProcessSettings.lockMemory()
            logger.info("memory is locked")
        } catch {
            logger.info("memory is not locked: \(error.reason)")
        }
    }

    private static func requireRing() throws(ControlError) {
        do throws(DeviceError) {
            guard let reason = try makeIOQueue(entries: 8).fallbackReason else { return }
            throw DeviceError(
                operation: "use", path: "io_uring", code: 0,
                reason: "\(reason); --io auto does without")
        } catch { throw ControlError(error) }
    }

    /// As many connections as there can be descriptors: those without one would wait for strangers
    /// to leave, whereas among those that are counted somebody gives way.
    private static func connectionLimit(_ options: ServeOptions, _ logger: Logger) -> Int {
        let files = Int(clamping: ProcessSettings.raiseFileLimit())
        let room = max(files - otherFiles - options.reactors * filesOfReactor, 1)
        guard room < options.limits.connections else { return options.limits.connections }
        logger.warning(
            """
            there will be no more than \(room) connections at once, because the limit of open \
            files is \(files): raise it (ulimit -Hn, LimitNOFILE=)
            """)
        return room
    }

    /// Locked memory that runs into a limit later would be worse than none.
    private static var mayLockMemory: Bool {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(__RLIMIT_MEMLOCK.rawValue), &limit) == 0 else {
            return false
        }
        return geteuid() == 0 || limit.rlim_cur == rlim_t.max
    }

    private func describe(_ local: LocalPool) {
        for (name, device) in [("metadata", local.metadata), ("data", local.data)] {
            let mode =
                device.isDirect
                ? "direct I/O" : "buffered I/O (\(device.directRefusal ?? "not asked for"))"
            logger.info("\(name): \(device.path), \(ByteSize(bytes: device.size)), \(mode)")
        }
        let status = local.pool.status()
        let used = ByteSize(bytes: status.dataBlocksUsed * status.blockSize)
        let size = ByteSize(bytes: status.dataBlocks * status.blockSize)
        logger.info(
            """
            pool \(local.directory.path): volumes: \(status.volumes), \(used) used of \(size)
            """)
        if let reason = status.reason { logger.warning("the pool is read-only: \(reason)") }
        for problem in status.problems { logger.warning("\(problem)") }
        if let shortage = local.shortage { logger.warning("\(shortage)") }
    }
}
