// What a management verb fails with: one sentence that says what, where, and what to do.

import BlockIO
import Glibc
import ThinMetadata
import ThinPool

public struct ControlError: Error, Equatable, Codable, Sendable, CustomStringConvertible {
    public enum Kind: String, Codable, Sendable {
        /// The directory is not a pool, or only half of one.
        case notAPool
        /// Somebody else has the pool's devices.
        case busy
        /// A device, file or socket failed.
        case device
        /// The pool refused, or could not do, what was asked.
        case refused
        /// The other side of the control socket is gone, or says what nobody understands.
        case connection
    }
    public var kind: Kind
    public var message: String

    public init(_ kind: Kind, _ message: String) {
        self.kind = kind
        self.message = message
    }

    public init(_ error: DeviceError) {
        self.init(error.code == EBUSY ? .busy : .device, error.description)
    }

    public init(_ error: PoolError) {
        switch error.kind {
        case .device: self.init(.device, error.message)
        case .notAPool: self.init(.notAPool, error.message)
        default: self.init(.refused, error.message)
        }
    }

    init(_ error: MetadataError) {
        switch error {
        case .device(let error): self.init(error)
        case .notAPool: self.init(.notAPool, error.description)
        default: self.init(.refused, error.description)
        }
    }

    /// A system call that failed on a path.
    init(cannot operation: String, _ path: String, _ code: Int32, advice: String = "") {
        self.init(
            .device,
            "cannot \(operation) \(path): \(SystemError.words(code))"
                + (advice.isEmpty ? "" : "; \(advice)"))
    }

    public var description: String { message }
}
