// What happens to disks and server from outside: faults, power cuts, a killed server, damage on the
// metadata disk; and how the pool comes back afterwards.

import BlockIO
import Glibc
import ThinMetadata
import ThinPool

extension World {
    // MARK: - Faults

    /// From now on some I/Os of the disk fail.
    func strike(_ disk: SimulatedDisk) {
        var operations = Fault.Operations(rawValue: UInt8(1 + random.below(31)))
        if random.oneIn(2) {
            operations = [.read, .write, .flush][random.below(3)]
        }
        var range: Range<Int>?
        if random.oneIn(2) {
            let all = disk.bytes.count / SimulatedDisk.sector
            let first = random.below(all)
            range = first..<min(all, first + 1 + random.below(all / 4))
        }
        disk.faults.append(
            Fault(
                operations, sectors: range,
                remaining: [1, 1, 1 + random.below(6), Fault.forEver][random.below(4)],
                code: operations == .write && random.oneIn(4) ? ENOSPC : EIO))
    }

    func heal() {
        metadataDisk.faults = []
        dataDisk.faults = []
        meter.heal()
    }

    // MARK: - Crashes

    /// The power goes, or (`keepingCaches`) only the server's process: what the disks have in their
    /// caches is then still there, and still not on the medium.
    func crash(keepingCaches: Bool) throws {
        note(keepingCaches ? "the server is killed" : "the power goes")
        if keepingCaches { counts.kills += 1 } else { counts.powerCuts += 1 }
        try end()
        if !keepingCaches {
            metadataDisk.cutPower(&random)
            dataDisk.cutPower(&random)
        }
        try comeBack(isDurable: !keepingCaches)
    }

    /// The server is gone, with all that it had in memory; what was in flight reaches the disks or
    /// does not.
    private func end() throws {
        severClients()
        worker.abandon(self)
        for reactor in reactors { reactor.io.abandon { random.oneIn(2) } }
        let kept = [metadataDisk, dataDisk].map { disk in
            let copy = disk.copy()
            copy.forgetLost()
            copy.faults = disk.faults
            copy.meter = meter
            return copy
        }
        try bury()
        metadataDisk = kept[0]
        dataDisk = kept[1]
    }

    /// What is left of the server in memory comes to its end on devices that do nothing any more:
    /// everything is answered, nothing hangs, all memory is given back.
    func bury() throws {
        pool.onFailure = nil
        queries = []
        severClients()
        for client in broken { client.wire.isReset = true }
        for disk in [metadataDisk, dataDisk] {
            disk.faults = [Fault(.any, remaining: Fault.forEver)]
            disk.meter = IOMeter()
        }
        var patience = 20_000
        while reactors.contains(where: \.isBusy) {
            for reactor in reactors {
                reactor.passTime()
                reactor.turn {
                    for case let place? in reactor.places {
                        place.wire.isClosedByClient = true
                        if place.canReceive { reactor.receive(place, limit: 1) }
                        reactor.send(place, limit: 1)
                    }
                    while !reactor.io.pending.isEmpty {
                        let (tag, result) = reactor.io.complete(0)
                        reactor.complete(tag, result)
                    }
                }
            }
            worker.step(self)
            clock += 10_000_000
            patience -= 1
            if patience == 0 {
                throw WorldFailure(
                    description: "requests are never answered after the devices are gone")
            }
        }
        for reactor in reactors { reactor.close() }
        reactors = []
        pool = nil
        worker.reset()
    }

    /// The pool failed: everything is answered, then its owner restarts the server.
    func recover() throws {
        counts.failures += 1
        try settle()
        try checkFailed()
        try crash(keepingCaches: random.oneIn(2))
    }

    /// Opens what is left on the disks, and looks at all of it.
    private func comeBack(isDurable: Bool) throws {
        if !(metadataDisk.faults.isEmpty && dataDisk.faults.isEmpty) {
            // With the faults still there opening may fail, with an error and no more damage.
            _ = try? Pool(metadata: metadataDisk, data: dataDisk, options: poolOptions)
        }
        heal()
        if let rotten {
            metadataDisk.heal(block: rotten.block, of: Layout.blockSize, old: rotten.old)
            self.rotten = nil
        }
        isReadOnly = false
        repeat {
            try checkMetadata()
            if let inspect {
                self.inspect = nil
                try inspect(metadataDisk.bytes)
            }
            let probe = try Pool(metadata: metadataDisk, data: dataDisk, options: .forReading)
            if probe.status().needsCheck {
                try checkUnchecked()
                // The check has found nothing: its owner clears the mark.
                try ThinMetadata.setNeedsCheck(metadataDisk, false)
            }
            resolveChanges(Set(probe.volumeNames()))
            try open()
            guard isDurable, random.oneIn(6) else { break }
            // The power goes again, while the pool is just being opened.
            for _ in 0..<random.below(12) { worker.step(self) }
            note("the power goes again")
            counts.powerCuts += 1
            try end()
            metadataDisk.cutPower(&random)
            dataDisk.cutPower(&random)
        } while true
        try verifyAll(after: isDurable ? .powerCut : .kill)
    }

    private func checkMetadata() throws {
        var check = MetadataCheck(device: metadataDisk)
        let report = check.run()
        guard report.isClean else {
            throw WorldFailure(
                description: "the self-check after a crash finds: "
                    + "\(report.findings.map(\.description))")
        }
    }

    // MARK: - Damage

    /// A bit changes on the metadata disk. Whatever is read afterwards is right, or an error.
    func rot() throws {
        counts.rot += 1
        // Once on copies, from a fresh start, and once under the running server.
        let healthy = metadataDisk.copy()
        healthy.blocksRead = []
        try openAndRead(healthy)
        let blocks = healthy.blocksRead!.sorted()
        for _ in 0..<8 {
            let metadata = metadataDisk.copy()
            metadata.random = SeededRandom(seed: random.next())
            _ = metadata.rot(block: blocks[random.below(blocks.count)], of: Layout.blockSize)
            try openAndRead(metadata)
        }
        try rotCatalogue()
        guard failedAt == nil else { return }
        let block = randomMetadataBlock()
        rotten = (block, metadataDisk.rot(block: block, of: Layout.blockSize))
        hasRot = true
        for _ in 0..<random.below(60) {
            if random.oneIn(4), let client = clients.first(where: { $0.state == .ready }),
                !client.isLeaving,
                let request = request(.read, client.model, 0..<client.model.sectors)
            {
                submit(request, by: client)
            }
            try progress()
        }
        // The power may have gone meanwhile: then it is healed.
        if rotten != nil { try crash(keepingCaches: true) }
        hasRot = false
    }

    /// Reads all that a pool shows which is opened from this disk.
    private func openAndRead(_ metadata: SimulatedDisk) throws {
        let data = dataDisk.copy()
        guard let pool = try? Pool(metadata: metadata, data: data, options: poolOptions) else {
            return
        }
        for name in pool.volumeNames() {
            guard let model = models[name] else { continue }
            try examine(model, in: pool, on: data, mayFail: true)
        }
    }

    /// A bit changes in a catalogue: either that is noticed, or it was an old one.
    private func rotCatalogue() throws {
        let magic = Array("WAFERCAT".utf8)
        let places = dataDisk.bytes.withUnsafeBytes { bytes in
            (0..<bytes.count / blockSize).filter {
                bytes[($0 * blockSize)..<($0 * blockSize + 8)].elementsEqual(magic)
            }
        }
        func names(_ disk: SimulatedDisk) throws -> [VolumeInfo] {
            try Pool(metadata: metadataDisk.copy(), data: disk, options: .forReading).volumeList()
        }
        guard let right = try? names(dataDisk.copy()) else { return }
        for place in places {
            let rotten = dataDisk.copy()
            _ = rotten.rot(block: place, of: blockSize)
            guard let left = try? names(rotten), left != right else { continue }
            throw WorldFailure(description: "a rotten catalogue is believed")
        }
    }

    /// Low blocks are the ones in use.
    private func randomMetadataBlock() -> Int {
        let all = metadataDisk.bytes.count / Layout.blockSize
        let drawn = random.below(random.oneIn(4) ? all : min(all, 40))
        // Mostly one that is or was in use.
        guard !random.oneIn(4) else { return drawn }
        let used = metadataDisk.bytes.withUnsafeBytes { bytes in
            (0..<all).filter {
                bytes.loadUnaligned(fromByteOffset: $0 * Layout.blockSize, as: UInt64.self) != 0
            }
        }
        return used.isEmpty ? drawn : used[random.below(used.count)]
    }

    /// The disk loses a write of the metadata, or puts it in another place, and says nothing.
    func loseWrite() throws {
        guard failedAt == nil, metadataDisk.faults.isEmpty else { return }
        if random.oneIn(2) {
            metadataDisk.losesNextWrite = true
        } else {
            metadataDisk.misdirectsNextWrite =
                UInt64(1 + random.below(metadataDisk.bytes.count / Layout.blockSize - 1))
                * UInt64(Layout.blockSize)
        }
        for _ in 0..<500 where metadataDisk.isToLose && failedAt == nil { try progress() }
        if metadataDisk.isToLose {
            metadataDisk.losesNextWrite = false
            metadataDisk.misdirectsNextWrite = nil
        } else if metadataDisk.hasLostWrite {
            counts.lostWrites += 1
            try examineDamage()
        }
    }

    /// After such a loss: mostly the check finds it, or it did no harm. Whatever it did, a server
    /// that opens the pool does not come to grief.
    private func examineDamage() throws {
        let commits = counts.commits
        for _ in 0..<400 where counts.commits == commits && failedAt == nil { try progress() }
        let metadata = metadataDisk.copy()
        var check = MetadataCheck(device: metadata)
        let isFound = !check.run().isClean
        guard let pool = try? Pool(metadata: metadata, data: dataDisk.copy(), options: poolOptions)
        else {
            if isFound { return }
            throw WorldFailure(description: "a pool that the check finds clean cannot be opened")
        }
        for name in pool.volumeNames() {
            guard let model = models[name] else { continue }
            do { try examine(model, in: pool, on: dataDisk.copy(), mayFail: isFound) } catch {
                if !isFound { counts.unseenLosses = 1 }
            }
        }
    }
}
