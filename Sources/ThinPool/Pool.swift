// A thin pool: its metadata, its volumes, and who waits for what. Everything here is under the
// pool's lock unless it says otherwise.
//
// 1. A transaction is numbered by `openSequence`; what it changes is durable once
//    `durableSequence` has reached that number.
// 2. A data block that the map gives up goes: commit durable -> its epoch drained -> (passed down,
//    if it was discarded) -> allocatable. No step is ever left out.
// 3. After a failure nothing is committed any more, no write succeeds, and the state that reads see
//    is the last committed one.
// 4. Some blocks are kept back for the catalogue, so that a volume can be deleted from a full pool.

import BlockIO
import Glibc
import Synchronization
import ThinMetadata

/// How much is done at once, so that nobody waits long for the pool's lock or takes too much memory.
public struct PoolBounds: Sendable {
    /// Larger blocks are copied and filled in pieces of this many bytes.
    public var copyPiece = 1 << 20
    /// Copies in flight of one reactor that need a buffer of such a piece.
    public var bounces = 64
    /// Steps that one request may have outstanding, while a reactor has fewer than `steps` in all;
    /// with more, it is one.
    public var window: Int32 = 64
    public var steps = 4096
    /// A run of adjacent blocks becomes one I/O of at most this many bytes.
    public var run: UInt64 = 4 << 20
    /// Bytes that a turn copies or zeroes on the spot before the next one begins: for one client, and
    /// where others wait for the turn's end. Bytes of a hole that one request has zeroed of that
    /// before others have theirs; the device has a bound of its own for copies.
    public var turnBytes = 2 << 20
    public var sharedTurnBytes = 64 << 10
    public var piece = 128 << 10
    /// Virtual blocks of a page of a mapping table, as a power of two.
    public var tablePageShift = MappingTable.longestPageShift
    /// Steps that a query of the map takes for each of its kinds. A step is a leaf, with 84 to 252
    /// mappings as a rule.
    public var extentSteps = 256
    /// Leaves that queries, unmaps and hints visit in one turn, and how many mappings are unmapped
    /// where a query would visit one.
    public var turnLeaves = 16
    public var unmapsPerLeaf = 32
    /// Steps that a turn looks up, or finds a block for, before the next one begins.
    public var turnAsks = 256
    /// Pages of the mapping table that one CACHE loads.
    public var cachedPages = 64
    /// Mappings up to which a device is deleted in one go, not in the background.
    public var smallDeletion: UInt64 = 4096
    /// Mappings that one slice of a background deletion gives back.
    public var deletionSlice = 512
    /// Blocks that deletions give back in one transaction, so that its commit stays short.
    public var deletionBatch = 32_768
    /// Dirty metadata blocks at which a commit begins, so that none takes long.
    public var dirtyBlocks = 1024
    /// Discards passed down between two commits.
    public var discardsPerStep = 32
    public init() {}
}

public struct PoolOptions: Sendable {
    /// Nanoseconds between a change of the map and its commit, when nobody asks for one.
    public var commitInterval: UInt64 = 1_000_000_000
    /// 4 KiB blocks of metadata kept in memory.
    public var cacheBlocks = 16_384
    /// Memory for the pages of the volumes' mapping tables.
    public var tableBytes = 256 << 20
    /// Give discarded blocks back to the data device.
    public var passDiscardsDown = true
    public var readOnly = false
    /// Use io_uring where the system has it.
    public var allowRing = true
    public var bounds = PoolBounds()
    public init() {}
}

public final class Pool: @unchecked Sendable {
    /// Blocks up to this size are copied and filled in one piece.
    let copyPiece: Int

    let lock = PoolLock()
    let epochs = Epochs()
    public let options: PoolOptions
    let metadataDevice: any BlockDevice
    let dataDevice: any BlockDevice
    /// Bytes.
    public let blockSize: UInt64
    /// `copyPiece` bytes of zeroes, for whoever writes them.
    let zeroes: UnsafeMutableRawPointer

    var metadata: ThinMetadata
    var failure: PoolError?
    /// Why nothing may be changed, if so: asked for, or the metadata needs a check.
    var readOnlyReason: String?
    var isReadOnly: Bool { readOnlyReason != nil }

    // Volumes
    var catalogue = Catalogue() { didSet { volumeIndex = nil } }
    var hasCatalogue = false
    var catalogueBlocks: UInt64 = 0
    var volumesByName: [String: Volume] = [:] { didSet { volumeIndex = nil } }
    /// Made when somebody asks: it costs time, and clients ask far more often than volumes change.
    var volumeIndex: VolumeIndex?
    var volumesByID: [ThinDeviceID: Volume] = [:]
    /// All of them, in the order in which their tables give up pages.
    var volumes: [Volume] = []
    private var evictionHand = 0
    /// Bytes of the pages of all their tables.
    package var tableBytes = 0
    /// What is given up beyond the bound, so that not every page that is loaded has to.
    private static let evictionSlack = 64 << 10

    /// How often some volume's fence has been removed.
    package let fencesRemoved = Atomic<Int>(0)

    // Engines and what they wait for
    /// Kept alive by their reactors, until they close.
    var engines: [Unmanaged<VolumeIO>?] = []
    var cells: [CellKey: ParkedSteps] = [:]
    /// For a data block, and for metadata blocks.
    var spaceWaiters = ParkedSteps()
    var metadataWaiters = ParkedSteps()
    var drainWaiters = ParkedSteps()
    /// Blocks allocated and not yet mapped or given back, the spare ones included.
    var reservations: UInt64 = 0
    var spareBlocks: [DataBlock] = []
    var dataSpace = SpaceWatch()
    var metadataSpace = SpaceWatch()

    // Transactions
    var openSequence: UInt64 = 1
    let durableSequence = Atomic<UInt64>(0)
    enum CommitWaiter {
        case request(engine: Int, request: Int32)
        case completion((PoolError?) -> Void)
    }
    var commitWaiters: [CommitWaiter] = []
    var commitRequested = false
    var flushes = FlushLedger()

    // Draining
    enum Drained {
        case blocks([DataBlock], discard: Bool)
        case pages([UInt])
        case quiesced
        case writesInPlace(Volume, [UInt64])
    }
    var drains: [(stamp: UInt64, what: Drained)] = []
    let drainsPending = Atomic<Bool>(false)
    /// Stamp of the last durable commit in which something stopped being shared.
    var lastUnshared: UInt64 = 0
    /// Blocks that nobody can touch any more and that still have to be passed down.
    var discards = DiscardQueue()

    let worker = WorkerState()
    /// Block 0 as the last commit wrote it.
    var committedSuperblock: [UInt8]
    /// Deletions that have ended and whose catalogue entry is about to go.
    var forgotten = Set<UInt32>()
    /// The pool is closing: deletions go on when it is next opened.
    var stopsDeleting = false
    /// What the catalogue says and the metadata does not bear out: for people to see.
    var problems: [String] = []
    /// Why the pool does not use all of its data device.
    private(set) var growthProblem: String?

    /// Opens a pool.
    ///
    /// - Throws: `PoolError` if a device is no pool, is too short, or its contents are damaged.
    public init(
        metadata metadataDevice: any BlockDevice, data dataDevice: any BlockDevice,
        options: PoolOptions = PoolOptions()
    ) throws(PoolError) {
        self.metadataDevice = metadataDevice
        self.dataDevice = dataDevice
        self.options = options
        if !options.readOnly {
            // A server that was killed may have left its last superblock in the device's cache. New
            // transactions must not be built on a state that a power cut can still undo.
            do throws(DeviceError) { try metadataDevice.flush() } catch { throw PoolError(error) }
        }
        do { metadata = try ThinMetadata(metadataDevice, cacheBlocks: options.cacheBlocks) } catch {
            throw PoolError(error)
        }
        do { committedSuperblock = try Self.readSuperblock(metadataDevice) } catch {
            throw PoolError(error)
        }
        blockSize = UInt64(metadata.dataBlockSectors) * Layout.sectorSize
        copyPiece = Int(min(blockSize, UInt64(options.bounds.copyPiece)))
        zeroes = aligned_alloc(4096, copyPiece)!
        memset(zeroes, 0, copyPiece)

        guard dataDevice.size / blockSize >= metadata.dataBlocks else {
            throw PoolError(
                .device,
                "\(dataDevice.path) has \(dataDevice.size) bytes, but the pool needs "
                    + "\(bytes(metadata.dataBlocks)): give the device that belongs to "
                    + "\(metadataDevice.path)")
        }
        if options.readOnly {
            readOnlyReason = "the pool is opened read-only"
        } else if metadata.needsCheck {
            readOnlyReason = "its metadata needs a check: run \"wafer pool check\""
        }
        try loadCatalogue()
        if !isReadOnly {
            try growToDevices()
            refillSpareBlocks()
        }
        watchSpace()
    }

    deinit {
        free(zeroes)
        for case (_, .pages(let addresses)) in drains {
            for address in addresses { free(UnsafeMutableRawPointer(bitPattern: address)) }
        }
    }

    private static func readSuperblock(_ device: any BlockDevice) throws(DeviceError) -> [UInt8] {
        let block = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Layout.blockSize, alignment: Layout.blockSize)
        defer { block.deallocate() }
        try device.read(at: 0, into: block)
        return [UInt8](block)
    }

    /// The devices may have grown since the pool was last open: use what they have. Where the
    /// metadata has no room for more data blocks, the pool has to be open all the same: only then
    /// can somebody make room.
    private func growToDevices() throws(PoolError) {
        do throws(MetadataError) {
            let blocks = min(dataDevice.size / blockSize, Mapping.maxBlock)
            if metadataDevice.size / UInt64(Layout.blockSize) > metadata.metadataBlocks {
                try metadata.growMetadata()
            }
            if blocks > metadata.dataBlocks { try metadata.growData(to: blocks) }
        } catch {
            guard case .outOfMetadataSpace = error else { throw PoolError(error) }
            growthProblem =
                "\(dataDevice.path) has grown, but the pool's metadata has no room for more data "
                + "blocks: grow the metadata device, or delete volumes, and open the pool again"
        }
    }

    // MARK: - The map, for the engines

    /// A virtual block's mapping, by the table, or by the metadata, which then fills the page.
    func mapping(of volume: Volume, _ block: UInt64) -> Answer<Mapping?> {
        switch volume.table.lookup(block) {
        case .mapped(let mapping): return .success(mapping)
        case .unmapped: return .success(nil)
        case .unknown: break
        }
        if metadataIsUnreadable { return .failure(EIO) }
        let range = volume.table.pageRange(of: block)
        do throws(MetadataError) {
            let before = volume.table.bytes
            try volume.table.load(pageOf: block) { (set) throws(MetadataError) in
                var next = VirtualBlock(range.lowerBound)
                let limit = VirtualBlock(range.upperBound)
                while next < limit {
                    next = try metadata.visitLeaf(volume.id, from: next, limit: limit, set)
                }
            }
            tableBytes += volume.table.bytes - before
        } catch {
            // Reading failed; nothing was changed, so this is the request's error alone.
            return .failure(EIO)
        }
        evictTablePages(keeping: volume, pageOf: block)
        switch volume.table.lookup(block) {
        case .mapped(let mapping): return .success(mapping)
        default: return .success(nil)
        }
    }

    /// What is known of the block from now on; a page that was known to have few mappings may have
    /// to be another one.
    private func publish(_ volume: Volume, _ block: UInt64, _ mapping: Mapping?) {
        let before = volume.table.bytes
        let replaced = volume.table.publish(block, mapping)
        tableBytes += volume.table.bytes - before
        if let replaced { retirePages([replaced]) }
    }

    /// Keeps the tables within their bound: pages of the volumes in turn, but never the one that is
    /// in use just now.
    private func evictTablePages(keeping used: Volume, pageOf block: UInt64) {
        guard tableBytes > options.tableBytes else { return }
        var addresses: [UInt] = []
        var forgotten: [(volume: Volume, pages: [UInt64])] = []
        let goal = max(0, options.tableBytes - Self.evictionSlack)
        for _ in 0..<volumes.count where tableBytes > goal {
            evictionHand = evictionHand + 1 < volumes.count ? evictionHand + 1 : 0
            let volume = volumes[evictionHand]
            let before = volume.table.bytes
            guard before > 0 else { continue }
            var pages: [UInt64] = []
            volume.table.evict(
                bytes: tableBytes - goal, keeping: volume === used ? block : nil
            ) { page, address in
                pages.append(page)
                addresses.append(address)
            }
            tableBytes -= before - volume.table.bytes
            if volume.hasGrants, !pages.isEmpty { forgotten.append((volume, pages)) }
        }
        retirePages(addresses)
        for (volume, pages) in forgotten { forgetGrants(of: volume, pages) }
    }

    private func forgetGrants(of volume: Volume, _ pages: [UInt64]) {
        let stamp = epochs.retire()
        for page in pages { volume.forgottenPages[page] = stamp }
        addDrain(stamp, .writesInPlace(volume, pages))
    }

    /// No write in place is under way any more that these pages had allowed.
    private func grantsDrained(_ volume: Volume, _ pages: [UInt64], _ stamp: UInt64) {
        for page in pages where volume.forgottenPages[page] == stamp {
            volume.forgottenPages[page] = nil
        }
        resume(&drainWaiters)
    }

    /// The volume's table knows nothing any more.
    func dropTable(of volume: Volume) {
        var addresses: [UInt] = []
        tableBytes -= volume.table.bytes
        volume.table.removeAll { addresses.append($0) }
        retirePages(addresses)
    }

    func retirePages(_ addresses: [UInt]) {
        guard !addresses.isEmpty else { return }
        addDrain(epochs.retire(), .pages(addresses))
        processDrains()
    }

    /// The path proves that the block is the volume's alone: from now on it is written in place.
    ///
    /// A volume that shared it and has unmapped it may still have a read of it in flight, which
    /// must not see what is written now: so only once those have drained.
    func isExclusive(_ volume: Volume, _ block: UInt64, _ mapping: Mapping) -> Bool {
        guard epochs.hasDrained(lastUnshared),
            (try? metadata.isExclusive(volume.id, VirtualBlock(block))) == true
        else { return false }
        // Only the table says so; the mapping on disk keeps its time.
        volume.hasGrants = true
        publish(volume, block, Mapping(block: mapping.block, time: volume.snapshottedTime))
        return true
    }

    /// Whether a copy of the volume's block would have all that was written to it.
    ///
    /// Writes in place that `isExclusive` allowed may still be in flight when the table has forgotten
    /// that it did, and by then the answer may be another. If not, the step parks in `drainWaiters`.
    func mayCopy(_ block: UInt64, of volume: Volume) -> Bool {
        volume.forgottenPages[volume.table.page(of: block)] == nil
    }

    /// A block to fill; nil: wait, one may come with the next commit.
    func allocate() -> Answer<DataBlock?> {
        do throws(MetadataError) {
            if let block = try metadata.allocateDataBlock() {
                reservations += 1
                return .success(block)
            }
        } catch {
            return .failure(EIO)
        }
        // Freed but not yet allocatable: a commit (and the end of old I/O) gives them back.
        guard blocksOnTheirWay > 0 else {
            dataWasRefused()
            return .failure(ENOSPC)
        }
        requestCommit()
        return .success(nil)
    }

    /// Data blocks that nobody maps and that are not yet allocatable.
    var blocksOnTheirWay: UInt64 {
        metadata.dataBlocks - metadata.dataBlocksUsed - metadata.dataBlocksAvailable - reservations
    }

    /// A reserved block is not needed after all.
    func giveBack(_ block: DataBlock) {
        // A failed pool has forgotten its reservations.
        if failure != nil { return }
        reservations -= 1
        metadata.releaseReservation(block)
        resume(&spaceWaiters)
    }

    enum InsertResult {
        case done
        case failed(Int32)
        case noMetadataSpace
    }

    func insert(_ volume: Volume, _ block: UInt64, _ target: DataBlock) -> InsertResult {
        if failure != nil { return .failed(EIO) }
        do throws(MetadataError) {
            _ = try metadata.insert(volume.id, VirtualBlock(block), target)
        } catch {
            if case .outOfMetadataSpace = error {
                giveBack(target)
                return .noMetadataSpace
            }
            fail(PoolError(error))
            return .failed(EIO)
        }
        reservations -= 1
        publish(volume, block, Mapping(block: target, time: metadata.time))
        evictTablePages(keeping: volume, pageOf: block)
        markChanged(volume)
        return .done
    }

    /// - Returns: where to go on, nil when the range is done; and how many mappings it had.
    func unmap(_ volume: Volume, _ range: Range<UInt64>, limit: Int)
        -> Answer<(next: UInt64?, removed: Int)>
    {
        do throws(MetadataError) {
            var removed = 0
            let next = try metadata.remove(volume.id, range, limit: limit) { block, _ in
                removed += 1
                publish(volume, block.rawValue, nil)
            }
            if removed > 0 { markChanged(volume) }
            return .success((next?.rawValue, removed))
        } catch {
            if case .outOfMetadataSpace = error {
                requestCommit()
                return .failure(ENOSPC)
            }
            fail(PoolError(error))
            return .failure(EIO)
        }
    }

    private func markChanged(_ volume: Volume) {
        volume.changedIn.store(openSequence, ordering: .releasing)
        if worker.isIdle { lock.signal() }
    }

    /// After every batch of operations: bounds that are kept between operations, not inside.
    func endOperation() {
        metadata.trimCache()
        if metadata.dirtyBlocks > min(options.bounds.dirtyBlocks, options.cacheBlocks / 2) {
            requestCommit()
        }
    }

    // MARK: - Commits

    /// There is something to commit, or being committed: metadata space may come back with it.
    var commitGivesBack: Bool {
        switch worker.activity {
        case .writeBlocks, .flushMetadata, .writeSuperblock: return true
        default: return metadata.hasChanges
        }
    }

    func requestCommit() {
        commitRequested = true
        lock.signal()
    }

    func waitForCommit(_ waiter: CommitWaiter) {
        commitWaiters.append(waiter)
        requestCommit()
    }

    func tell(_ waiters: [CommitWaiter], _ error: PoolError?) {
        for waiter in waiters {
            switch waiter {
            case .request(let engine, let request):
                self.engine(engine).post(.finish(request, error: error == nil ? 0 : EIO))
            case .completion(let completion):
                completion(error)
            }
        }
    }

    // MARK: - Draining

    func addDrain(_ stamp: UInt64, _ what: Drained) {
        drains.append((stamp, what))
        drainsPending.store(true, ordering: .sequentiallyConsistent)
    }

    /// Does what waited for I/O that has ended by now.
    func processDrains() {
        guard !drains.isEmpty else { return }
        var done = 0
        var resumesSpace = false
        while done < drains.count, epochs.hasDrained(drains[done].stamp) {
            switch drains[done].what {
            case .blocks(let blocks, let discard):
                if discard && options.passDiscardsDown && !worker.discardRefused
                    && failure == nil
                {
                    discards.append(blocks)
                    lock.signal()
                } else {
                    metadata.makeAvailable(blocks)
                    resumesSpace = true
                }
            case .pages(let addresses):
                for address in addresses { free(UnsafeMutableRawPointer(bitPattern: address)) }
            case .quiesced:
                worker.isQuiesced = true
                lock.signal()
            case .writesInPlace(let volume, let pages):
                grantsDrained(volume, pages, drains[done].stamp)
            }
            done += 1
        }
        drains.removeFirst(done)
        if drains.isEmpty { drainsPending.store(false, ordering: .sequentiallyConsistent) }
        if resumesSpace {
            refillSpareBlocks()
            resume(&spaceWaiters)
        }
    }

    // MARK: - Failure

    /// The pool can keep no promise any more: refuses changes, answers whoever waits, and rolls
    /// back to the last committed state as soon as no metadata write is in flight.
    func fail(_ error: PoolError) {
        guard failure == nil else { return }
        failure = error
        for volume in volumesByID.values { volume.closeGate() }
        // Blocks on their way belong to the transaction that is gone.
        drains.removeAll { if case .blocks = $0.what { return true } else { return false } }
        discards = DiscardQueue()
        spareBlocks = []
        reservations = 0
        let waiters = commitWaiters + worker.takeWaiters() + flushes.takeSettled(all: true)
        commitWaiters = []
        tell(waiters, error)
        for volume in volumesByID.values { resume(&volume.heldSteps) }
        resume(&spaceWaiters)
        resume(&metadataWaiters)
        resume(&drainWaiters)
        onFailure?(error)
        // The change that failed may have been made in half.
        metadataIsUnreadable = true
        if !worker.hasIOInFlight { rollBack() }
        lock.signal()
    }

    /// Reads see the last committed state again, and the metadata is marked as needing a check.
    func rollBack() {
        for volume in volumesByID.values {
            dropTable(of: volume)
        }
        // A device that takes no write any more can perhaps be read.
        try? ThinMetadata.setNeedsCheck(metadataDevice, true)
        do throws(MetadataError) {
            metadata = try ThinMetadata(metadataDevice, cacheBlocks: options.cacheBlocks)
            metadataIsUnreadable = false
        } catch {
            // It stays unreadable.
        }
    }
    /// The pool has failed, and the metadata has not been read anew, or could not be: what is not in
    /// the mapping tables cannot be read.
    private(set) var metadataIsUnreadable = false
    /// Called once, under the lock, when the pool fails: for the log. Set before the pool has a thread.
    public var onFailure: (@Sendable (PoolError) -> Void)?
    /// Called by the worker, under the lock, with what has become scarce: for the log. As above.
    public var onSpaceWarning: (@Sendable (String) -> Void)?

    func engine(_ index: Int) -> VolumeIO { engines[index]!.takeUnretainedValue() }

    func engineSlot() -> Int {
        if let free = engines.firstIndex(where: { $0 == nil }) { return free }
        engines.append(nil)
        return engines.count - 1
    }
}

/// What the engine asked for, or the errno that goes to the client: EIO, ENOSPC or EPERM.
enum Answer<Value> {
    case success(Value)
    case failure(Int32)
}
