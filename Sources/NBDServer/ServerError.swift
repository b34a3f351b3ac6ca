// Why a server cannot start, in words for its operator.

import Glibc

public struct ServerError: Error, Equatable, CustomStringConvertible, Sendable {
    /// The operation, as a verb with its object: "listen on /run/nbd.sock".
    public var operation: String
    /// The errno, or 0 where `reason` says it all.
    public var code: Int32
    public var reason: String

    public init(operation: String, code: Int32, reason: String) {
        self.operation = operation
        self.code = code
        self.reason = reason
    }

    init(operation: String, code: Int32) {
        self.init(operation: operation, code: code, reason: Self.words(code))
    }

    public var description: String { "cannot \(operation): \(reason)" }

    /// The system's words for an errno, beginning in lower case.
    static func words(_ code: Int32) -> String {
        let text = String(cString: strerror(code))
        return text.prefix(1).lowercased() + text.dropFirst()
    }
}
