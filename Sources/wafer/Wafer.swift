// The command: parses, runs, and turns every failure into one line and an exit status.

import ArgumentParser
import Control
import Glibc

/// Exit status 0: done; 1: it failed, one line on standard error says what, where and what to do;
/// 64: wrong usage.
@main
enum Main {
    private static let failed: Int32 = 1

    static func main() {
        guard openStandardDescriptors() else { exit(failed) }
        // A reader that goes away, or a file that must not grow, is an error of a write, not the end
        // of the process.
        signal(SIGPIPE, SIG_IGN)
        signal(SIGXFSZ, SIG_IGN)
        var status = run()
        if let problem = Output.finish(), status == EXIT_SUCCESS {
            complain(problem)
            status = failed
        }
        exit(status)
    }

    private static func run() -> Int32 {
        do {
            try checkEncoding()
            try checkHelp()
            var command = try Wafer.parseAsRoot()
            try command.run()
            return EXIT_SUCCESS
        } catch let error as ControlError {
            complain(error.message)
            return failed
        } catch {
            let status = Wafer.exitCode(for: error)
            let text = Wafer.fullMessage(for: error, columns: nil)
            if status.isSuccess { print(text) } else { Output.error("\(text)\n") }
            return status.rawValue
        }
    }

    /// What is opened next must not become the standard output: the pool would get all that is said.
    private static func openStandardDescriptors() -> Bool {
        for descriptor in STDIN_FILENO...STDERR_FILENO where fcntl(descriptor, F_GETFD) < 0 {
            // The lowest that is free.
            guard open("/dev/null", O_RDWR) == descriptor else { return false }
        }
        return true
    }

    /// Bytes that are not UTF-8 would become others: another file's name.
    private static func checkEncoding() throws {
        for (index, argument) in CommandLine.arguments.enumerated() {
            guard let bytes = CommandLine.unsafeArgv[index] else { continue }
            if String(validatingCString: bytes) == nil {
                throw ValidationError("\"\(argument)\" is not UTF-8")
            }
        }
    }

    /// The parser's own command "help" passes over names that it does not know.
    private static func checkHelp() throws {
        let words = CommandLine.arguments.dropFirst()
        guard words.first == "help" else { return }
        var command: any ParsableCommand.Type = Wafer.self
        for word in words.dropFirst() where !word.hasPrefix("-") {
            let next = command.configuration.subcommands.first {
                $0.configuration.commandName == word
            }
            guard let next else { throw ValidationError("there is no command \"\(word)\"") }
            command = next
        }
    }

    static func complain(_ message: String) {
        let line = message.split(whereSeparator: \.isNewline).joined(separator: " ")
        fflush(nil)
        Output.error("wafer: \(line)\n")
    }
}

struct Wafer: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "wafer",
        abstract: "A network block device server with thin provisioning and snapshots.",
        discussion: """
            A pool is a directory. While it is being served, the other commands go through its \
            server; otherwise they open it themselves.

            Sizes are whole numbers with KiB, MiB, GiB, TiB or PiB (or K, M, G, T, P), which are \
            powers of two; plain numbers are bytes.
            """,
        version: waferVersion,
        subcommands: [PoolCommand.self, VolumeCommand.self, ServeCommand.self])
}

struct PoolCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pool", abstract: "Make, look at, check and enlarge pools.",
        subcommands: [PoolCreate.self, PoolShow.self, PoolCheckCommand.self, PoolGrow.self])

    func run() throws { throw ValidationError("what to do with a pool is missing") }
}

struct VolumeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "volume",
        abstract: "Make, list, snapshot, set and delete the volumes of a pool.",
        subcommands: [
            VolumeCreate.self, VolumeList.self, VolumeSnapshot.self, VolumeSet.self,
            VolumeDelete.self, VolumeAdopt.self,
        ])

    func run() throws { throw ValidationError("what to do with a volume is missing") }
}

struct PoolArgument: ParsableArguments {
    @Argument(help: ArgumentHelp("The pool's directory.", valueName: "pool"))
    var path: String

    func validate() throws {
        if path.isEmpty { throw ValidationError("the pool's directory is empty") }
    }
}

/// For `transform:` of sizes.
@Sendable func size(_ text: String) throws -> ByteSize {
    do { return try ByteSize(parsing: text) } catch { throw ValidationError("\(error)") }
}
