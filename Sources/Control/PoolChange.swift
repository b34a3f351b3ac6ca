// The changes of a pool's volumes, as they are asked for.

import ThinPool

/// A change of the pool's volumes that a person can ask for.
public enum PoolChange: Codable, Sendable, Equatable {
    case create(name: String, size: UInt64, description: String? = nil)
    case snapshot(
        origin: String, name: String, readOnly: Bool? = nil, description: String? = nil)
    case set(name: String, readOnly: Bool?, description: String?)
    case delete(name: String)
    case adopt(id: UInt32, name: String, size: UInt64)

    var volumeChange: VolumeChange {
        switch self {
        case .create(let name, let size, let description):
            .create(name: name, size: size, description: description)
        case .snapshot(let origin, let name, let readOnly, let description):
            .snapshot(
                origin: origin, name: name, readOnly: readOnly ?? false, description: description)
        case .set(let name, let readOnly, let description):
            .set(name: name, readOnly: readOnly, description: description)
        case .delete(let name): .delete(name: name)
        case .adopt(let id, let name, let size): .adopt(id: id, name: name, size: size)
        }
    }
}

extension PoolChange {
    /// For the log.
    var words: String {
        switch self {
        case .create(let name, let size, _): "create volume \(name) of \(ByteSize(bytes: size))"
        case .snapshot(let origin, let name, let readOnly, _):
            "snapshot volume \(origin) as \(name)\(readOnly == true ? ", read-only" : "")"
        case .set(let name, let readOnly, let description):
            "set volume \(name)" + (readOnly.map { $0 ? " read-only" : " writable" } ?? "")
                + (description == nil ? "" : ", its description")
        case .delete(let name): "delete volume \(name)"
        case .adopt(let id, let name, let size):
            "adopt thin device \(id) as \(name) of \(ByteSize(bytes: size))"
        }
    }
}
