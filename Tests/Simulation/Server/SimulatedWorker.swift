// The pool's background work on simulated disks: the I/Os of a step one at a time, in any order.

import BlockIO
import Glibc
import ThinMetadata
import ThinPool

final class SimulatedWorker {
    private var waiting: [(index: Int, io: WorkerIO)] = []
    private var results: [Int32] = []
    /// The last step was not "wait".
    private(set) var isBusy = false
    /// The next write of a catalogue fails, and does nothing.
    var failsCatalogue = false
    /// The next superblock takes long.
    var delaysSuperblock = false
    var isWritingSuperblock: Bool {
        if case .writeSuperblock? = waiting.first?.io { return true }
        return false
    }
    /// How often its I/O is still passed over.
    private var patience = 0

    var hasIO: Bool { !waiting.isEmpty }

    func reset() {
        waiting = []
        results = []
        patience = 0
        delaysSuperblock = false
        failsCatalogue = false
        isBusy = true
    }

    func step(_ world: World) {
        let pool = world.pool!
        if !waiting.isEmpty {
            if patience > 0 {
                patience -= 1
                return
            }
            let (index, io) = waiting.remove(at: world.random.below(waiting.count))
            results[index] = perform(io, world)
            isBusy = true
            if waiting.isEmpty { pool.stepDone(results, now: world.clock) }
            return
        }
        switch pool.nextStep(now: world.clock) {
        case .io(let io):
            waiting = io.enumerated().map { ($0, $1) }
            results = Array(repeating: 0, count: io.count)
            if world.random.below(world.options.slowOneIn) == 0 {
                patience = world.random.below(30)
            }
            if delaysSuperblock, isWritingSuperblock {
                delaysSuperblock = false
                patience = 60
            }
            isBusy = true
        case .again:
            isBusy = true
        case .wait:
            isBusy = false
        }
    }

    private func perform(_ io: WorkerIO, _ world: World) -> Int32 {
        do throws(DeviceError) {
            switch io {
            case .flushData: try world.dataDisk.flush()
            case .flushMetadata: try world.metadataDisk.flush()
            case .writeMetadata(let transaction, let index):
                try write(world.metadataDisk) { transaction.copyBlock(index, to: $0) }
            case .writeSuperblock(let transaction):
                try writeSuperblock(transaction, to: world.metadataDisk)
                world.metadataDisk.makeDurable(at: 0, length: Layout.blockSize)
                world.counts.commits += 1
                world.note("a commit")
            case .writeData where failsCatalogue:
                failsCatalogue = false
                world.meter.struck += 1
                return EIO
            case .writeData(let offset, let bytes):
                try world.dataDisk.write(at: offset, from: bytes)
            case .discardData(let offset, let length):
                try world.dataDisk.tryDiscard(at: offset, length: length)
            }
            return 0
        } catch { return error.code }
    }

    /// All of a transaction at once, as another program would write it.
    func commit(_ transaction: FrozenTransaction, to disk: SimulatedDisk) throws {
        for index in 0..<transaction.blocks {
            try write(disk) { transaction.copyBlock(index, to: $0) }
        }
        try disk.flush()
        try writeSuperblock(transaction, to: disk)
        try disk.flush()
    }

    private func write(
        _ disk: SimulatedDisk, _ body: (UnsafeMutableRawPointer) -> MetadataBlock
    ) throws(DeviceError) {
        let buffer = UnsafeMutableRawPointer.allocate(
            byteCount: Layout.blockSize, alignment: 4096)
        defer { buffer.deallocate() }
        let number = body(buffer)
        try disk.write(
            at: number.rawValue * UInt64(Layout.blockSize),
            from: UnsafeRawBufferPointer(start: buffer, count: Layout.blockSize))
    }

    private func writeSuperblock(
        _ transaction: FrozenTransaction, to disk: SimulatedDisk
    ) throws(DeviceError) {
        try write(disk) {
            transaction.copySuperblock(to: $0)
            return MetadataBlock(0)
        }
    }

    /// The machine or the server ends: the writes of this step may reach the disk's cache, or not.
    func abandon(_ world: World) {
        for (_, io) in waiting where world.random.oneIn(2) {
            switch io {
            case .flushData, .flushMetadata:
                break
            case .writeSuperblock(let transaction):
                // In flight: old or new, but not promised.
                try? writeSuperblock(transaction, to: world.metadataDisk)
            case .writeMetadata, .writeData, .discardData:
                _ = perform(io, world)
            }
        }
    }

    var inFlight: Int { waiting.count }

    /// The writes that are in flight, done on copies of the disks.
    func copyWrites(toMetadata metadata: SimulatedDisk, data: SimulatedDisk) {
        for (_, io) in waiting {
            switch io {
            case .flushData, .flushMetadata:
                break
            case .writeMetadata(let transaction, let index):
                try? write(metadata) { transaction.copyBlock(index, to: $0) }
            case .writeSuperblock(let transaction):
                try? writeSuperblock(transaction, to: metadata)
            case .writeData(let offset, let bytes):
                try? data.write(at: offset, from: bytes)
            case .discardData(let offset, let length):
                data.discard(at: offset, length: length)
            }
        }
    }
}
