// Why a server cannot start, in words for its operator.

import BlockIO

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
        self.init(operation: operation, code: code, reason: SystemError.words(code))
    }

    public var description: String { "cannot \(operation): \(reason)" }
}
