// wafer serve: in the foreground until SIGTERM or SIGINT.
//
// Signals are blocked before the first thread starts and waited for here, so that no handler ever
// interrupts the data path.

import ArgumentParser
import BlockIO
import Control
import Glibc
import Logging
import ThinPool

struct ServeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "serve",
        abstract: "Serve every volume of a pool as the NBD export of its name.",
        discussion: """
            Without --unix, --listen, --stdio and sockets from systemd the socket is nbd.sock in the \
            pool's directory. SIGTERM, SIGINT or SIGHUP: answer what was begun, commit, end. The same \
            once more: end at once. SIGUSR2: restart in place, keeping all clients.

            Of --allow, --allow-read-only and --deny the first whose rule fits a client decides. A \
            client that none fits may connect, unless there is an --allow or --allow-read-only. \
            Rules: any; unix, tcp; an address or range (10.0.0.0/8, fd00::/8); uid:USER, \
            gid:GROUP (by name or number, who connects to a Unix socket).
            """)

    @OptionGroup var pool: PoolArgument
    @OptionGroup(title: "Ways In") var listening: ListenOptions
    @OptionGroup(title: "Who May Connect") var access: AccessOptions
    @OptionGroup(title: "Limits") var limits: LimitOptions
    @Option(
        help: ArgumentHelp("Threads that serve (default: one a CPU, at most 8).", valueName: "n"))
    var reactors: Int?
    @Flag(help: "Change nothing, neither volumes nor metadata.")
    var readOnly = false
    @Option(
        help: ArgumentHelp(
            "What clients get that name no export (default: the only volume, if it is one).",
            valueName: "name"))
    var defaultExport: String?
    @Flag(help: "End when the process that started the server does.")
    var exitWithParent = false
    @Option(
        help: ArgumentHelp("Keep the process id in this file.", valueName: "path"),
        transform: PIDFile.init(path:))
    var pidFile: PIDFile?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "Memory for the map of blocks (default: an eighth of the machine's, at most 320MiB).",
            valueName: "size"),
        transform: size)
    var cacheSize: ByteSize?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "Seconds between a change and its commit, if no client flushes.", valueName: "seconds"))
    var commitInterval = Double(PoolOptions().commitInterval) / 1e9
    @Option(help: ArgumentHelp("I/O engine: auto, uring or poll.", valueName: "engine"))
    var io = IOChoice.auto
    @OptionGroup(title: "TLS") var tls: TLSArguments
    @Option(
        help: ArgumentHelp(
            "trace, debug, info, notice, warning, error or critical (default: info).",
            valueName: "level"), transform: Self.level)
    var logLevel: Logger.Level?

    private static let maxReactors = 256
    private static let defaultMaxReactors = 8
    private static let cacheBytes: ClosedRange<UInt64> = 8 << 20...1 << 40

    func validate() throws {
        if let reactors, !(1...Self.maxReactors).contains(reactors) {
            throw ValidationError("--reactors is from 1 to \(Self.maxReactors)")
        }
        if !(0.01...60).contains(commitInterval) {
            throw ValidationError("--commit-interval is from 0.01 to 60 seconds")
        }
        if let cacheSize, !Self.cacheBytes.contains(cacheSize.bytes) {
            throw ValidationError("--cache-size is from 8MiB to 1TiB")
        }
    }

    func run() throws {
        var signals = Self.blockSignals(isStandardSocket: listening.stdio)
        if exitWithParent { try ParentProcess.endWithIt() }
        let level = logLevel ?? .info
        LoggingSystem.bootstrap { label in
            var handler = StreamLogHandler.standardError(label: label)
            handler.logLevel = level
            return handler
        }
        let logger = Logger(label: "wafer")
        let successor = Successor()
        let manager = ServiceManager()
        func tell(_ message: ServiceManager.Message) {
            if let problem = manager.tell(message) {
                logger.warning("the service manager was not told \(message.rawValue): \(problem)")
            }
        }
        var options = try options()
        options.listening.inherited = try Successor.inherited()
        let server = try PoolServer(pool.path, options, logger: logger)
        let uris = try server.start()
        do {
            try pidFile?.write()
        } catch {
            guard options.listening.inherited != nil else {
                try? server.stop()
                throw error
            }
            logger.warning("\(error)")
        }
        if let inherited = options.listening.inherited {
            logger.info("took over", metadata: ["clients": "\(inherited.clientCount)"])
        } else if options.listening.sockets.isEmpty {
            for uri in uris { print("listening on \(uri)") }
            fflush(nil)
        } else {
            // Who handed them over knows, and may have given its own standard output along.
            for uri in uris { logger.info("listening on \(uri)") }
        }
        tell(.ready)

        var signal: Int32 = 0
        while sigwait(&signals, &signal) != 0 || signal == Self.restart {
            guard signal == Self.restart else { continue }
            if let problem = obstacle(to: successor, of: server, options) {
                logger.error("SIGUSR2: no restart: \(problem)")
                continue
            }
            logger.info("SIGUSR2: restarting in place")
            tell(.reloading)
            let handOver = try server.handOver()
            manager.stayInEnvironment()
            throw successor.takeOver(handOver)
        }
        logger.info("\(Self.reason(signal)): stopping")
        tell(.stopping)
        Self.endAtNextSignal(&signals)
        defer { pidFile?.remove() }
        try server.stop()
        logger.info("stopped: everything is committed")
    }

    /// Why nobody can take over, found before anything is given up; nil: somebody can.
    private func obstacle(
        to successor: Successor, of server: PoolServer, _ options: ServeOptions
    ) -> String? {
        if listening.stdio { return "there is only one client" }
        if server.hasFailed { return "the pool has failed: stop the server and check the pool" }
        do { try PoolServer.rehearse(pool.path, options) } catch { return "\(error)" }
        return successor.check()
    }

    private func options() throws -> ServeOptions {
        var options = ServeOptions()
        try listening.apply(to: &options.listening)
        options.listening.onConnectedEnd = { kill(getpid(), Self.lastClientGone) }
        options.rules = access.rules
        limits.apply(to: &options.limits)
        let processors = sysconf(Int32(_SC_NPROCESSORS_ONLN))
        options.reactors = reactors ?? min(max(processors, 1), Self.defaultMaxReactors)
        options.pool.allowRing = io != .poll
        options.requiresRing = io == .uring
        options.tls = tls.options
        options.defaultExport = defaultExport
        options.pool.readOnly = readOnly
        if let cacheSize { options.setCache(bytes: Int(cacheSize.bytes)) }
        options.pool.commitInterval = UInt64(commitInterval * 1e9)
        return options
    }

    @Sendable private static func level(_ text: String) throws -> Logger.Level {
        guard let level = Logger.Level(rawValue: text) else {
            throw ValidationError("there is no such level")
        }
        return level
    }

    // MARK: - Signals

    /// The server's word to the main thread that the client of --stdio has gone.
    private static let lastClientGone = SIGUSR1
    /// Another process of the same program takes over, with all clients.
    private static let restart = SIGUSR2

    private static func reason(_ signal: Int32) -> String {
        switch signal {
        case SIGINT: "SIGINT"
        case SIGHUP: "SIGHUP"
        case lastClientGone: "the client has gone"
        default: "SIGTERM"
        }
    }

    /// All threads started after this have them blocked, too.
    private static func blockSignals(isStandardSocket: Bool) -> sigset_t {
        var signals = sigset_t()
        sigemptyset(&signals)
        sigaddset(&signals, SIGTERM)
        sigaddset(&signals, SIGINT)
        sigaddset(&signals, SIGHUP)
        sigaddset(&signals, restart)
        if isStandardSocket { sigaddset(&signals, lastClientGone) }
        pthread_sigmask(SIG_BLOCK, &signals, nil)
        return signals
    }

    /// Whoever asks twice does not want to wait: what is not committed is lost, as by a power cut.
    private static func endAtNextSignal(_ signals: inout sigset_t) {
        for number in [SIGTERM, SIGINT, SIGHUP] { Glibc.signal(number) { _ in _exit(1) } }
        sigdelset(&signals, lastClientGone)
        sigdelset(&signals, restart)
        pthread_sigmask(SIG_UNBLOCK, &signals, nil)
    }
}

enum IOChoice: String, CaseIterable, ExpressibleByArgument {
    /// io_uring where the system has it.
    case auto
    /// io_uring or nothing.
    case uring
    /// poll and plain reads and writes.
    case poll
}
