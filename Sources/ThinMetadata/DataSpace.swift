// Data blocks before and after they are mapped, and growing both devices.
//
// 1. A data block is free, reserved (busy), mapped (count > 0), or freed and waiting (busy): for the
//    transaction that freed it, then for the caller, whose I/O to it has to drain.
// 2. Growing takes the blocks that it needs from the new area.

import BlockIO

extension ThinMetadata {
    /// Reserves a data block; prefers the one after the last. Nil if none is allocatable now.
    public func allocateDataBlock() throws(MetadataError) -> DataBlock? {
        guard let block = try store.data.findFree() else { return nil }
        try store.data.setBusy(block, true)
        return DataBlock(block)
    }

    /// Data blocks that nobody refers to any more once the open transaction is durable.
    public var discardedBlocks: Int { store.discarded.count }

    /// Gives a reserved block back that was not mapped.
    public func releaseReservation(_ block: DataBlock) {
        makeAvailable([block])
    }

    /// Blocks that `committed` returned and that no I/O uses any more.
    public func makeAvailable(_ blocks: [DataBlock]) {
        for block in blocks {
            do {
                // Its bitmap is in memory: busy blocks hold it.
                try store.data.setBusy(block.rawValue, false)
            } catch {
                preconditionFailure("data block \(block.rawValue) was not busy")
            }
        }
    }

    /// More data blocks. Does nothing if there are as many.
    public func growData(to blocks: UInt64) throws(MetadataError) {
        try requireWritable()
        guard blocks > dataBlocks else { return }
        guard blocks <= Mapping.maxBlock + 1 else {
            throw .unsupported(path: device.path, "a pool has at most 2^40 data blocks")
        }
        let added = SpaceMap.pages(for: blocks) - store.data.slotCount
        try requireSpace(dataBitmapsCost(added: added), keepingReserve: added > 0)
        isChanged = true
        try store.data.grow(to: blocks)
        store.cache.dataLimit = blocks
    }

    /// More metadata blocks, if the device has become larger.
    ///
    /// - Parameter size: what the device will have, for somebody who only wants to know what would
    ///   then fit, and commits nothing.
    public func growMetadata(asOf size: UInt64? = nil) throws(MetadataError) {
        try requireWritable()
        let size = size ?? device.size
        let blocks = min(size / UInt64(Layout.blockSize), Layout.maxMetadataBlocks)
        guard blocks > metadataBlocks else { return }
        isChanged = true
        store.cache.grow(metadataLimit: blocks)
        try store.metadata.grow(to: blocks)
    }
}
