// Who may connect: rules in order, the first that fits a client decides.
//
// 1. What a rule compares are numbers (addresses, users, groups), never text.
// 2. A client that no rule fits is let in if no rule lets anybody in by name, and refused if one
//    does: whoever lists friends means that the others are none.

import Glibc

public struct AccessRule: Hashable, Sendable {
    public enum Decision: Hashable, Sendable {
        case allow
        /// Allowed to read, whatever the volume allows.
        case allowReadOnly
        case deny
    }

    enum Subject: Hashable, Sendable {
        case anybody
        case addresses(IPAddress.Range)
        case unix
        case tcp
        case user(UInt32)
        case group(UInt32)
    }

    public let decision: Decision
    let subject: Subject

    /// `any`, `unix`, `tcp`, `uid:USER`, `gid:GROUP`, an address or a range of addresses. Names of
    /// users and groups are looked up here, once.
    public init(_ decision: Decision, _ text: String) throws(AccessRuleError) {
        self.decision = decision
        if let user = Self.rest(of: text, behind: "uid:") {
            subject = .user(try UserNames.user(user))
        } else if let group = Self.rest(of: text, behind: "gid:") {
            subject = .group(try UserNames.group(group))
        } else {
            switch text {
            case "any": subject = .anybody
            case "unix": subject = .unix
            case "tcp": subject = .tcp
            default: subject = .addresses(try Self.addresses(text))
            }
        }
    }

    func fits(_ client: Peer.Identity) -> Bool {
        switch (subject, client) {
        case (.anybody, _): true
        case (.unix, .unix), (.tcp, .internet): true
        case (.addresses(let range), .internet(let address)): range.contains(address)
        case (.user(let wanted), .unix(let user, _)): wanted == user
        case (.group(let wanted), .unix(_, let groups)): groups.contains(wanted)
        default: false
        }
    }

    private static func rest(of text: String, behind prefix: String) -> String? {
        text.hasPrefix(prefix) ? String(text.dropFirst(prefix.count)) : nil
    }

    private static func addresses(_ text: String) throws(AccessRuleError) -> IPAddress.Range {
        do throws(IPAddress.Range.Failure) { return try IPAddress.Range(parsing: text) } catch {
            switch error {
            case .notAnAddress:
                throw AccessRuleError(
                    """
                    "\(text)" is none of any, unix, tcp, uid:USER, gid:GROUP, ADDRESS and \
                    ADDRESS/PREFIX
                    """)
            case .badPrefix(let most):
                throw AccessRuleError("\"\(text)\": behind the slash is a number from 0 to \(most)")
            case .stray(let prefix):
                throw AccessRuleError(
                    """
                    "\(text)": the address has more than \(prefix) bits; give its first address, or \
                    a longer prefix
                    """)
            }
        }
    }
}

public struct AccessRuleError: Error, Equatable, CustomStringConvertible, Sendable {
    public let description: String
    init(_ description: String) { self.description = description }
}

extension [AccessRule] {
    /// What becomes of a client.
    package func decision(for client: Peer.Identity) -> AccessRule.Decision {
        if let rule = first(where: { $0.fits(client) }) { return rule.decision }
        return contains { $0.decision != .deny } ? .deny : .allow
    }
}

/// Users and groups by name or number.
public enum UserNames {
    public static func user(_ text: String) throws(AccessRuleError) -> UInt32 {
        try number(text, "user") { getpwnam($0)?.pointee.pw_uid }
    }

    public static func group(_ text: String) throws(AccessRuleError) -> UInt32 {
        try number(text, "group") { getgrnam($0)?.pointee.gr_gid }
    }

    /// Figures are the number that they are, even where somebody's name looks like it. The highest
    /// stands for "nobody" in system calls, and is nobody's.
    private static func number(
        _ text: String, _ kind: String, lookUp: (String) -> UInt32?
    ) throws(AccessRuleError) -> UInt32 {
        let isFigures = text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")) ~= $0 }
        if !text.isEmpty, let number = isFigures ? UInt32(text) : lookUp(text), number != .max {
            return number
        }
        throw AccessRuleError("there is no \(kind) \"\(text)\"")
    }
}
