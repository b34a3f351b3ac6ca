// Ends the programs of a test run that was itself ended, and so waits for nobody any more.
//
// A shell knows the process ids of those that have not been waited for. Its standard input is a
// pipe whose other end only this process has: when that is at its end, so is the test run.

import Foundation
import Synchronization

final class Watchdog: Sendable {
    /// Made before the first program is started, so that none inherits the pipe.
    static let shared = Watchdog()

    private let pipe: Mutex<Int32>

    private static let script = """
        trap '' INT TERM HUP
        pids=' '
        while read -r verb pid; do
            case $verb in
                +) pids="$pids$pid " ;;
                -) pids="${pids%% $pid *} ${pids#* $pid }" ;;
            esac
        done
        for pid in $pids; do kill -KILL "$pid"; done
        """

    private init() {
        var ends: [Int32] = [-1, -1]
        precondition(Glibc.pipe(&ends) == 0, "no pipe: \(errno)")
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_adddup2(&actions, ends[0], 0)
        // Whoever reads what this run says is not to wait for the shell.
        posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0)
        posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0)
        var arguments = ["sh", "-c", Self.script].map { (string: String) in strdup(string) }
        var environment: [UnsafeMutablePointer<CChar>?] = [nil]
        defer { for string in arguments { free(string) } }
        arguments.append(nil)
        var pid = pid_t()
        let code = posix_spawn(&pid, "/bin/sh", &actions, nil, &arguments, &environment)
        precondition(code == 0, "no shell: \(code)")
        close(ends[0])
        pipe = Mutex(ends[1])
    }

    func started(_ pid: pid_t) { tell("+ \(pid)\n") }
    /// Called before the process id can be another's.
    func ending(_ pid: pid_t) { tell("- \(pid)\n") }

    private func tell(_ line: String) {
        pipe.withLock { pipe in _ = line.withCString { write(pipe, $0, strlen($0)) } }
    }
}
