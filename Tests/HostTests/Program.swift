// Programs that a test starts, and the directory that it works in.
//
// 1. A test ends only what it started, by its process id, and waits for it; if the test run itself
//    is ended, the watchdog does.
// 2. Its standard streams are files; what a test opens is closed on exec.

import Foundation
import Synchronization
import Testing

/// How a program ended.
struct Outcome: CustomStringConvertible {
    /// Exit status, or 128 and the signal.
    var status: Int32
    var output: String
    var error: String

    var description: String { "status \(status), output: \(output), error: \(error)" }
}

struct Failure: Error, CustomStringConvertible {
    var description: String
    init(_ description: String) { self.description = description }
}

/// A directory that goes away with the value.
final class Scratch: Sendable {
    let path: String
    private let files = Atomic<Int>(0)

    init(in parent: String = "/tmp") throws {
        var template = Array("\(parent)/wafer-host-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw Failure("mkdtemp: \(errno)") }
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit { try? FileManager.default.removeItem(atPath: path) }

    func file(_ name: String) -> String { "\(path)/\(name)" }

    /// A name that no other file of this directory has.
    func newFile(_ suffix: String) -> String {
        file("\(files.wrappingAdd(1, ordering: .relaxed).newValue).\(suffix)")
    }
}

/// A program under way.
final class Program: @unchecked Sendable {
    let pid: pid_t
    private let outputPath: String
    private let errorPath: String
    private let ended = Mutex<Int32?>(nil)

    /// Beside the program that runs these tests, unless WAFER_PROGRAM says otherwise.
    static let wafer =
        ProcessInfo.processInfo.environment["WAFER_PROGRAM"] ?? beside("wafer")

    /// A program that was built with these tests.
    static func beside(_ name: String) -> String {
        let own = URL(filePath: "/proc/self/exe").resolvingSymlinksInPath()
        return own.deletingLastPathComponent().appending(path: name).path
    }

    /// Where a tool of the system is; nil: it is not installed.
    static func find(_ name: String) -> String? {
        ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map { "\($0)/\(name)" }
            .first { access($0, X_OK) == 0 }
    }

    /// - Parameters:
    ///   - input: its standard input and output; nil: none, and a file.
    ///   - inherited: what it gets as descriptors 3, 4 and so on.
    init(
        _ program: String, _ arguments: [String], in scratch: Scratch,
        environment extra: [String: String] = [:], input: Int32? = nil, inherited: [Int32] = []
    ) throws {
        outputPath = scratch.newFile("out")
        errorPath = scratch.newFile("err")
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        let flags = O_WRONLY | O_CREAT | O_TRUNC
        posix_spawn_file_actions_addopen(&actions, 1, outputPath, flags, 0o600)
        posix_spawn_file_actions_addopen(&actions, 2, errorPath, flags, 0o600)
        // Out of the way first, so that none is overwritten before it is passed on.
        let passed = ([input].compactMap { $0 } + inherited).map { fcntl($0, F_DUPFD_CLOEXEC, 64) }
        defer { for descriptor in passed { close(descriptor) } }
        if input != nil {
            posix_spawn_file_actions_adddup2(&actions, passed[0], 0)
            posix_spawn_file_actions_adddup2(&actions, passed[0], 1)
        }
        for (index, descriptor) in passed.suffix(inherited.count).enumerated() {
            posix_spawn_file_actions_adddup2(&actions, descriptor, Int32(3 + index))
        }

        var environment = ProcessInfo.processInfo.environment
        environment.merge(extra) { $1 }
        var argv = ([program] + arguments).map { strdup($0) }
        var envp = environment.map { strdup("\($0.key)=\($0.value)") }
        defer { for string in argv + envp { free(string) } }
        argv.append(nil)
        envp.append(nil)
        let watchdog = Watchdog.shared
        var pid = pid_t()
        let code = posix_spawn(&pid, program, &actions, nil, argv, envp)
        guard code == 0 else { throw Failure("cannot start \(program): \(code)") }
        self.pid = pid
        watchdog.started(pid)
    }

    deinit {
        if isRunning {
            signal(SIGKILL)
            _ = wait()
        }
    }

    var output: String { (try? String(contentsOfFile: outputPath, encoding: .utf8)) ?? "" }
    var error: String { (try? String(contentsOfFile: errorPath, encoding: .utf8)) ?? "" }

    /// Sends a signal, unless the program has been waited for.
    func signal(_ number: Int32) {
        ended.withLock { if $0 == nil { kill(pid, number) } }
    }

    var isRunning: Bool { status(options: WNOHANG) == nil }

    /// Its end; a program that takes longer than `seconds` is killed.
    func wait(seconds: Double = 120) -> Outcome {
        let end = Date(timeIntervalSinceNow: seconds)
        var pause: UInt32 = 500
        while true {
            if let status = status(options: WNOHANG) {
                return Outcome(status: status, output: output, error: error)
            }
            if Date() > end { signal(SIGKILL) }
            usleep(pause)
            pause = min(pause * 2, 10_000)
        }
    }

    private func status(options: Int32) -> Int32? {
        ended.withLock { ended in
            if let ended { return ended }
            var status: Int32 = 0
            var info = siginfo_t()
            guard waitid(P_PID, id_t(pid), &info, WEXITED | WNOWAIT | options) == 0,
                info.si_signo == SIGCHLD
            else { return nil }
            Watchdog.shared.ending(pid)
            guard waitpid(pid, &status, 0) == pid else { return nil }
            ended = status & 0x7f == 0 ? status >> 8 & 0xff : 128 + (status & 0x7f)
            return ended
        }
    }

    /// Runs a tool of the system to its end.
    static func run(
        _ name: String, _ arguments: [String], in scratch: Scratch, seconds: Double = 120
    ) throws -> Outcome {
        let path = name.hasPrefix("/") ? name : find(name)
        let program = try #require(path, "\(name) is missing: run Scripts/setup")
        return try Program(program, arguments, in: scratch).wait(seconds: seconds)
    }
}

/// Tries until it is true, or the seconds are over.
func eventually(within seconds: Double = 10, _ condition: () throws -> Bool) rethrows -> Bool {
    let end = Date(timeIntervalSinceNow: seconds)
    while true {
        if try condition() { return true }
        if Date() > end { return false }
        usleep(5000)
    }
}

/// Runs the body on threads of its own, one for each index, and waits for all. An error of one is
/// thrown once all have ended.
func onThreads(_ count: Int, _ body: @escaping @Sendable (Int) throws -> Void) throws {
    let workers = Workers(count, body)
    try workers.join()
}

/// Threads under way.
final class Workers: Sendable {
    private let group = DispatchGroup()
    private let failures = Mutex<[any Error]>([])

    init(_ count: Int, _ body: @escaping @Sendable (Int) throws -> Void) {
        for index in 0..<count {
            group.enter()
            let thread = Thread { [group, self] in
                do { try body(index) } catch { failures.withLock { $0.append(error) } }
                group.leave()
            }
            thread.stackSize = 1 << 20
            thread.start()
        }
    }

    func join() throws {
        group.wait()
        if let failure = failures.withLock({ $0.first }) { throw failure }
    }
}
