// The process that takes the server's place: the same program file, as it is by then, with the same
// arguments, in the same process. Sockets stay open across it; what is to be known of them is in a
// file in memory, whose descriptor an environment variable names.
//
// 1. The program is run once, for its version, before anything is given up for it.
// 2. Only the descriptors that are handed over lose their close-on-exec.

import BlockIO
import CLinux
import FoundationEssentials
import Glibc
import NBDServer

public struct Successor {
    private let program: String
    private let arguments: [String]
    private static let variable = "WAFER_HANDOVER"
    /// Milliseconds that the program has to say its version.
    private static let patience = 10_000
    private static let pause: UInt32 = 5

    /// - Note: early, while the path still leads to the program that runs.
    public init() {
        var path = [CChar](repeating: 0, count: Int(PATH_MAX))
        let length = readlink("/proc/self/exe", &path, path.count - 1)
        program = length > 0 ? String(cString: path) : CommandLine.arguments[0]
        arguments = CommandLine.arguments
    }

    /// What the process that was here before has left, if there was one. Call it before there are
    /// threads: it takes the variable out of the environment.
    public static func inherited() throws(ControlError) -> HandOver? {
        guard let text = getenv(variable).map({ String(cString: $0) }) else { return nil }
        unsetenv(variable)
        guard let descriptor = Int32(text) else {
            throw ControlError(.device, "\(variable) is \"\(text)\", not a descriptor")
        }
        defer { close(descriptor) }
        do {
            let handOver = try JSONDecoder().decode(HandOver.self, from: contents(descriptor))
            for each in handOver.descriptors { _ = fcntl(each, F_SETFD, FD_CLOEXEC) }
            return handOver
        } catch {
            throw ControlError(
                .device, "what the server before has left in \(variable) cannot be read: \(error)")
        }
    }

    /// Why the program cannot take over; nil: it can be run.
    public func check() -> String? {
        var child = pid_t()
        let command = [program, "--version"]
        var pointers = command.map { strdup($0) } + [nil]
        defer { for pointer in pointers { free(pointer) } }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0)
        let code = posix_spawn(&child, program, &actions, nil, &pointers, environ)
        guard code == 0 else { return "\(program): \(SystemError.words(code))" }
        let deadline = monotonicMilliseconds() + Self.patience
        var status: Int32 = 0
        while true {
            switch waitpid(child, &status, WNOHANG) {
            case child: return status == 0 ? nil : "\(program) --version fails"
            case 0 where monotonicMilliseconds() < deadline: sleepMilliseconds(Self.pause)
            case 0:
                kill(child, SIGKILL)
                waitpid(child, &status, 0)
                return "\(program) --version does not end"
            default:
                guard errno == EINTR else { return "\(program): \(SystemError.words(errno))" }
            }
        }
    }

    /// Becomes the program. Returns only if that fails; then the connections are lost.
    public func takeOver(_ handOver: HandOver) -> ControlError {
        do {
            let descriptor = clinux_memory_file("wafer-handover")
            guard descriptor >= 0 else {
                return failure(SystemError.words(-descriptor))
            }
            try write([UInt8](JSONEncoder().encode(handOver)), to: descriptor)
            for each in handOver.descriptors { _ = fcntl(each, F_SETFD, 0) }
            setenv(Self.variable, "\(descriptor)", 1)
        } catch {
            return failure("\(error)")
        }
        var pointers = arguments.map { strdup($0) } + [nil]
        execv(program, &pointers)
        return failure(SystemError.words(errno))
    }

    private func failure(_ reason: String) -> ControlError {
        ControlError(
            .device, "\(program) cannot take over: \(reason); start the server, clients reconnect")
    }

    // MARK: - The file in memory

    private static func contents(_ descriptor: Int32) throws -> Data {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw systemError(errno) }
        var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
        let count = pread(descriptor, &bytes, bytes.count, 0)
        guard count == bytes.count else { throw systemError(count < 0 ? errno : EIO) }
        return Data(bytes)
    }

    private func write(_ bytes: [UInt8], to descriptor: Int32) throws {
        var written = 0
        while written < bytes.count {
            let count = bytes.withUnsafeBytes {
                pwrite(descriptor, $0.baseAddress! + written, bytes.count - written, off_t(written))
            }
            guard count > 0 else { throw Self.systemError(errno) }
            written += count
        }
    }

    private static func systemError(_ code: Int32) -> ControlError {
        ControlError(.device, SystemError.words(code))
    }
}
