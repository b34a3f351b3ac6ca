// What can go wrong with a pool's metadata, in words a pool's owner can act on.

import BlockIO

public enum MetadataError: Error, Equatable, CustomStringConvertible {
    /// The metadata device itself failed.
    case device(DeviceError)
    /// A block is not what its place in the metadata says it has to be.
    case corrupt(block: MetadataBlock, String)
    /// Block 0 is no dm-thin superblock: foreign, damaged, short or blank.
    case notAPool(path: String, String)
    /// A dm-thin pool, or a request for one, that this code must not touch.
    case unsupported(path: String, String)
    /// Too few allocatable metadata blocks. Thrown before anything was changed; blocks freed since
    /// the last durable commit come back with the next one.
    case outOfMetadataSpace
    case deviceExists(ThinDeviceID)
    case noSuchDevice(ThinDeviceID)
    /// One more snapshot would overflow the 24 bits that a mapping has for its time.
    case tooManySnapshots
    /// The superblock asks for an offline check; until then the metadata may not change.
    case needsCheck(path: String)

    public var description: String {
        switch self {
        case .device(let error):
            return error.description
        case .corrupt(let block, let what):
            return "metadata block \(block.rawValue) is damaged: \(what)"
        case .notAPool(let path, let what):
            return "\(path) does not hold a thin pool: \(what)"
        case .unsupported(let path, let what):
            return "\(path): \(what)"
        case .outOfMetadataSpace:
            return "the pool's metadata device is full; grow it, or delete volumes"
        case .deviceExists(let id):
            return "thin device \(id.rawValue) exists already"
        case .noSuchDevice(let id):
            return "there is no thin device \(id.rawValue)"
        case .tooManySnapshots:
            return "the pool has used up its 16,777,215 snapshots; copy it to a new pool"
        case .needsCheck(let path):
            return "\(path) is marked as needing a check; "
                + "run thin_check, then wafer pool check --clear-needs-check"
        }
    }
}
