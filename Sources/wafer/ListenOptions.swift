// The ways in to a server: `wafer serve`'s options for its sockets.

import ArgumentParser
import Control
import NBDServer

struct ListenOptions: ParsableArguments {
    @Option(
        parsing: .singleValue,
        help: ArgumentHelp("Listen on this Unix socket (repeatable).", valueName: "path"))
    var unix: [String] = []
    @Option(
        help: ArgumentHelp(
            "Mode of Unix sockets, octal; connecting takes the permission to write (default: 0600).",
            valueName: "mode"),
        transform: Self.mode)
    var unixMode: UInt32?
    @Option(
        help: ArgumentHelp("Owner of Unix sockets.", valueName: "user|user:group|:group"),
        transform: SocketOwner.init(parsing:))
    var unixOwner: SocketOwner?
    @Option(
        parsing: .singleValue,
        help: ArgumentHelp("Listen on this address (repeatable).", valueName: "host:port"),
        transform: Address.init(parsing:))
    var listen: [Address] = []
    @Flag(
        help: ArgumentHelp(
            "Serve the one client whose socket is the standard input, and end with it."))
    var stdio = false

    func validate() throws {
        if unix.contains("") { throw ValidationError("--unix needs a path, not an empty one") }
        for (index, path) in unix.enumerated() where unix[..<index].contains(path) {
            throw ValidationError("--unix \(path) is given twice")
        }
        if stdio && !(unix.isEmpty && listen.isEmpty) {
            throw ValidationError("--stdio serves one client and does not listen: leave the others")
        }
        if stdio && (unixMode != nil || unixOwner != nil) {
            throw ValidationError("--unix-mode and --unix-owner are for sockets to listen on")
        }
    }

    /// Takes over what the process has been given, too: once, before there are threads.
    func apply(to listening: inout Server.Listening) throws {
        let inherited = try SocketActivation.takeSockets()
        if !inherited.isEmpty {
            guard !stdio && unix.isEmpty && listen.isEmpty && unixMode == nil && unixOwner == nil
            else {
                throw ValidationError(
                    """
                    the service manager has handed over sockets (LISTEN_FDS): leave --unix, \
                    --unix-mode, --unix-owner, --listen and --stdio
                    """)
            }
        }
        listening.sockets = inherited
        listening.unixPaths = unix
        if let unixMode { listening.unixAccess.mode = unixMode }
        listening.unixAccess.user = unixOwner?.user
        listening.unixAccess.group = unixOwner?.group
        listening.tcpAddresses = listen.map { ($0.host, $0.port) }
        if stdio { listening.connectedSocket = try StandardSocket.take() }
    }

    private static let modes: ClosedRange<UInt32> = 0...0o777

    @Sendable private static func mode(_ text: String) throws -> UInt32 {
        let isOctal = text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "7")) ~= $0 }
        guard isOctal, let mode = UInt32(text, radix: 8), modes.contains(mode) else {
            throw ValidationError("\"\(text)\" is not a mode from 0 to 0777")
        }
        return mode
    }
}

/// USER, USER:GROUP or :GROUP, by name or number.
struct SocketOwner: Equatable {
    var user: UInt32?
    var group: UInt32?

    @Sendable init(parsing text: String) throws {
        let parts = text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
            .map(String.init)
        if !parts[0].isEmpty {
            user = try Self.number(parts[0], UserNames.user)
        }
        if parts.count == 2, !parts[1].isEmpty {
            group = try Self.number(parts[1], UserNames.group)
        }
        if user == nil && group == nil {
            throw ValidationError("an owner is USER, USER:GROUP or :GROUP, \"\(text)\" is not")
        }
    }

    private static func number(
        _ text: String, _ lookUp: (String) throws(AccessRuleError) -> UInt32
    ) throws -> UInt32 {
        do throws(AccessRuleError) { return try lookUp(text) } catch {
            throw ValidationError(error.description)
        }
    }
}

/// HOST:PORT; a host with colons stands in brackets, no host is every address.
struct Address: Equatable {
    var host: String
    var port: UInt16

    @Sendable init(parsing text: String) throws {
        guard let colon = text.lastIndex(of: ":"),
            let port = UInt16(text[text.index(after: colon)...])
        else {
            throw ValidationError("an address is HOST:PORT or [IPV6]:PORT, \"\(text)\" is not")
        }
        var host = String(text[..<colon])
        if host.hasPrefix("["), host.hasSuffix("]") {
            host = String(host.dropFirst().dropLast())
        } else if host.contains(":") {
            throw ValidationError(
                "\"\(text)\": an IPv6 address stands in brackets, as in [::1]:10809")
        }
        self.host = host
        self.port = port
    }
}
