// Sockets that a service manager made and handed over, as systemd does (sd_listen_fds(3)).
//
//   LISTEN_PID      whom they are for; another's are not touched
//   LISTEN_FDS      how many there are, from descriptor 3 on
//   LISTEN_FDNAMES  their names, separated by colons

import Glibc

public enum SocketActivation {
    private static let firstDescriptor: Int32 = 3
    /// More than anybody hands over: what follows is a mistake.
    private static let mostDescriptors: Int32 = 1024
    /// The last is of newer systemds, which say more precisely who this process is.
    private static let variables = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"]

    /// The sockets, which programs that are started from here do not inherit. The second time there
    /// are none. Call it before there are threads: it changes the environment.
    public static func takeSockets() throws(ControlError) -> [Int32] {
        let environment = variables.map { name in getenv(name).map { String(cString: $0) } }
        for name in variables { unsetenv(name) }
        guard let process = environment[0], process == String(getpid()),
            let count = environment[1]
        else { return [] }
        guard let number = Int32(count), (0...mostDescriptors).contains(number) else {
            throw ControlError(.device, "LISTEN_FDS is \"\(count)\", not a number of sockets")
        }
        let names = (environment[2] ?? "").split(separator: ":", omittingEmptySubsequences: false)
        return try (0..<number).map { index throws(ControlError) in
            let descriptor = firstDescriptor + index
            guard fcntl(descriptor, F_SETFD, FD_CLOEXEC) == 0 else {
                let name = Int(index) < names.count ? " (\(names[Int(index)]))" : ""
                throw ControlError(
                    .device,
                    "LISTEN_FDS is \(number), but descriptor \(descriptor)\(name) is not open")
            }
            return descriptor
        }
    }
}
