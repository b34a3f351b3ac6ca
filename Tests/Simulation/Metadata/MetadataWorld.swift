// One history of the metadata: the real ThinMetadata on a simulated disk, driven as the pool drives
// it, and a model of what it has to hold.
//
// 1. Operations go on in the open transaction while the frozen one is written.
// 2. A call that is refused has changed nothing.
// 3. Every metadata block written is free in the committed state, and in each pinned one.
// 4. A data block is handed out only if it is in use nowhere: not in the open, the committing or the
//    committed state, not reserved, not waiting for `makeAvailable`.

import BlockIO
import ThinMetadata

final class MetadataWorld {
    /// The transaction that is being written.
    struct Commit {
        enum Phase { case blocks, flush, superblock, superblockFlush }

        let transaction: FrozenTransaction
        let model: MetadataModel
        var superblock: [UInt8]
        /// Indices of blocks not yet written, in the order in which they will be.
        var order: [Int]
        var phase = Phase.blocks
    }

    /// A committed state that is kept for a reader.
    struct Pin {
        let pin: CommittedPin
        let superblock: [UInt8]
        let used: Set<UInt64>
    }

    /// The call failed in the middle of a change: the pool has to be opened anew.
    struct Dropped: Error {}

    let options: MetadataOptions
    var random: SeededRandom
    let device: SparseDevice
    var metadata: ThinMetadata
    var log: ((String) -> Void)?
    var counts = MetadataCounts()

    /// The open transaction's state, and the ids in no particular, but in a repeatable order.
    var model: MetadataModel
    var ids: [UInt32] = []
    var committed: MetadataModel
    /// Block 0 and the blocks in use of the committed state.
    var committedSuperblock: [UInt8]
    var used: Set<UInt64> = []
    var commit: Commit?
    var pins: [Pin] = []

    /// For each data block whether it must not be handed out, and how many such blocks there are.
    var isTaken: [Bool]
    var taken = 0
    var reserved: [DataBlock] = []
    /// Freed by a durable transaction; I/O may still be under way.
    var draining: [DataBlock] = []

    /// Keys that were written: those near them are looked at and removed.
    var landmarks: [UInt64] = [0]
    /// What the kernel's metadata snapshot keeps, once it was taken.
    var held: MetadataModel?
    private let buffer = UnsafeMutableRawBufferPointer.allocate(
        byteCount: Layout.blockSize, alignment: Layout.blockSize)

    init(options: MetadataOptions, random: SeededRandom) throws {
        self.options = options
        self.random = random
        device = SparseDevice(blocks: options.metadataBlocks)
        try ThinMetadata.format(
            device, dataBlockSectors: 128, dataBlocks: options.dataBlocks)
        model = MetadataModel(
            dataBlocks: options.dataBlocks, metadataBlocks: UInt64(options.metadataBlocks))
        if let left = options.timeLeft {
            model.time = Mapping.maxTime - left
            try Self.setTime(model.time, on: device)
        }
        committed = model
        committedSuperblock = device.peek(0)
        isTaken = [Bool](repeating: false, count: Int(options.dataBlocks))
        metadata = try ThinMetadata(device, cacheBlocks: options.cacheBlocks)
        used = MetadataImage(device).blocksInUse
    }

    deinit { buffer.deallocate() }

    /// As if that many snapshots had been made before.
    private static func setTime(_ time: UInt32, on device: SparseDevice) throws {
        var superblock = device.peek(0)
        try superblock.withUnsafeMutableBytes {
            $0.baseAddress!.setLE32(SuperblockLayout.time, time)
            $0.baseAddress!.seal(as: .superblock, number: MetadataBlock(0))
            try device.write(at: 0, from: UnsafeRawBufferPointer($0))
        }
        try device.flush()
    }

    func note(_ what: @autoclosure () -> String) { log?(what()) }

    func require(_ condition: Bool, _ what: @autoclosure () -> String) throws {
        guard condition else { throw WorldFailure(description: what()) }
    }

    // MARK: - Running

    func run() throws {
        for _ in 0..<options.steps {
            do { try step() } catch is Dropped {
                try reopen(cutsPower: random.oneIn(2))
            }
            try verifyAvailable()
        }
        heal()
        do {
            while commit != nil { try advance() }
            try freeze()
            while commit != nil { try advance() }
        } catch is Dropped {
            throw WorldFailure(description: "the last commit failed without a fault")
        }
        try verifyPins()
        try reopen(cutsPower: true)
        if random.oneIn(4) {
            try takeApart()
            try reopen(cutsPower: true)
        }
        for _ in 0..<options.damagedStates {
            try MetadataDamage(device, log: log).spoilAndUse(&random)
            counts.damagedStates += 1
        }
    }

    private func step() throws {
        if options.powerCuts, random.oneIn(40) { return try reopen(cutsPower: true) }
        if options.kills, random.oneIn(60) { return try reopen(cutsPower: false) }
        if options.faults, random.oneIn(20) { strike() }
        if !device.disk.faults.isEmpty, random.oneIn(5) { heal() }
        if commit == nil {
            if random.oneIn(options.commitEvery) { try freeze() }
        } else {
            for _ in 0..<random.below(40) where commit != nil { try advance() }
            if random.oneIn(3) { while commit != nil { try advance() } }
        }
        if random.oneIn(2) { drain() }
        if random.oneIn(3) { metadata.trimCache() }
        if random.oneIn(4) { try writeCatalogue() }
        try operate()
    }

    /// One operation of those that the history has.
    private func operate() throws {
        var left = random.below(options.weights.reduce(0, +))
        let chosen = MetadataOptions.Operation.allCases.first {
            left -= options.weights[$0.rawValue]
            return left < 0
        }!
        note("\(chosen)")
        let isFirst = ids.isEmpty
        switch isFirst ? .create : chosen {
        case .create: try createSome()
        case .snapshot: try snapshotSome()
        case .write: try writeSome()
        case .remove: try removeSome()
        case .delete: try deleteSome()
        case .deleteSlice: try deleteSlice(anyID())
        case .look: try look()
        case .walk: try walk()
        case .exclusive: try askForExclusive()
        case .reserve: try reserveSome()
        case .pin: try pinOrUnpin()
        case .growData: try growData()
        case .growMetadata: try growMetadata()
        case .misuse: try misuse()
        }
        if isFirst, options.shape == .deep, let id = ids.first { try fill(id) }
    }

    // MARK: - Calls

    /// What a refused call must not have changed.
    private struct Numbers: Equatable {
        let hasChanges: Bool
        let dirty: Int
        let time: UInt32
        let available: UInt64
        let metadataFree: UInt64
    }

    private var numbers: Numbers {
        Numbers(
            hasChanges: metadata.hasChanges, dirty: metadata.dirtyBlocks, time: metadata.time,
            available: metadata.dataBlocksAvailable, metadataFree: metadata.metadataBlocksFree)
    }

    /// Makes a call that changes something; nil if it was refused for want of space.
    func change<Result>(_ body: () throws(MetadataError) -> Result) throws -> Result? {
        let before = numbers
        do throws(MetadataError) { return try body() } catch {
            switch error {
            case .outOfMetadataSpace:
                counts.outOfSpace += 1
                try require(
                    numbers == before,
                    "a call that was refused has changed something: "
                        + "\(before), now \(numbers)")
                return nil
            case .device where isStruck:
                note("a change fails: \(error)")
                throw Dropped()
            default: throw WorldFailure(description: "a change fails: \(error)")
            }
        }
    }

    /// Makes a call that changes nothing; nil if the device failed.
    func read<Result>(_ body: () throws(MetadataError) -> Result) throws -> Result? {
        let before = numbers
        do throws(MetadataError) { return try body() } catch {
            guard case .device = error, isStruck else {
                throw WorldFailure(description: "looking fails: \(error)")
            }
            try require(numbers == before, "looking has changed something")
            return nil
        }
    }

    // MARK: - Data blocks

    /// A data block to be mapped; nil if there is none, or only after the next commit.
    func allocate() throws -> DataBlock? {
        guard let block = try change(metadata.allocateDataBlock) else {
            throw WorldFailure(description: "finding a data block takes metadata space")
        }
        guard let block else {
            try require(
                taken == isTaken.count, "no data block is found, and \(isTaken.count - taken) are")
            return nil
        }
        try require(
            !isTaken[Int(block.rawValue)], "data block \(block.rawValue) is handed out in use")
        isTaken[Int(block.rawValue)] = true
        taken += 1
        return block
    }

    func release(_ blocks: some Sequence<DataBlock>) throws {
        for block in blocks {
            try require(isTaken[Int(block.rawValue)], "data block \(block.rawValue) is freed twice")
            isTaken[Int(block.rawValue)] = false
            taken -= 1
        }
    }

    private func drain() {
        let some = random.oneIn(2) ? draining.count : random.below(draining.count + 1)
        let blocks = Array(draining.suffix(some))
        draining.removeLast(some)
        metadata.makeAvailable(blocks)
        for block in blocks { isTaken[Int(block.rawValue)] = false }
        taken -= some
    }

    private func verifyAvailable() throws {
        try require(
            metadata.dataBlocksAvailable == UInt64(isTaken.count - taken),
            "\(metadata.dataBlocksAvailable) data blocks can be allocated, "
                + "where \(isTaken.count - taken) are due")
    }

    // MARK: - Commits

    func freeze() throws {
        guard let transaction = try change({ () throws(MetadataError) in try metadata.freeze() })
        else { throw WorldFailure(description: "a commit finds no metadata space") }
        var order = Array(0..<transaction.blocks)
        order.shuffle(using: &random)
        transaction.copySuperblock(to: buffer.baseAddress!)
        commit = Commit(
            transaction: transaction, model: model, superblock: Array(buffer), order: order)
        try require(!metadata.hasChanges, "there are changes after the freeze")
        note("freeze: \(transaction.blocks) blocks")
    }

    /// One I/O of the commit.
    func advance() throws {
        guard let commit else { return }
        do throws(DeviceError) {
            switch commit.phase {
            case .blocks:
                guard let index = commit.order.last else {
                    self.commit!.phase = .flush
                    return
                }
                let target = commit.transaction.copyBlock(index, to: buffer.baseAddress!)
                guard mayWrite(target.rawValue) else {
                    fatal = "block \(target.rawValue) is written, and a committed state uses it"
                    break
                }
                self.commit!.order.removeLast()
                try device.write(
                    at: target.rawValue * UInt64(Layout.blockSize),
                    from: UnsafeRawBufferPointer(buffer))
            case .flush:
                try device.flush()
                self.commit!.phase = .superblock
            case .superblock:
                self.commit!.phase = .superblockFlush
                commit.superblock.withUnsafeBytes { buffer.copyMemory(from: $0) }
                try device.write(at: 0, from: UnsafeRawBufferPointer(buffer))
            case .superblockFlush:
                try device.flush()
            }
        } catch {
            guard isStruck else { throw WorldFailure(description: "a commit fails: \(error)") }
            note("the commit fails: \(error)")
            throw Dropped()
        }
        if let fatal { throw WorldFailure(description: fatal) }
        if commit.phase == .superblockFlush { try finish(commit) }
    }

    private var fatal: String?

    private func mayWrite(_ block: UInt64) -> Bool {
        block > 0 && !used.contains(block) && !pins.contains { $0.used.contains(block) }
    }

    private func finish(_ commit: Commit) throws {
        self.commit = nil
        counts.commits += 1
        let freed = metadata.committed(commit.transaction)
        committed = commit.model
        committedSuperblock = commit.superblock
        used = MetadataImage(device).blocksInUse
        let blocks = freed.discarded + freed.replaced
        try verifyFreed(blocks)
        draining += blocks
        note("committed: \(blocks.count) data blocks freed")
    }

    /// What was freed is used by nobody.
    private func verifyFreed(_ blocks: [DataBlock]) throws {
        if blocks.isEmpty { return }
        try release(blocks)
        for state in [committed, held ?? committed] {
            for device in state.devices.values {
                for mapping in device.mappings.values where !isTaken[Int(mapping.block.rawValue)] {
                    throw WorldFailure(
                        description: "data block \(mapping.block.rawValue) is freed, and mapped")
                }
            }
        }
        for block in blocks { isTaken[Int(block.rawValue)] = true }
        taken += blocks.count
    }

    // MARK: - Pins

    private func pinOrUnpin() throws {
        if pins.count < 2, pins.isEmpty || random.oneIn(3) {
            pins.append(
                Pin(pin: metadata.pinCommitted(), superblock: committedSuperblock, used: used))
        } else {
            try verifyPins()
        }
    }

    /// The pinned states are whole, whatever has been committed since.
    private func verifyPins() throws {
        for pin in pins {
            var check = MetadataCheck(device: ScratchDevice(device), superblock: pin.superblock)
            let report = check.run()
            try require(
                report.isClean,
                "the check of a pinned state finds: \(report.findings.map(\.description))")
        }
        if random.oneIn(4) { metadata.breakPins() }
        for pin in pins { metadata.unpinCommitted(pin.pin) }
        pins = []
    }
}
