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
        // A reader that goes away is an error of its write, not the end of the process.
        signal(SIGPIPE, SIG_IGN)
        do {
            var command = try Wafer.parseAsRoot()
            try command.run()
        } catch let error as ControlError {
            complain(error.message)
            exit(failed)
        } catch {
            Wafer.exit(withError: error)
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
}

struct VolumeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "volume",
        abstract: "Make, list, snapshot, set and delete the volumes of a pool.",
        subcommands: [
            VolumeCreate.self, VolumeList.self, VolumeSnapshot.self, VolumeSet.self,
            VolumeDelete.self, VolumeAdopt.self,
        ])
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
