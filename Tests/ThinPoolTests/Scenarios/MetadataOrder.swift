// qcow2, 2010: reference counts and tables were written without an order between them. A crash let
// the table through and not the count, and a cluster in use was allocated a second time.
//
// T21 to T26: in every state that a cut can leave, the tree is whole and its counts are true; no
// block of the committed state is written; and no failing I/O, wherever it is, ends worse than in
// an error.

import Foundation
import Glibc
import Simulation
import Testing
import ThinMetadata
import ThinPool

@Suite("qcow2 2010: metadata order") struct MetadataOrder {
    private static let block = Bench.blockSize
    private static let a: UInt8 = 0xA1
    private static let b: UInt8 = 0xB2

    /// A pool with little metadata and little memory for it, so that blocks are soon reused.
    private static func crampedOptions() -> PoolOptions {
        var options = PoolOptions()
        options.cacheBlocks = 8
        options.tableBytes = 1
        return options
    }

    private static func randomHistory(
        seed: UInt64, actions: Int, dataBlocks: Int, metadataBlocks: Int
    ) throws -> (bench: Bench, ledger: Ledger, start: Int) {
        let bench = try Bench(
            dataBlocks: dataBlocks, metadataBlocks: metadataBlocks, reactors: 2,
            options: crampedOptions())
        let ledger = Ledger(bench)
        ledger.create("v", blocks: 4)
        try ledger.settle()
        let start = bench.recording.now
        bench.order = SeededRandom(seed: seed)
        var clients = RandomClients(ledger, seed: seed, reactors: 2)
        for _ in 0..<actions { try clients.act() }
        try ledger.settle()
        try bench.rest()
        try ledger.verify()
        return (bench, ledger, start)
    }

    @Test(
        "T21 metadata order: after a cut at any I/O the tree is whole, its counts are true",
        arguments: [UInt64(11), 12])
    func t21MetadataOrder(_ seed: UInt64) throws {
        let (bench, ledger, start) = try Self.randomHistory(
            seed: seed, actions: 140, dataBlocks: 14, metadataBlocks: 96)
        var cut = PowerCut(bench)
        cut.exhaustiveLimit = 3
        cut.samples = 1
        var states = 0
        try cut.forEachState(after: start) { survivors in
            let aftermath = try Aftermath(survivors)
            try ledger.verify(aftermath)
            states += 1
            if states % 10 == 0 { try Self.fillUp(aftermath) }
        }
        #expect(states > 100)
    }

    /// What looks free is free: filling the pool up harms nobody.
    private static func fillUp(_ aftermath: Aftermath) throws {
        let bench = aftermath.bench
        try bench.change(.create(name: "filler", size: UInt64(64 * block)))
        let filler = try bench.volume("filler")
        let foreign: UInt8 = 0xFB
        var filled = 0
        while try bench.write(foreign, filler, at: filled * block, length: block) == 0 {
            filled += 1
        }
        try bench.rest()
        try requireCleanMetadata(bench, "\(aftermath.survivors.what), filled up")
        for (name, before) in aftermath.sectors {
            let now = try bench.sectors(bench.volume(name))
            try aftermath.require(
                zip(before, now).allSatisfy { $0 == $1 }, "filling the pool changed \(name)")
        }
    }

    @Test(
        "T22 no overwrite in place: the committed tree stays until the next commit is durable",
        arguments: UInt64(21)...26)
    func t22NoOverwriteInPlace(_ seed: UInt64) throws {
        let (bench, _, _) = try Self.randomHistory(
            seed: seed, actions: 600, dataBlocks: 48, metadataBlocks: 96)
        let orders = try Orders(bench)
        #expect(orders.violations == [])
        #expect(orders.commitCount > 20)
        // Blocks are used again, so there was something to be seen.
        var writes: [Int: Int] = [:]
        for io in bench.recording.ios
        where io.device == .metadata && io.kind == .write && !io.isSuperblock {
            writes[io.offset, default: 0] += 1
        }
        #expect(writes.values.contains { $0 > 1 })
    }

    // MARK: - Every I/O fails

    enum Failing: CaseIterable {
        case onceEIO, onceENOSPC, onceAfterItsEffect
        /// All of the same kind on the same device, from this one on.
        case kindEIO, kindENOSPC
        case deviceEIO

        func fault(from target: RecordedIO) -> (RecordedIO) -> Fault? {
            { io in
                guard io.begin >= target.begin else { return nil }
                let isSame = io.device == target.device && io.kind == target.kind
                switch self {
                case .onceEIO: return io.begin == target.begin ? Fault(error: EIO) : nil
                case .onceENOSPC: return io.begin == target.begin ? Fault(error: ENOSPC) : nil
                case .onceAfterItsEffect:
                    return io.begin == target.begin ? Fault(error: EIO, hasEffect: true) : nil
                case .kindEIO: return isSame ? Fault(error: EIO) : nil
                case .kindENOSPC: return isSame ? Fault(error: ENOSPC) : nil
                case .deviceEIO: return io.device == target.device ? Fault(error: EIO) : nil
                }
            }
        }
    }

    /// Some of everything that a pool does.
    private static func richWorkload(_ ledger: Ledger) throws {
        let bench = ledger.bench
        func units(_ blocks: Range<Int>) -> Range<Int> {
            (blocks.lowerBound * Ledger.unitsPerBlock)..<(blocks.upperBound * Ledger.unitsPerBlock)
        }
        func on(_ name: String, _ body: () throws -> Void) throws {
            // A volume that could not be made gets no requests.
            if ledger.volumes.contains(name) { try body() }
            try ledger.settle()
        }
        ledger.create("v", blocks: 6)
        try ledger.settle()
        try on("v") {
            try ledger.write("v", units: units(0..<3))
            try ledger.write("v", units: units(3..<4), fua: true)
        }
        try on("v") { try ledger.flush("v") }
        try on("v") { ledger.snapshot("v", "s") }
        try on("v") {
            try ledger.write("v", units: 2..<4)
            try ledger.zero("v", units: 20..<22)
            try ledger.zero("v", units: units(4..<5), noHole: true)
        }
        try on("s") {
            try ledger.write("s", units: units(1..<2))
            try ledger.read("s", units: units(0..<4))
        }
        try on("v") { try ledger.flush("v") }
        try on("v") {
            try ledger.write("v", units: 3..<4)
            try ledger.zero("v", units: units(3..<4), trim: true)
        }
        bench.now += 2_000_000_000
        try bench.settle()
        try on("s") { ledger.delete("s") }
        try on("v") { try ledger.write("v", units: 32..<33, fua: true) }
        try on("v") { try ledger.flush("v") }
        try on("v") { try ledger.read("v", units: units(0..<6)) }
        bench.now += 2_000_000_000
        try bench.settle()
    }

    private static func benchForFaults() throws -> Bench {
        try Bench(dataBlocks: 24, metadataBlocks: 128, options: crampedOptions())
    }

    @Test(
        "T24 every I/O fails: the client gets an error, and what was flushed is there afterwards",
        arguments: Failing.allCases)
    func t24EveryIOFails(_ failing: Failing) throws {
        let reference = try Self.benchForFaults()
        let opened = reference.recording.ios.count
        try Self.richWorkload(Ledger(reference))
        let ios = reference.recording.ios[opened...]
        #expect(ios.count > 60)
        #expect(Set(ios.map { "\($0.device) \($0.kind)" }).count == 8, "of each kind, but one")
        var failures = 0
        let checked = CheckedStates()
        for target in ios {
            let what = "\(failing), \(target.label)"
            let bench = try Self.benchForFaults()
            let ledger = Ledger(bench)
            bench.recording.fault = failing.fault(from: target)
            try Self.richWorkload(ledger)
            let hasFailed = bench.pool.status().mode == .failed
            if hasFailed { failures += 1 }
            // A hint may be lost, and a read of metadata may have another way.
            if target.kind != .discard && target.actor != .pool {
                #expect(
                    hasFailed || !ledger.errors.isEmpty || ledger.hasRefusedChange,
                    "nobody was told: \(what)")
            }
            bench.recording.fault = nil
            try Self.verifyAfterFaults(
                ledger,
                Survivors(
                    metadata: bench.metadataDisk.platter, data: bench.dataDisk.platter,
                    time: bench.recording.now, what: what, checked: checked))
            var random = SeededRandom(seed: UInt64(target.begin))
            var cut = PowerCut(bench).drawn(&random)
            cut.what = "\(what), and \(cut.what)"
            cut.checked = checked
            try Self.verifyAfterFaults(ledger, cut)
        }
        #expect(failures > 0)
    }

    /// The pool opens; needs_check, if it is set, can be taken away after a check; then all that
    /// was flushed is there.
    private static func verifyAfterFaults(_ ledger: Ledger, _ survivors: Survivors) throws {
        var survivors = survivors
        let probe = try Bench(after: survivors)
        if probe.pool.status().needsCheck {
            try survivors.checked.requireClean(probe, survivors.what)
            try ThinMetadata.setNeedsCheck(probe.metadataDisk, false)
            survivors.metadata = probe.metadataDisk.platter
        }
        try ledger.verify(Aftermath(survivors))
    }

    // MARK: - Short and torn

    @Test(
        "T25 short: a device that transfers less than it was asked to is asked again",
        arguments: UInt64(1)...8)
    func t25Short(_ seed: UInt64) throws {
        let bench = try Bench(dataBlocks: 48, metadataBlocks: 160)
        nonisolated(unsafe) var random = SeededRandom(seed: seed)
        var short = 0
        bench.recording.fault = { io in
            guard case .engine = io.actor, io.kind == .write || io.kind == .read,
                io.length > Bench.sector, random.oneIn(2)
            else { return nil }
            short += 1
            return Fault(
                transferred: Bench.sector * (1 + random.below(io.length / Bench.sector - 1)))
        }
        let ledger = Ledger(bench)
        ledger.create("v", blocks: 4)
        try ledger.settle()
        let start = bench.recording.now
        var clients = RandomClients(ledger, seed: seed)
        for _ in 0..<60 { try clients.act() }
        try ledger.settle()
        try bench.rest()
        #expect(short > 10)
        bench.recording.fault = nil
        try ledger.verify()
        #expect(ledger.errors.keys.allSatisfy { $0 == ENOSPC })
        guard seed <= 2 else { return }
        var cut = PowerCut(bench)
        cut.exhaustiveLimit = 2
        cut.samples = 1
        try cut.forEachState(after: start) { try ledger.verify(Aftermath($0)) }
    }

    @Test("T25 short: nothing transferred is an error, not an endless loop")
    func t25NothingTransferred() throws {
        let bench = try Bench(dataBlocks: 16, metadataBlocks: 128)
        try bench.change(.create(name: "v", size: UInt64(4 * Self.block)))
        let volume = try bench.volume("v")
        bench.recording.fault = { $0.kind == .write ? Fault(transferred: 0) : nil }
        #expect(try bench.write(Self.a, volume, at: 0, length: 4096) == EIO)
        bench.recording.fault = nil
        #expect(try bench.sectors(volume).allSatisfy { $0 == 0 })
    }

    @Test("T25 torn: metadata blocks torn before the superblock are no part of any state")
    func t25TornBeforeTheSuperblock() throws {
        let bench = try Bench(dataBlocks: 16, metadataBlocks: 128)
        try bench.change(.create(name: "v", size: UInt64(4 * Self.block)))
        let volume = try bench.volume("v")
        #expect(try bench.write(Self.a, volume, at: 0, length: Self.block, fua: true) == 0)
        bench.holds = { $0.device == .metadata && $0.kind == .flush }
        let write = bench.sendWrite(Self.b, volume, at: Self.block, length: 512, fua: true)
        try bench.settle()
        #expect(bench.answer(write) == nil)
        var cut = PowerCut(bench)
        cut.samples = 40
        try cut.forEachStateNow {
            let aftermath = try Aftermath($0)
            try aftermath.require("v", block: 0, [Self.a])
            try aftermath.require("v", block: 1, [0])
        }
    }

    /// No device may do this to a block that was flushed; if one does, it is noticed.
    @Test("T25 torn: a committed block that is torn all the same is told by its checksum")
    func t25TornCommittedBlock() throws {
        let bench = try Bench(dataBlocks: 16, metadataBlocks: 128)
        try bench.change(.create(name: "v", size: UInt64(4 * Self.block)))
        let volume = try bench.volume("v")
        #expect(try bench.write(Self.a, volume, at: 0, length: Self.block, fua: true) == 0)
        try bench.rest()
        let whole = PowerCut(bench).nothingUnflushed()
        let tree = try MetadataImage(whole.metadata).reachable().blocks
        #expect(tree.count > 5)
        for number in tree.sorted() {
            var torn = whole
            // The first sector is of another write, as a torn write leaves it.
            var page = torn.metadata.page(Int(number))
            for byte in 100..<Bench.sector { page[byte] ^= 0x5A }
            page.withUnsafeBytes {
                torn.metadata.write(at: Int(number) * Layout.blockSize, from: $0)
            }
            var check = MetadataCheck(
                device: RecordedDisk(.metadata, torn.metadata, Recording()))
            #expect(!check.run().isClean, "block \(number) is torn and nobody says so")
            // Nothing traps, and nobody reads anything else than what was there.
            guard let opened = try? Bench(after: torn),
                let again = opened.pool.open(exportNamed: "v")
            else { continue }
            let buffer = UnsafeMutableRawBufferPointer.allocate(
                byteCount: Self.block, alignment: 4096)
            defer { buffer.deallocate() }
            if try opened.perform(
                .read, again, length: Self.block, buffer: buffer.baseAddress) == 0
            {
                #expect(buffer.allSatisfy { $0 == Self.a })
            }
        }
    }

    // MARK: - Recovery

    @Test(
        "T26 crash in recovery: cut, opened, and cut again while it recovers, five times",
        arguments: UInt64(1)...3)
    func t26CrashInRecovery(_ seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        // A large deletion goes on at each opening, and the pool takes up new space.
        var (bench, ledger) = try LargeVolume.bench()
        let started = ledger.delete(LargeVolume.name)
        try bench.settle { started.isDone }
        for _ in 0..<random.below(10) { bench.progress() }
        var last = PowerCut(bench).drawn(&random)
        var recovered = 0
        for round in 0..<5 {
            if round % 2 == 0 {
                last.data.grow(to: last.data.count + Self.block)
            }
            bench = try Bench(after: last)
            // Opening alone writes nothing: what it finds it would find again.
            #expect(bench.recording.ios.allSatisfy { !$0.changesDevice })
            bench.order = SeededRandom(seed: random.next())
            bench.now += 2_000_000_000
            for _ in 0..<random.below(40) { bench.progress() }
            recovered += bench.recording.ios.count { $0.changesDevice }
            last = PowerCut(bench).drawn(&random)
            try LargeVolume.requireKept(Aftermath(last))
        }
        #expect(recovered > 0, "there was nothing to recover")
        bench = try Bench(after: last)
        try bench.rest()
        #expect(bench.pool.status().deleting == 0)
        let report = try requireCleanMetadata(bench, "recovered")
        #expect(report.dataBlocks == UInt64(last.data.count / Self.block))
        #expect(report.dataBlocksUsed < 50)
        try LargeVolume.requireKept(
            Aftermath(PowerCut(bench).nothingUnflushed()))
    }
}

// MARK: - Files

/// What a pool of files asks of the kernel, seen by strace. The ring's operations cannot be seen,
/// so the program is made to do without it.
@Suite("qcow2 2010: a pool of files") struct PoolOfFiles {
    private static let strace = "/usr/bin/strace"
    private static var hasStrace: Bool { access(strace, X_OK) == 0 }
    private static let wafer = URL(filePath: "/proc/self/exe").resolvingSymlinksInPath()
        .deletingLastPathComponent().appending(path: "wafer").path
    private static var isPossible: Bool { hasStrace && access(wafer, X_OK) == 0 }

    struct Call {
        var name: String
        var arguments: String
        /// The file behind the first descriptor, by its last name.
        var file: String
    }

    /// The calls of one run of the program, in their order.
    private static func calls(_ arguments: [String]) throws -> [Call] {
        let log = FileManager.default.temporaryDirectory
            .appending(path: "wafer-calls-\(UUID().uuidString)")
        defer { try? FileManager.default.removeItem(at: log) }
        let process = Process()
        process.executableURL = URL(filePath: strace)
        process.arguments = [
            "-f", "-y", "-o", log.path,
            "-e", "trace=desc,file,msync,sync,syncfs",
            "-e", "inject=io_uring_setup:error=ENOSYS", wafer,
        ] + arguments
        process.standardOutput = FileHandle.nullDevice
        process.standardError = FileHandle.nullDevice
        try process.run()
        process.waitUntilExit()
        try #require(process.terminationStatus == 0, "wafer \(arguments) failed")
        var calls: [Call] = []
        for line in try String(contentsOf: log, encoding: .utf8).split(separator: "\n") {
            let words = line.drop { $0 != " " }.drop { $0 == " " }
            guard let open = words.firstIndex(of: "(") else { continue }
            let rest = String(words[words.index(after: open)...])
            let path = rest.split(separator: "<").dropFirst().first?.split(separator: ">").first
            calls.append(
                Call(
                    name: String(words[..<open]), arguments: rest,
                    file: path?.split(separator: "/").last.map(String.init) ?? ""))
        }
        return calls
    }

    private static func isFlush(_ call: Call) -> Bool {
        call.name == "fsync" || call.name == "fdatasync"
    }

    /// What gives a file space, or only looks at it.
    private static let harmless: Set = ["fallocate", "fstat", "newfstatat", "fstatfs"]

    /// A file that was made longer is flushed before anything else is done to it.
    private static func requireFlushAfterGrowth(
        of file: String, _ calls: [Call], from start: Int
    ) throws -> Int {
        let longer = try #require(
            calls[start...].firstIndex { $0.name == "ftruncate" && $0.file == file })
        let next = try #require(
            calls[(longer + 1)...].firstIndex { $0.file == file && !harmless.contains($0.name) })
        #expect(isFlush(calls[next]), "\(calls[next].name) follows the growth of \(file)")
        return next
    }

    @Test(
        "T23 pool in files: what is new is flushed with its directory, growth before its use",
        .enabled(if: isPossible, "strace is not installed"))
    func t23PoolInFiles() throws {
        let folder = FileManager.default.temporaryDirectory
            .appending(path: "wafer-files-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        let pool = folder.appending(path: "pool").path
        let created = try Self.calls(["pool", "create", pool, "--data-size", "64MiB"])
        for file in ["data", "metadata"] {
            let start = try #require(
                created.firstIndex {
                    $0.name == "openat" && $0.arguments.contains("/pool/\(file)\"")
                        && $0.arguments.contains("O_CREAT")
                })
            let flushed = try Self.requireFlushAfterGrowth(of: file, created, from: start)
            _ = try #require(
                created[flushed...].firstIndex { $0.name == "fsync" && $0.file == "pool" })
        }
        // The pool's own name, in the directory above it.
        #expect(created.contains { $0.name == "fsync" && $0.file == folder.lastPathComponent })

        let change = try Self.calls(["volume", "create", pool, "v", "8MiB"])
        let written = try #require(
            change.lastIndex { $0.name.hasPrefix("pwrite") && $0.file == "data" })
        let superblock = try #require(
            change.lastIndex {
                $0.name.hasPrefix("pwrite") && $0.file == "metadata"
                    && $0.arguments.contains(", 4096, 0)")
            })
        for file in ["data", "metadata"] {
            #expect(change[written..<superblock].contains { Self.isFlush($0) && $0.file == file })
        }
        #expect(change[superblock...].contains { Self.isFlush($0) && $0.file == "metadata" })

        let grown = try Self.calls(["pool", "grow", pool, "--data-size", "128MiB"])
        let durable = try Self.requireFlushAfterGrowth(of: "data", grown, from: 0)
        // The metadata says that the space is there only when it is.
        #expect(!grown[..<durable].contains { $0.name.hasPrefix("pwrite") })
        #expect(grown[durable...].contains { $0.name.hasPrefix("pwrite") && $0.file == "metadata" })

        let all = created + change + grown
        #expect(!all.contains { ["sync_file_range", "msync"].contains($0.name) })
    }
}
