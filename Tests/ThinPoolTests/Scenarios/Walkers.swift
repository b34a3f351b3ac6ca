// btrfs, 2016: device replace walked over the committed tree with a cursor, and what was written
// at the wrong moment, to the wrong side of the cursor, never reached the new device.
//
// The walkers that exist here: the deletion of a large volume, which goes on in slices while
// clients write, and the check of a pool that is being used. What is changed behind, at and beyond
// the cursor is neither missed nor damaged, and a check sees exactly one committed state.

import Glibc
import Simulation
import Testing
import ThinMetadata
import ThinPool

@Suite("btrfs 2016: walkers") struct Walkers {
    private static let block = Bench.blockSize
    private static let kept = LargeVolume.keptBytes.first!

    // MARK: - Background deletion

    @Test(
        "background deletion: what other volumes do between its slices is theirs",
        arguments: UInt64(1)...3)
    func deletionBesideClients(_ seed: UInt64) throws {
        let (bench, ledger) = try LargeVolume.bench()
        ledger.create("v", blocks: 4)
        try ledger.settle()
        let start = bench.recording.now
        bench.order = SeededRandom(seed: seed)
        var clients = RandomClients(ledger, seed: seed)
        clients.deletions = false
        clients.snapshots = false
        ledger.delete(LargeVolume.name)
        var left: Set<UInt64> = []
        for _ in 0..<60 {
            try clients.act(steps: 3)
            if let deleted = try bench.pool.volumeList().first(where: { $0.state == .deleting }) {
                left.insert(deleted.mappedBytes)
            }
        }
        try ledger.settle()
        bench.order = nil
        try bench.rest()
        #expect(left.count >= 2, "it went in one slice: \(left)")
        #expect(bench.pool.status().deleting == 0)
        #expect(bench.pool.status().dataBlocksUsed < 30)
        try ledger.verify()
        #expect(try Orders(bench).violations == [])
        // What was cut in the middle goes on, and takes nothing of the others with it.
        var cut = PowerCut(bench)
        cut.exhaustiveLimit = 0
        cut.samples = 0
        var states = 0
        try cut.forEachState(after: start) { survivors in
            states += 1
            guard states % 12 == 0 else { return }
            let again = try Bench(after: survivors)
            try again.rest()
            try requireCleanMetadata(again, survivors.what)
            let bytes = try again.sectors(again.volume(LargeVolume.kept), blocks: 0..<4)
            #expect(bytes.allSatisfy { $0 == Self.kept })
            if again.pool.volumeNames().contains("v") {
                try ledger.verify("v", in: again, cutAt: survivors.time, survivors.what)
            }
        }
        #expect(states > 24)
    }

    /// The volume that goes and its snapshot share every leaf that the walker comes to. The
    /// snapshot is written and unmapped before, at and behind the walker's place.
    @Test("background deletion: a snapshot that shares all blocks keeps them, changed or not")
    func deletionBesideASnapshot() throws {
        let (bench, _) = try LargeVolume.bench(metadataBlocks: 150)
        let large = try bench.volume(LargeVolume.name)
        let marks = Array(stride(from: 0, to: LargeVolume.blocks, by: 97))
        for mark in marks {
            #expect(try bench.write(0x51, large, at: mark * Self.block, length: 4096) == 0)
        }
        try bench.change(.snapshot(origin: LargeVolume.name, name: "twin"))
        let twin = try bench.volume("twin")
        let deletion = bench.ask(.delete(name: LargeVolume.name))
        var expected: [Int: UInt8] = Dictionary(uniqueKeysWithValues: marks.map { ($0, 0x51) })
        var random = SeededRandom(seed: 5)
        var changes: [(mark: Int, byte: UInt8, cookie: UInt64)] = []
        var left: Set<UInt64> = []
        for round in 0..<40 {
            // One change of a block at a time.
            let mark = marks[random.below(marks.count)]
            if changes.contains(where: { $0.mark == mark }) { continue }
            let isTrim = round % 3 == 0
            let byte: UInt8 = isTrim ? 0 : UInt8(0x60 + round)
            let offset = mark * Self.block
            changes.append(
                (
                    mark, byte,
                    isTrim
                        ? bench.send(.trim, twin, at: offset, length: Self.block)
                        : bench.sendWrite(byte, twin, at: offset, length: 4096)
                ))
            for _ in 0..<2 { bench.progress() }
            if let deleted = try bench.pool.volumeList().first(where: { $0.state == .deleting }) {
                left.insert(deleted.mappedBytes)
            }
        }
        try bench.settle {
            deletion.isDone && changes.allSatisfy { bench.answer($0.cookie) != nil }
        }
        var refused = 0
        for (mark, byte, cookie) in changes {
            // Metadata is short on purpose. What does not fit changes nothing.
            let error = bench.answer(cookie)!
            #expect(error == 0 || error == ENOSPC)
            if error == 0 { expected[mark] = byte } else { refused += 1 }
        }
        #expect(left.count >= 2, "it went in one slice: \(left)")
        #expect(refused < 10)
        #expect(try bench.perform(.flush, twin) == 0)
        try bench.rest()
        #expect(bench.pool.status().deleting == 0)
        try requireCleanMetadata(bench, "deleted")
        try PowerCut(bench).forEachStateNow { survivors in
            let again = try Bench(after: survivors)
            let twin = try again.volume("twin")
            for mark in marks {
                let sectors = try again.sectors(twin, blocks: mark..<(mark + 1))
                #expect(sectors[0..<8].allSatisfy { $0 == expected[mark] })
                #expect(sectors[8...].allSatisfy { $0 == 0 })
            }
        }
    }

    // MARK: - The check

    /// A pool with some volumes, in so little metadata that a block that is given up is soon used
    /// again.
    private static func benchToCheck(metadataBlocks: Int) throws -> (Bench, Volume) {
        var options = PoolOptions()
        options.cacheBlocks = 8
        let bench = try Bench(
            dataBlocks: 64, metadataBlocks: metadataBlocks, options: options)
        try bench.change(.create(name: "v", size: UInt64(16 * block)))
        let volume = try bench.volume("v")
        for index in 0..<8 {
            #expect(try bench.write(0x10, volume, at: index * block, length: block) == 0)
        }
        for name in ["s1", "s2"] {
            try bench.change(.snapshot(origin: "v", name: name))
            #expect(try bench.write(0x20, volume, at: 0, length: 2 * block, fua: true) == 0)
        }
        try bench.rest()
        return (bench, volume)
    }

    /// Writes, copies, discards, snapshots, deletions and a few commits.
    private static func disturb(_ bench: Bench, _ volume: Volume, _ round: Int) throws {
        let byte = UInt8(0x30 + round % 0x80)
        for index in 0..<3 {
            let offset = (round + 3 * index) % 16 * block
            let written = try bench.write(byte, volume, at: offset, length: 4096, fua: true)
            #expect(written == 0)
            _ = try bench.perform(
                .trim, volume, at: (round + 5 * index) % 16 * block, length: block, fua: true)
        }
        let name = "t\(round)"
        // The metadata may run out; then it is refused.
        guard (try? bench.change(.snapshot(origin: "v", name: name))) != nil else { return }
        if round % 2 == 1 { try? bench.change(.delete(name: name)) }
    }

    private static func numbers(_ report: CheckReport) -> [UInt64] {
        [
            UInt64(report.devices), report.mappings, report.storedMappings,
            report.metadataBlocksUsed, report.dataBlocksUsed, UInt64(report.time),
        ]
    }

    @Test("check of a pool in use: it sees exactly the state that was committed when it began")
    func checkBesideClients() throws {
        // Room for all that is given up meanwhile.
        let (bench, volume) = try Self.benchToCheck(metadataBlocks: 2000)
        let before = Self.numbers(try requireCleanMetadata(bench, "before"))
        let superblocks = bench.recording.ios.count { $0.isSuperblock }
        var rounds = 0
        var isDisturbing = false
        func disturb() {
            // What is done meanwhile reads metadata, too.
            if isDisturbing { return }
            isDisturbing = true
            defer { isDisturbing = false }
            rounds += 1
            #expect(throws: Never.self) { try Self.disturb(bench, volume, rounds) }
        }
        let report = try #require(
            try bench.pool.check { _ in
                // From here on the pool's lock is not held.
                bench.metadataDisk.onRead = disturb
                return true
            })
        bench.metadataDisk.onRead = nil
        #expect(report.isClean, "\(report.metadata.findings) \(report.catalogue)")
        #expect(Self.numbers(report.metadata) == before)
        #expect(rounds > 5)
        #expect(bench.recording.ios.count { $0.isSuperblock } > superblocks + 10)
        // What was held for the check comes back.
        try bench.rest()
        let after = try requireCleanMetadata(bench, "after")
        #expect(Self.numbers(after) != before)
        #expect(bench.pool.status().metadataBlocksUsed == after.metadataBlocksUsed)
        for name in bench.pool.volumeNames() where name.hasPrefix("t") {
            try bench.change(.delete(name: name))
        }
        try bench.rest()
        for index in 0..<16 {
            #expect(
                try bench.write(0x77, volume, at: index * Self.block, length: 512, fua: true) == 0)
        }
        #expect(try Orders(bench).violations == [])
    }

    /// The same walk over a state that nothing holds finds it overwritten.
    @Test("check of a pool in use, control: without the pin its state is overwritten")
    func checkWithoutPin() throws {
        let (bench, volume) = try Self.benchToCheck(metadataBlocks: 160)
        let superblock = bench.metadataDisk.platter.page(0)
        var rounds = 0
        var isDisturbing = false
        bench.metadataDisk.onRead = {
            if isDisturbing { return }
            isDisturbing = true
            defer { isDisturbing = false }
            rounds += 1
            for _ in 0..<4 { try? Self.disturb(bench, volume, rounds) }
        }
        var check = MetadataCheck(device: bench.metadataDisk, superblock: superblock)
        let report = check.run()
        bench.metadataDisk.onRead = nil
        #expect(!report.isClean)
    }
}
