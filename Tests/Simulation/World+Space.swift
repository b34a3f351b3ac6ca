// Pools that are full, that are read-only, and that have failed: what they still do, and what they
// no longer do.

import Glibc
import ThinMetadata
import ThinPool

extension World {
    // MARK: - Full

    /// Every block that nobody maps can be had, but for those kept back; what is full can be
    /// emptied.
    ///
    /// Nothing else goes on meanwhile, so that the numbers have to be right.
    func checkSpace() throws {
        guard failedAt == nil, !hasRot, !isReadOnly, !meter.isArmed else { return }
        try settle()
        guard failedAt == nil else { return }
        heal()
        leaveEveryone()
        try rest()
        guard failedAt == nil else { return }
        counts.fills += 1
        let struck = meter.struck
        let before = pool.status().dataBlocksUsed
        try fillWithData()
        if options.metadataBlocks <= 96 { try fillWithVolumes() }
        try rest()
        guard failedAt == nil, meter.struck == struck else { return }
        let after = pool.status()
        // The first catalogue of all needs a block.
        guard after.dataBlocksUsed <= max(before, 1), after.deleting == 0 else {
            throw WorldFailure(
                description: "\(before) blocks were in use before the pool was filled and emptied, "
                    + "\(after.dataBlocksUsed) afterwards")
        }
    }

    private func leaveEveryone() {
        for client in clients where !client.isLeaving { client.leave() }
        for wire in visitors { wire.isClosedByClient = true }
        visitors = []
    }

    /// Until nothing is open, dirty or on its way.
    private func rest() throws {
        var patience = 100_000
        repeat {
            if !(try progress()) { clock += 100_000_000 }
            patience -= 1
            guard patience > 0 else {
                throw WorldFailure(description: "the pool does not come to rest")
            }
        } while failedAt == nil
            && (!pool.isAtRest || worker.isBusy || worker.hasIO || !clients.isEmpty
                || !broken.isEmpty || reactors.contains(where: \.isBusy))
    }

    private func fillWithData() throws {
        let status = pool.status()
        let name = name()
        let blocks = Int(status.dataBlocks)
        let made = ask(.create(name: name, size: UInt64(blocks * blockSize)))
        try settle()
        guard case .some(.none) = made.result, failedAt == nil else { return }
        try rest()
        let volume = pool.open(exportNamed: name)!
        for block in 0..<blocks {
            let error = writeSector(volume, block * sectorsPerBlock)
            if error == ENOSPC { break }
            guard error == 0 else {
                throw WorldFailure(description: "filling the pool ends with errno \(error)")
            }
        }
        pool.close(volume)
        try rest()
        guard failedAt == nil else { return }
        let full = pool.status()
        let left = full.dataBlocks - full.dataBlocksUsed
        // The catalogue has one block and keeps back another two.
        let hasMetadata = full.metadataBlocksUsed + 150 < full.metadataBlocks
        guard left <= 2 || !hasMetadata else {
            throw WorldFailure(
                description: "\(left) of \(full.dataBlocks) blocks cannot be had, though the pool "
                    + "is at rest")
        }
        try empty(of: [name])
    }

    /// A write with nothing else going on; its errno.
    private func writeSector(_ volume: Volume, _ sector: Int) -> Int32 {
        let model = models[volume.name]!
        let value = nextWriteValue()
        var words = [UInt64](repeating: value, count: 64)
        let begun = time
        model.begin(sector..<sector + 1, value: value, at: begun)
        model.touch(sector / sectorsPerBlock..<sector / sectorsPerBlock + 1, value: nil)
        let error = words.withUnsafeMutableBytes {
            perform(.write, volume, sector: sector, $0, in: pool, on: dataDisk)
        }
        time += 1
        model.end(
            sector..<sector + 1, begun: begun, at: time, isAcknowledged: error == 0,
            isDurable: false)
        time += 1
        return error
    }

    /// Makes volumes, and snapshots of them, until there is no metadata left for another.
    private func fillWithVolumes() throws {
        var names: [String] = []
        // The others share what has been written to them.
        let newOneIn: UInt64 = [2, 6][random.below(2)]
        while names.count < 100 {
            let name = name()
            let isNew = names.isEmpty || !options.snapshots || random.oneIn(newOneIn)
            let made = ask(
                isNew
                    ? .create(name: name, size: 512)
                    : .snapshot(origin: names[random.below(names.count)], name: name))
            try settle()
            guard failedAt == nil else { return }
            guard case .some(.none) = made.result else { break }
            names.append(name)
            if isNew { try write(name) }
        }
        try rest()
        // What is written now takes leaves that were shared. Some time it finds no room for its mapping,
        // waits for a commit if there is one, and is told.
        for name in names where failedAt == nil && names.count > 4 && names.contains(name) {
            let deletion = random.oneIn(6) ? ask(.delete(name: names.removeLast())) : nil
            for _ in 0..<random.below(30) { try progress() }
            guard names.contains(name) else { break }
            if try write(name) == ENOSPC, random.oneIn(2) {
                // Nor when there is no commit to wait for.
                try rest()
                try write(name)
            }
            try settle()
            if let deletion { try checkDeletion(deletion) }
        }
        try empty(of: names)
    }

    /// A write that the pool may be too full for; its errno.
    @discardableResult private func write(_ name: String) throws -> Int32 {
        guard failedAt == nil else { return EIO }
        let volume = pool.open(exportNamed: name)!
        let error = writeSector(volume, 0)
        pool.close(volume)
        guard error == 0 || error == ENOSPC || failedAt != nil else {
            throw WorldFailure(description: "a write to a full pool ends with errno \(error)")
        }
        return error
    }

    /// However full it is, volumes can be deleted.
    private func empty(of names: [String]) throws {
        for name in names {
            try rest()
            guard failedAt == nil else { return }
            let deletion = ask(.delete(name: name))
            try settle()
            try checkDeletion(deletion)
        }
    }

    private func checkDeletion(_ deletion: Change) throws {
        if case .some(.some(let error)) = deletion.result, failedAt == nil {
            throw WorldFailure(description: "a full pool cannot be emptied: \(error)")
        }
    }

    // MARK: - Read-only

    /// The pool is served read-only for a while: all is as it was.
    func beReadOnly() throws {
        guard failedAt == nil, !isReadOnly, !meter.isArmed else { return }
        try settle()
        if failedAt != nil { return try recover() }
        try verifyAll()
        heal()
        try close()
        // A fault may have struck while it was closed; then it is open already.
        if pool != nil { return }
        try open(readOnly: true)
        counts.readOnlyTimes += 1
        let disks = [metadataDisk, dataDisk]
        let before = disks.map(\.bytes)
        for _ in 0..<10 + random.below(20) {
            switch random.below(8) {
            case 0:
                let name = name()
                ask(.create(name: name, size: 512))
            case 1:
                if let model = randomModel() { ask(.snapshot(origin: model.name, name: name())) }
            case 2:
                if let model = randomModel(), !model.isGoing { ask(.delete(name: model.name)) }
            default:
                try send()
            }
            for _ in 0..<random.below(6) { try progress() }
            // The power has gone, and the pool is open again.
            guard isReadOnly else { return }
        }
        try settle()
        guard isReadOnly else { return }
        try checkRefusal(pool, on: dataDisk)
        try verifyAll()
        guard disks.map(\.bytes) == before else {
            throw WorldFailure(description: "a pool that is open read-only has been written to")
        }
        try close()
        if pool == nil { try open() }
    }

    /// The engine itself takes no write, whatever the exports say.
    private func checkRefusal(_ pool: Pool, on disk: SimulatedDisk) throws {
        var bytes = [UInt8](repeating: 0, count: 512)
        for name in pool.volumeNames() {
            guard let volume = pool.open(exportNamed: name) else { continue }
            defer { pool.close(volume) }
            for operation in [VolumeOperation.write, .writeZeroes, .trim] {
                let error = bytes.withUnsafeMutableBytes {
                    perform(operation, volume, sector: 0, $0, in: pool, on: disk)
                }
                // A trim of a part of a block does nothing anywhere.
                guard error == EPERM || operation == .trim && volume.size > 512 else {
                    throw WorldFailure(
                        description: "\(operation) of \(name), which is read-only, ends with "
                            + "errno \(error)")
                }
            }
        }
    }

    /// A pool that needs a check can be opened and read, and not changed.
    func checkUnchecked() throws {
        let disks = [metadataDisk.copy(), dataDisk.copy()]
        let pool = try Pool(metadata: disks[0], data: disks[1], options: poolOptions)
        guard pool.status().mode == .readOnly else {
            throw WorldFailure(description: "a pool that needs a check is open for writing")
        }
        try checkRefusal(pool, on: disks[1])
        guard disks[0].bytes == metadataDisk.bytes, disks[1].bytes == dataDisk.bytes else {
            throw WorldFailure(description: "a pool that needs a check has been written to")
        }
    }

    // MARK: - Failed

    /// A pool that has failed says so on its disk, and shows what will be found there: unless the
    /// metadata disk kept it from that, too.
    func checkFailed() throws {
        while worker.hasIO { worker.step(self) }
        guard failedAt != nil, rotten == nil, !hasRot, !isDamaged, !meter.isArmed,
            metadataDisk.struck == metadataStruckAtFailure
        else { return }
        let metadata = metadataDisk.copy()
        // Not even a power cut undoes it.
        metadata.cutPower { _ in false }
        let data = dataDisk.copy()
        let reopened = try Pool(metadata: metadata, data: data, options: .forReading)
        guard reopened.status().needsCheck else {
            throw WorldFailure(description: "a pool that has failed is not marked as such")
        }
        let faults = metadataDisk.faults
        metadataDisk.faults = []
        defer { metadataDisk.faults = faults }
        let names = Set(pool.volumeNames()).intersection(reopened.volumeNames())
        for name in names.sorted() {
            guard let model = models[name], !model.isGoing else { continue }
            let shown = try read(model, in: pool, on: data).get()
            guard try shown == read(model, in: reopened, on: data).get() else {
                throw WorldFailure(
                    description: "the failed pool shows of \(name) what is not committed")
            }
        }
    }
}
