// A transaction that is closed: the blocks to write, unchanging until it is durable.
//
// 1. Its node frames belong to the cache, which neither changes nor gives them up until
//    `ThinMetadata.committed`; the space map blocks and the superblock are copies of its own.
// 2. So `copyBlock` and `copySuperblock` only read memory that nobody writes: they may be called
//    without the pool's lock, from any thread, until `committed` is called. That is what makes
//    `@unchecked Sendable` true; the rest is touched under the pool's lock only.
// 3. Blocks are in ascending order and none is part of the committed state.

import Glibc

/// Data blocks that nobody refers to any more once the transaction is durable.
public struct FreedBlocks: Equatable, Sendable {
    /// By remove or delete: may be discarded on the data device.
    public var discarded: [DataBlock]
    /// By insert: copied on write.
    public var replaced: [DataBlock]
    /// Something lost one of several references: what was shared may be somebody's own now.
    public var unshared = false
}

public final class FrozenTransaction: @unchecked Sendable {
    struct Block {
        let number: UInt64
        let kind: BlockKind
        let memory: UnsafeMutableRawPointer
    }

    private let contents: [Block]
    private let superblock: UnsafeMutableRawPointer
    /// Copies made for this transaction.
    private let owned: [UnsafeMutableRawPointer]
    /// Keeps the node frames alive.
    private let cache: NodeCache
    let quarantine: [UInt64]
    let freed: FreedBlocks
    let dataPages: [Int]
    let metadataPages: [Int]

    init(
        contents: [Block], superblock: UnsafeMutableRawPointer, owned: [UnsafeMutableRawPointer],
        cache: NodeCache, quarantine: [UInt64], freed: FreedBlocks, dataPages: [Int],
        metadataPages: [Int]
    ) {
        self.contents = contents
        self.superblock = superblock
        self.owned = owned
        self.cache = cache
        self.quarantine = quarantine
        self.freed = freed
        self.dataPages = dataPages
        self.metadataPages = metadataPages
    }

    deinit {
        for memory in owned { memory.deallocate() }
    }

    /// How many blocks there are to write, the superblock not counted.
    public var blocks: Int { contents.count }

    /// Copies a block, ready for the device, and answers where it goes.
    public func copyBlock(_ index: Int, to target: UnsafeMutableRawPointer) -> MetadataBlock {
        let block = contents[index]
        memcpy(target, block.memory, Layout.blockSize)
        let number = MetadataBlock(block.number)
        target.seal(as: block.kind, number: number)
        return number
    }

    /// The superblock, for block 0: to be written last, alone, when all else is durable.
    public func copySuperblock(to target: UnsafeMutableRawPointer) {
        memcpy(target, superblock, Layout.blockSize)
        target.seal(as: .superblock, number: MetadataBlock(0))
    }
}
