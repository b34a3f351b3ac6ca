// Who uses which metadata block: the reference counts as the pointers give them, and each block's
// role, so that no block serves two purposes.

extension MetadataCheck {
    /// What a metadata block is used as.
    enum Role: UInt8 {
        case none, superblock, heldSuperblock, index, metadataBitmap, dataBitmap
        case metadataOverflow, dataOverflow, dataIndex, details, topLevel, mapping

        var words: String {
            switch self {
            case .none: "free block"
            case .superblock: "superblock"
            case .heldSuperblock: "metadata snapshot's superblock"
            case .index: "metadata index"
            case .metadataBitmap: "metadata bitmap"
            case .dataBitmap: "data bitmap"
            case .metadataOverflow: "node of the metadata reference count tree"
            case .dataOverflow: "node of the data reference count tree"
            case .dataIndex: "node of the data bitmap index"
            case .details: "node of the device details"
            case .topLevel: "node of the device tree"
            case .mapping: "mapping tree node"
            }
        }

        /// Whether several pointers to one block are right. For the details and the top level only
        /// a metadata snapshot makes more than one; key ranges catch the rest.
        var isSharable: Bool { self == .details || self == .topLevel || self == .mapping }
    }

    enum Claim { case first, again, refused }

    final class BlockClaims {
        private let log: FindingLog
        private(set) var counts: [UInt32]
        private var roles: [UInt8]
        /// The end of the metadata by its space map. Blocks from here to the end of the device
        /// are looked at, but nothing may be there.
        var spaceMapEnd: UInt64 = .max
        /// False once a pointer leads nowhere or a block cannot be understood: then `counts` are
        /// lower bounds.
        var isComplete = true

        init(blockCount: UInt64, log: FindingLog) {
            self.log = log
            counts = Array(repeating: 0, count: Int(blockCount))
            roles = Array(repeating: 0, count: Int(blockCount))
        }

        var blockCount: UInt64 { UInt64(counts.count) }
        var used: UInt64 { counts.reduce(0) { $0 + ($1 > 0 ? 1 : 0) } }

        /// Counts a pointer to `block` that `from` holds and says whether to go on there.
        func claim(_ block: UInt64, as role: Role, from: UInt64) -> Claim {
            guard block < UInt64(counts.count), block != 0 || role == .superblock else {
                log.add(
                    .damage, .badPointer, block: from,
                    block == 0
                        ? "a pointer to a \(role.words) leads to the superblock"
                        : "a pointer to a \(role.words) leads to block \(block), "
                            + "past the end of the metadata device")
                isComplete = false
                return .refused
            }
            if block >= spaceMapEnd {
                log.add(
                    .damage, .badPointer, block: from,
                    "a pointer to a \(role.words) leads to block \(block), past the end of the "
                        + "metadata space map")
            }
            let index = Int(block)
            if counts[index] < .max { counts[index] += 1 }
            let before = Role(rawValue: roles[index])!
            if before == .none {
                roles[index] = role.rawValue
                return .first
            }
            if before == role && role.isSharable { return .again }
            log.add(
                .damage, .usedTwice, block: block,
                before == role
                    ? "two pointers lead to this \(role.words)"
                    : "the block is used as a \(before.words) and as a \(role.words)")
            isComplete = false
            return .refused
        }
    }
}
