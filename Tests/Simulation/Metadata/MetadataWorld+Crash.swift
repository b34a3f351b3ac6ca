// What happens to the disk from outside, and how the pool comes back afterwards.

import BlockIO
import Glibc
import ThinMetadata

extension MetadataWorld {
    // MARK: - Faults

    var isStruck: Bool { !device.disk.faults.isEmpty }

    /// Some of the next I/Os fail.
    func strike() {
        let operations: Fault.Operations = [.read, .write, .flush, .any][random.below(4)]
        device.disk.faults.append(
            Fault(operations, remaining: [1, 1, 3, Fault.forEver][random.below(4)]))
        note("faults: \(operations)")
    }

    func heal() {
        device.disk.faults = []
    }

    // MARK: - Crashes

    /// The power goes, or only the process, which leaves the disk its cache. What is found is one
    /// commit's state: the last durable one's, or that whose superblock was being written.
    func reopen(cutsPower: Bool) throws {
        note(cutsPower ? "the power goes" : "the process ends")
        counts.faults += device.disk.meter.struck
        device.disk.meter.struck = 0
        if isStruck, random.oneIn(2) {
            // With the faults still there opening may fail, and does no harm.
            _ = try? ThinMetadata(device, cacheBlocks: options.cacheBlocks)
        }
        heal()
        counts.reopenings += 1
        device.disk.forgetLost()
        if cutsPower {
            counts.powerCuts += 1
            device.disk.cutPower(&random)
        }
        // As a pool does that is opened: what is read from here on stays.
        try device.flush()
        try resolve()
        try verifyImage()
        if random.oneIn(6) { try markForCheck() }
        if options.metadataSnapshot, held == nil, random.oneIn(2) {
            try takeMetadataSnapshot()
        }
        try open()
    }

    private func resolve() throws {
        let superblock = device.peek(0)
        if let commit, commit.phase == .superblockFlush, superblock == commit.superblock {
            note("the state that was being committed")
            committed = commit.model
        } else {
            try require(
                superblock == committedSuperblock, "the superblock is of no commit's state")
        }
        committedSuperblock = superblock
        commit = nil
        model = committed
        ids = model.ids.filter { $0 != Self.catalogue }
        pins = []
        reserved = []
        draining = []
        used = MetadataImage(device).blocksInUse
        isTaken = [Bool](repeating: false, count: Int(model.dataBlocks))
        for state in [model, held ?? model] {
            for device in state.devices.values {
                for mapping in device.mappings.values {
                    isTaken[Int(mapping.block.rawValue)] = true
                }
            }
        }
        taken = isTaken.lazy.filter { $0 }.count
    }

    private func verifyImage() throws {
        var check = MetadataCheck(device: ScratchDevice(device))
        let report = check.run()
        try require(
            report.isClean, "the check after a crash finds: \(report.findings.map(\.description))")
        try require(
            report.dataBlocksUsed == UInt64(taken) && report.devices == model.devices.count,
            "the check counts \(report.devices) devices and \(report.dataBlocksUsed) data blocks")
    }

    /// Opens it twice: the second time finds what the first one found.
    private func open() throws {
        let writes = device.disk.writes
        for _ in 0..<2 {
            metadata = try ThinMetadata(device, cacheBlocks: options.cacheBlocks)
            try model.verify(metadata)
            try require(
                metadata.dataBlocksUsed == UInt64(taken)
                    && metadata.metadataBlocksUsed == UInt64(used.count)
                    && !metadata.hasChanges && metadata.dirtyBlocks == 0,
                "\(metadata.dataBlocksUsed) data blocks and \(metadata.metadataBlocksUsed) "
                    + "metadata blocks in use, where \(taken) and \(used.count) are due")
            if !random.oneIn(4) { break }
        }
        try require(device.disk.writes == writes, "opening a pool has written to it")
    }

    /// With the mark everything can be read and nothing changed.
    private func markForCheck() throws {
        try ThinMetadata.setNeedsCheck(device, true)
        metadata = try ThinMetadata(device, cacheBlocks: options.cacheBlocks)
        try model.verify(metadata)
        let error = MetadataError.needsCheck(path: device.path)
        try expect(error) { () throws(MetadataError) in try metadata.createThin(ThinDeviceID(1)) }
        try expect(error) { () throws(MetadataError) in try metadata.growMetadata() }
        try expect(error) { () throws(MetadataError) in _ = try metadata.freeze() }
        try ThinMetadata.setNeedsCheck(device, false)
        committedSuperblock = device.peek(0)
    }

    /// What the kernel does: a copy of the superblock that shares both trees of devices.
    private func takeMetadataSnapshot() throws {
        let image = MetadataImage(device)
        let roots = [SuperblockLayout.dataMappingRoot, SuperblockLayout.deviceDetailsRoot]
            .map { image.superblock.le64($0) }
        guard let copy = (1..<UInt64(image.blockCount)).first(where: { !used.contains($0) })
        else { return }
        let scratch = ScratchDevice(device)
        scratch[copy] = scratch[0]
        scratch.edit(copy, .superblock) {
            $0.setLE64(8, copy)
            memset($0 + SuperblockLayout.dataSpaceMapRoot, 0, 256)
        }
        image.setCount(copy, 1, on: scratch)
        for root in roots { image.setCount(root, 2, on: scratch) }
        scratch.edit(0, .superblock) {
            let allocated =
                SuperblockLayout.metadataSpaceMapRoot + SpaceMapRootLayout.allocatedCount
            $0.setLE64(SuperblockLayout.heldRoot, copy)
            $0.setLE64(allocated, $0.le64(allocated) + 1)
        }
        try scratch.apply()
        try device.flush()
        held = model
        note("a metadata snapshot in block \(copy)")
        committedSuperblock = device.peek(0)
        used = MetadataImage(device).blocksInUse
        try verifyImage()
    }
}
