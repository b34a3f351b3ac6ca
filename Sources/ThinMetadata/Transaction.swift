// Closing the open transaction and opening the next.
//
// The metadata space map describes its own blocks, so the order in `freeze` matters:
// 1. details and data space map first: they change metadata counts only;
// 2. then the index block and the metadata bitmaps get new places, until no bitmap without one has
//    changed: each is moved once at most, so this ends;
// 3. then counts are final, and bitmaps and index are copied.

import Glibc

extension ThinMetadata {
    /// Closes the open transaction; the next one is open when it returns. The frozen one is handed
    /// to `committed` before the next freeze.
    public func freeze() throws(MetadataError) -> FrozenTransaction {
        precondition(frozen == nil, "the last frozen transaction is not committed yet")
        try requireWritable()
        var builder = FrozenBuilder()
        var dataPages: [Int] = []
        var metadataPages: [Int] = []
        if isChanged {
            do throws(MetadataError) {
                try writeDirtyDetails()
                dataPages = try freezeDataMap(&builder)
                metadataPages = try freezeMetadataMap(&builder)
            } catch {
                builder.discard()
                throw error
            }
            for (block, memory) in store.cache.freeze() {
                builder.add(block, .node, memory)
            }
        }
        writeSpaceMapRoots()
        let transaction = FrozenTransaction(
            contents: builder.sorted(), superblock: builder.copy(superblock.bytes),
            owned: builder.owned, cache: store.cache, quarantine: store.quarantine,
            freed: FreedBlocks(
                discarded: store.discarded, replaced: store.replaced,
                unshared: store.hasUnshared),
            dataPages: dataPages, metadataPages: metadataPages)
        store.quarantine = []
        store.discarded = []
        store.replaced = []
        hasUnsharedInFrozen = store.hasUnshared
        store.hasUnshared = false
        isChanged = false
        openTransaction += 1
        frozen = transaction
        return transaction
    }

    /// The transaction's superblock is durable. Its freed metadata blocks can be allocated again;
    /// its freed data blocks can be once `makeAvailable` is told so.
    public func committed(_ transaction: FrozenTransaction) -> FreedBlocks {
        precondition(transaction === frozen, "this is not the transaction being committed")
        frozen = nil
        hasUnsharedInFrozen = false
        store.cache.committed()
        for index in transaction.dataPages { store.data.unfreeze(index) }
        for index in transaction.metadataPages { store.metadata.unfreeze(index) }
        if pins > 0 {
            pinnedQuarantine += transaction.quarantine
        } else {
            makeAvailable(metadata: transaction.quarantine)
        }
        return transaction.freed
    }

    /// Keeps every block of the present committed state from being reused, so that it can be read
    /// while later transactions are committed. Pins nest.
    public func pinCommitted() -> CommittedPin {
        pins += 1
        return CommittedPin(generation: pinGeneration)
    }

    /// Whether the state of that pin is still whole.
    public func holds(_ pin: CommittedPin) -> Bool { pin.generation == pinGeneration }

    /// Ends a pin, if it has not been broken.
    public func unpinCommitted(_ pin: CommittedPin) {
        guard holds(pin) else { return }
        precondition(pins > 0, "unpinned more often than pinned")
        pins -= 1
        if pins == 0 { makePinnedAvailable() }
    }

    /// Ends all pins before their time: what they keep is wanted.
    public func breakPins() {
        pins = 0
        pinGeneration += 1
        makePinnedAvailable()
    }

    private func makePinnedAvailable() {
        makeAvailable(metadata: pinnedQuarantine)
        pinnedQuarantine = []
    }

    private func makeAvailable(metadata blocks: [UInt64]) {
        blockReuses += 1
        for block in blocks {
            do {
                // Its bitmap is in memory: busy blocks hold it.
                try store.metadata.setBusy(block, false)
            } catch {
                preconditionFailure("metadata block \(block) was not busy")
            }
        }
    }

    private func writeDirtyDetails() throws(MetadataError) {
        dirtyRecords.sort { $0.id < $1.id }
        for record in dirtyRecords where !record.isDeleted && record.isDirty {
            try writeDetails(record)
        }
        dirtyRecords.removeAll(keepingCapacity: true)
    }

    /// A new place for a bitmap or index block, and the old one freed.
    private func move(_ block: UInt64) throws(MetadataError) -> UInt64 {
        let target = try store.allocateBlock()
        if block != 0 { try store.release(block) }
        return target
    }

    private func freezeDataMap(_ builder: inout FrozenBuilder) throws(MetadataError) -> [Int] {
        let map = store.data
        let pages = map.takeDirtyPages()
        for index in pages {
            let block = try move(map.slots[index].block)
            map.setBlock(index, block)
            map.freezePage(index, into: builder.allocate(block, .bitmap))
            try writeIndexEntry(index)
        }
        for index in map.takeDirtyEntries() { try writeIndexEntry(index) }
        return pages
    }

    private func writeIndexEntry(_ index: Int) throws(MetadataError) {
        var entry: (UInt64, UInt64) = (0, 0)
        var old = entry
        withUnsafeMutableBytes(of: &entry) {
            store.data.writeEntry(index, to: $0.baseAddress!)
        }
        var root = store.data.indexRoot
        _ = try store.insert(&root, .dataIndex, UInt64(index), &entry, old: &old)
        store.data.indexRoot = root
    }

    private func freezeMetadataMap(_ builder: inout FrozenBuilder) throws(MetadataError) -> [Int] {
        let map = store.metadata
        map.indexRoot = try move(map.indexRoot)
        // Moved bitmaps stay marked as dirty, so that they are not listed again.
        var pages: [Int] = []
        while true {
            let dirty = map.takeDirtyPages()
            if dirty.isEmpty { break }
            for index in dirty { map.setBlock(index, try move(map.slots[index].block)) }
            pages += dirty
        }
        for index in pages {
            map.freezePage(index, into: builder.allocate(map.slots[index].block, .bitmap))
        }
        _ = map.takeDirtyEntries()
        let indexBlock = builder.allocate(map.indexRoot, .index)
        memset(indexBlock, 0, Layout.blockSize)
        for index in 0..<map.slotCount {
            map.writeEntry(
                index, to: indexBlock + IndexBlockLayout.entries + IndexEntryLayout.size * index)
        }
        return pages
    }

    private func writeSpaceMapRoots() {
        let data = store.data
        superblock.dataSpaceMap = SpaceMapRoot(
            blockCount: data.blockCount, allocatedCount: data.allocatedBlocks,
            bitmapRoot: data.indexRoot, refCountRoot: data.overflowRoot)
        let metadata = store.metadata
        superblock.metadataSpaceMap = SpaceMapRoot(
            blockCount: metadata.blockCount, allocatedCount: metadata.allocatedBlocks,
            bitmapRoot: metadata.indexRoot, refCountRoot: metadata.overflowRoot)
    }
}

/// Somebody reads a committed state, which later ones leave whole.
public struct CommittedPin: Sendable {
    fileprivate let generation: UInt64
}

/// Collects a frozen transaction's blocks.
private struct FrozenBuilder {
    private var blocks: [FrozenTransaction.Block] = []
    private(set) var owned: [UnsafeMutableRawPointer] = []

    mutating func add(_ number: UInt64, _ kind: BlockKind, _ memory: UnsafeMutableRawPointer) {
        blocks.append(FrozenTransaction.Block(number: number, kind: kind, memory: memory))
    }

    /// A block of the transaction's own, to be filled.
    mutating func allocate(_ number: UInt64, _ kind: BlockKind) -> UnsafeMutableRawPointer {
        let memory = ownedBlock()
        add(number, kind, memory)
        return memory
    }

    mutating func copy(_ source: UnsafeMutableRawPointer) -> UnsafeMutableRawPointer {
        let memory = ownedBlock()
        memcpy(memory, source, Layout.blockSize)
        return memory
    }

    private mutating func ownedBlock() -> UnsafeMutableRawPointer {
        let memory = UnsafeMutableRawPointer.allocate(
            byteCount: Layout.blockSize, alignment: Layout.blockSize)
        owned.append(memory)
        return memory
    }

    /// There will be no transaction.
    func discard() {
        for memory in owned { memory.deallocate() }
    }

    func sorted() -> [FrozenTransaction.Block] { blocks.sorted { $0.number < $1.number } }
}
