// Reference counts of both devices' blocks: two bits in a bitmap, counts from 3 up in the
// overflow tree.
//
// 1. A block is in the overflow tree if and only if its two bits say 3; the count there is >= 3.
// 2. Whatever leads below 0, or to a block outside the device, comes from damaged metadata: it is
//    an error, never a trap.

extension Store {
    // MARK: Metadata

    func count(_ block: UInt64) throws(MetadataError) -> UInt32 {
        guard block < metadata.blockCount else { throw Self.outside(block) }
        let short = try metadata.shortCount(block)
        return short < 3
            ? short : try overflowCount(block, metadata.overflowRoot, .metadataOverflow)
    }

    func retain(_ block: UInt64) throws(MetadataError) {
        guard block < metadata.blockCount else { throw Self.outside(block) }
        switch try metadata.shortCount(block) {
        case 0: throw Self.unreferenced(block)
        case 1: try metadata.setShortCount(block, 2)
        case 2:
            try setMetadataOverflow(block, 3)
            try metadata.setShortCount(block, 3)
        default:
            let count = try overflowCount(block, metadata.overflowRoot, .metadataOverflow)
            guard count < UInt32.max else { throw Self.overflowing(block) }
            try setMetadataOverflow(block, count + 1)
        }
    }

    /// Drops a reference. At 0 the block is free; what its entries refer to is the caller's matter.
    func release(_ block: UInt64) throws(MetadataError) {
        guard block < metadata.blockCount else { throw Self.outside(block) }
        switch try metadata.shortCount(block) {
        case 0: throw Self.unreferenced(block)
        case 1:
            try metadata.setShortCount(block, 0)
            if !cache.isOpen(block) {
                try metadata.setBusy(block, true)
                quarantine.append(block)
            }
            cache.forget(block)
        case 2:
            try metadata.setShortCount(block, 1)
            hasUnshared = true
        default:
            let count = try overflowCount(block, metadata.overflowRoot, .metadataOverflow)
            hasUnshared = true
            if count > 3 { return try setMetadataOverflow(block, count - 1) }
            var root = metadata.overflowRoot
            try removeKey(&root, .metadataOverflow, block)
            metadata.overflowRoot = root
            try metadata.setShortCount(block, 2)
        }
    }

    private func setMetadataOverflow(_ block: UInt64, _ count: UInt32) throws(MetadataError) {
        var root = metadata.overflowRoot
        _ = try insert32(&root, .metadataOverflow, block, count)
        metadata.overflowRoot = root
    }

    // MARK: Data

    func dataCount(_ block: DataBlock) throws(MetadataError) -> UInt32 {
        let number = block.rawValue
        guard number < data.blockCount else { throw outsideData(block) }
        let short = try data.shortCount(number)
        return short < 3 ? short : try overflowCount(number, data.overflowRoot, .dataOverflow)
    }

    func retainData(_ block: DataBlock) throws(MetadataError) {
        let number = block.rawValue
        guard number < data.blockCount else { throw outsideData(block) }
        switch try data.shortCount(number) {
        case 0: throw unreferencedData(block)
        case 1: try data.setShortCount(number, 2)
        case 2:
            try setDataOverflow(number, 3)
            try data.setShortCount(number, 3)
        default:
            let count = try overflowCount(number, data.overflowRoot, .dataOverflow)
            guard count < UInt32.max else { throw Self.overflowing(data.overflowRoot) }
            try setDataOverflow(number, count + 1)
        }
    }

    func releaseData(_ block: DataBlock, _ reason: FreedBy) throws(MetadataError) {
        let number = block.rawValue
        guard number < data.blockCount else { throw outsideData(block) }
        switch try data.shortCount(number) {
        case 0: throw unreferencedData(block)
        case 1:
            try data.setShortCount(number, 0)
            try data.setBusy(number, true)
            switch reason {
            case .discard: discarded.append(block)
            case .replacement: replaced.append(block)
            }
        case 2:
            try data.setShortCount(number, 1)
            hasUnshared = true
        default:
            let count = try overflowCount(number, data.overflowRoot, .dataOverflow)
            hasUnshared = true
            if count > 3 { return try setDataOverflow(number, count - 1) }
            var root = data.overflowRoot
            try removeKey(&root, .dataOverflow, number)
            data.overflowRoot = root
            try data.setShortCount(number, 2)
        }
    }

    private func setDataOverflow(_ block: UInt64, _ count: UInt32) throws(MetadataError) {
        var root = data.overflowRoot
        _ = try insert32(&root, .dataOverflow, block, count)
        data.overflowRoot = root
    }

    // MARK: Overflow trees

    private func overflowCount(
        _ block: UInt64, _ root: UInt64, _ kind: TreeKind
    ) throws(MetadataError) -> UInt32 {
        guard let value = try cache.find(root, kind, block), value.le32(0) >= 3 else {
            throw .corrupt(
                block: MetadataBlock(root),
                "the \(kind) tree has no count of 3 or more for block \(block)")
        }
        return value.le32(0)
    }

    // MARK: Words

    private static func outside(_ block: UInt64) -> MetadataError {
        .corrupt(block: MetadataBlock(block), "referred to, but outside the metadata device")
    }
    private static func unreferenced(_ block: UInt64) -> MetadataError {
        .corrupt(block: MetadataBlock(block), "in use, but its reference count is 0")
    }
    private static func overflowing(_ block: UInt64) -> MetadataError {
        .corrupt(block: MetadataBlock(block), "a reference count is too large")
    }
    private func outsideData(_ block: DataBlock) -> MetadataError {
        .corrupt(
            block: MetadataBlock(data.indexRoot),
            "data block \(block.rawValue) is mapped, but outside the data device")
    }
    private func unreferencedData(_ block: DataBlock) -> MetadataError {
        .corrupt(
            block: MetadataBlock(data.indexRoot),
            "data block \(block.rawValue) is mapped, but its reference count is 0")
    }
}
