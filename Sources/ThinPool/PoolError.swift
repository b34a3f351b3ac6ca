// What a management verb or the opening of a pool can fail with: one sentence that says what
// happened and what to do.

import BlockIO
import ThinMetadata

public struct PoolError: Error, Equatable, CustomStringConvertible, Sendable {
    public enum Kind: String, Sendable, Codable {
        case exists, noSuchVolume, invalidName, invalidSize, invalidDescription, inUse, readOnly
        case outOfSpace, tooManyVolumes, changesTooFast, failed, notAPool, device, metadata
    }
    public var kind: Kind
    public var message: String

    public init(_ kind: Kind, _ message: String) {
        self.kind = kind
        self.message = message
    }

    init(_ error: DeviceError) {
        self.init(.device, error.description)
    }

    init(_ error: MetadataError) {
        switch error {
        case .outOfMetadataSpace: self.init(.outOfSpace, error.description)
        case .device: self.init(.device, error.description)
        case .notAPool: self.init(.notAPool, error.description)
        default: self.init(.metadata, error.description)
        }
    }

    public var description: String { message }
}
