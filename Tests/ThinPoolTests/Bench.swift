// A pool on two recorded disks, driven step by step by a test: requests on one or more reactors,
// the background's I/O, time, faults, and I/Os that are held back.
//
// Nothing happens by itself: `settle` and `progress` let one thing after the other happen, in the
// order in which it was asked for, or in an order that is drawn.

import BlockIO
import Glibc
import Simulation
import Testing
import ThinMetadata
import ThinPool

/// What a test waits for never happens.
struct BenchIsStuck: Error {}

final class Bench {
    static let blockSize = 65_536
    static let sector = 512
    private static let patience = 200_000

    let recording: Recording
    let metadataDisk: RecordedDisk
    let dataDisk: RecordedDisk
    private(set) var pool: Pool
    private(set) var reactors: [Reactor] = []
    private let options: PoolOptions
    private let reactorCount: Int
    private var nextCookie: UInt64 = 1
    private var answers: [UInt64: (error: Int32, time: Int)] = [:]
    /// Called with each answer: cookie, 0 or errno, time of the recording.
    var onAnswer: ((UInt64, Int32, Int) -> Void)?
    var now: UInt64 = 1_000_000_000

    /// The background I/Os done so far, in order.
    var done: [String] = []
    /// The errno that a background I/O of this kind ends with.
    var failing: [String: Int32] = [:]
    /// I/Os that must not end yet.
    var holds: (RecordedIO) -> Bool = { _ in false }
    /// Draws what happens next; nil: what was asked for first.
    var order: SeededRandom?
    /// The background is told that the data device's flush has ended before it has begun; it is
    /// done when the superblock has been written. That is how a commit must not be ordered.
    var flushesDataTooLate = false
    /// Background I/Os that the pool is told done and that never are.
    var skips: Set<String> = []

    final class Reactor {
        var engine: VolumeIO!
        fileprivate var io: EngineIO!
        fileprivate var isAwake = false
    }

    fileprivate enum Owner {
        case engine(Reactor, tag: UInt64, memory: [iovec])
        case worker(slot: Int, name: String)
    }
    private var inFlight: [(record: Int, owner: Owner)] = []
    private var workerResults: [Int32] = []
    private var workerLeft = 0

    init(
        dataBlocks: Int = 32, metadataBlocks: Int = 512, reactors: Int = 1,
        options: PoolOptions = PoolOptions(), path: String? = nil
    ) throws {
        recording = Recording()
        self.options = options
        reactorCount = reactors
        metadataDisk = RecordedDisk(
            .metadata, Platter(bytes: metadataBlocks * Layout.blockSize, old: 0), recording,
            path: path)
        // Old contents that nobody may read.
        dataDisk = RecordedDisk(
            .data, Platter(bytes: dataBlocks * Self.blockSize, old: RecordedDisk.secret),
            recording, path: path)
        try ThinMetadata.format(
            metadataDisk, dataBlockSectors: UInt32(Self.blockSize / Self.sector),
            dataBlocks: UInt64(dataBlocks))
        pool = try Pool(metadata: metadataDisk, data: dataDisk, options: options)
        start()
    }

    /// The pool that a power cut left behind, opened again.
    init(
        after survivors: Survivors, reactors: Int = 1, options: PoolOptions = PoolOptions()
    ) throws {
        recording = Recording()
        self.options = options
        reactorCount = reactors
        metadataDisk = RecordedDisk(.metadata, survivors.metadata, recording)
        dataDisk = RecordedDisk(.data, survivors.data, recording)
        pool = try Pool(metadata: metadataDisk, data: dataDisk, options: options)
        start()
    }

    /// As after a restart; what was not flushed is kept.
    func reopen() throws {
        inFlight = []
        workerLeft = 0
        answers = [:]
        pool = try Pool(metadata: metadataDisk, data: dataDisk, options: options)
        start()
    }

    private func start() {
        reactors = (0..<reactorCount).map { index in
            let reactor = Reactor()
            nonisolated(unsafe) weak let box = reactor
            reactor.io = EngineIO { [unowned self] io, tag, memory in
                var io = io
                io.actor = .engine(index)
                inFlight.append(
                    (recording.begin(io), .engine(box!, tag: tag, memory: memory)))
            }
            reactor.engine = VolumeIO(pool: pool, io: reactor.io) { box?.isAwake = true }
            return reactor
        }
    }

    // MARK: - Volumes

    func change(_ change: VolumeChange) throws {
        let result = ask(change)
        try settle { result.isDone }
        if let error = result.error { throw error }
    }

    /// A change under way.
    final class Change: @unchecked Sendable {
        fileprivate(set) var isDone = false
        fileprivate(set) var error: PoolError?
        /// When it was told, in times of the recording.
        fileprivate(set) var toldAt: Int?
    }

    func ask(_ change: VolumeChange) -> Change {
        let result = Change()
        nonisolated(unsafe) let recording = recording
        pool.request(change) {
            result.isDone = true
            result.error = $0
            result.toldAt = recording.tick()
        }
        return result
    }

    func volume(_ name: String) throws -> Volume {
        let volume = try #require(pool.open(exportNamed: name), "there is no volume \(name)")
        pool.close(volume)
        return volume
    }

    // MARK: - Requests

    /// Sends a request; returns what `answer` is asked with.
    func send(
        _ operation: VolumeOperation, _ volume: Volume, at offset: Int = 0, length: Int = 0,
        buffer: UnsafeMutableRawPointer? = nil, fua: Bool = false, noHole: Bool = false,
        query: ExtentQuery? = nil, isAbandoned: UnsafePointer<Bool>? = nil, on reactor: Int = 0
    ) -> UInt64 {
        let cookie = nextCookie
        nextCookie += 1
        turn(reactors[reactor]) {
            $0.submit(
                VolumeRequest(
                    operation: operation, volume: volume, offset: UInt64(offset),
                    length: UInt64(length), buffer: buffer, fua: fua, noHole: noHole,
                    query: query, isAbandoned: isAbandoned, cookie: cookie))
        }
        return cookie
    }

    /// The answer, if there is one by now: 0 or errno.
    func answer(_ cookie: UInt64) -> Int32? { answers[cookie]?.error }

    /// Sends a request and waits for its answer.
    func perform(
        _ operation: VolumeOperation, _ volume: Volume, at offset: Int = 0, length: Int = 0,
        buffer: UnsafeMutableRawPointer? = nil, fua: Bool = false, noHole: Bool = false,
        on reactor: Int = 0
    ) throws -> Int32 {
        let cookie = send(
            operation, volume, at: offset, length: length, buffer: buffer, fua: fua,
            noHole: noHole, on: reactor)
        try settle { answers[cookie] != nil }
        return answers[cookie]!.error
    }

    /// A write whose memory lives as long as the bench.
    func sendWrite(
        _ byte: UInt8, _ volume: Volume, at offset: Int, length: Int, fua: Bool = false,
        on reactor: Int = 0
    ) -> UInt64 {
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: length, alignment: 4096)
        memset(buffer, Int32(byte), length)
        memory.append(buffer)
        return send(
            .write, volume, at: offset, length: length, buffer: buffer, fua: fua, on: reactor)
    }
    private var memory: [UnsafeMutableRawPointer] = []

    deinit { for buffer in memory { buffer.deallocate() } }

    func write(
        _ byte: UInt8, _ volume: Volume, at offset: Int, length: Int, fua: Bool = false,
        on reactor: Int = 0
    ) throws -> Int32 {
        let cookie = sendWrite(byte, volume, at: offset, length: length, fua: fua, on: reactor)
        try settle { answers[cookie] != nil }
        return answers[cookie]!.error
    }

    func read(_ volume: Volume, at offset: Int, length: Int, on reactor: Int = 0) throws -> [UInt8]
    {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: length, alignment: 4096)
        defer { buffer.deallocate() }
        let error = try perform(
            .read, volume, at: offset, length: length, buffer: buffer.baseAddress, on: reactor)
        try #require(error == 0, "a read failed with \(error)")
        return [UInt8](buffer)
    }

    /// Asks for the extents of a range; 0 or errno.
    func ask(_ query: ExtentQuery, _ volume: Volume, at offset: Int, length: Int) throws -> Int32 {
        let cookie = send(.extents, volume, at: offset, length: length, query: query)
        try settle { answers[cookie] != nil }
        return withExtendedLifetime(query) { answers[cookie]!.error }
    }

    /// What each sector is filled with; nil where its bytes differ.
    func sectors(_ volume: Volume, blocks: Range<Int>? = nil) throws -> [UInt8?] {
        let range =
            blocks.map { ($0.lowerBound * Self.blockSize)..<($0.upperBound * Self.blockSize) }
            ?? 0..<Int(volume.size)
        let bytes = try read(volume, at: range.lowerBound, length: range.count)
        return bytes.withUnsafeBytes { buffer in
            (0..<(buffer.count / Self.sector)).map {
                let start = buffer.baseAddress! + $0 * Self.sector
                return memcmp(start, start + 1, Self.sector - 1) == 0
                    ? start.load(as: UInt8.self) : nil
            }
        }
    }

    // MARK: - Time

    /// Everything that can happen happens, until `isDone`.
    func settle(_ isDone: () -> Bool) throws {
        for _ in 0..<Self.patience {
            if isDone() { return }
            if !progress() { break }
        }
        if isDone() { return }
        Issue.record("what is waited for never happens")
        throw BenchIsStuck()
    }

    /// The background is at rest, after the commit interval has passed.
    func rest() throws {
        now += 2_000_000_000
        try settle()
        guard pool.isAtRest else {
            Issue.record("the background waits for something")
            throw BenchIsStuck()
        }
    }

    /// Lets whatever can happen happen, until nothing can.
    func settle() throws {
        for _ in 0..<Self.patience where !progress() { return }
        Issue.record("it never comes to rest")
        throw BenchIsStuck()
    }

    /// One thing happens; false if nothing can before time passes.
    @discardableResult
    func progress() -> Bool {
        let ready = inFlight.indices.filter { !holds(recording.ios[inFlight[$0].record]) }
        let awake = reactors.filter(\.isAwake)
        if order != nil {
            let choice = order!.below(ready.count + awake.count + 1)
            if choice < ready.count {
                complete(ready[choice])
            } else if choice < ready.count + awake.count {
                turn(awake[choice - ready.count]) { _ in }
            } else {
                return step() || !ready.isEmpty || !awake.isEmpty
            }
            return true
        }
        if let first = ready.first {
            complete(first)
        } else if let first = awake.first {
            turn(first) { _ in }
        } else {
            return step()
        }
        return true
    }

    private func turn(_ reactor: Reactor, _ body: (VolumeIO) -> Void) {
        reactor.isAwake = false
        reactor.engine.beginTurn()
        body(reactor.engine)
        reactor.engine.endTurn()
        reactor.engine.takeFinished {
            let time = recording.tick()
            answers[$0] = ($1, time)
            onAnswer?($0, $1, time)
        }
    }

    private func complete(_ index: Int) {
        let (record, owner) = inFlight.remove(at: index)
        let io = recording.ios[record]
        var fault = recording.fault?(io)
        if case .worker(_, let name) = owner, let error = failing[name] {
            fault = Fault(error: error)
        }
        let error = fault?.error ?? 0
        let transferred = error == 0 ? fault?.transferred ?? io.length : io.length
        let hasEffect = error == 0 || fault!.hasEffect
        let disk = io.device == .data ? dataDisk : metadataDisk
        if hasEffect, io.changesDevice || io.kind == .flush {
            disk.apply(io, transferred: transferred)
        }
        recording.end(record, error: error, hasEffect: hasEffect, transferred: transferred)
        switch owner {
        case .engine(let reactor, let tag, let memory):
            if hasEffect && io.kind == .read { fill(memory, io, disk, transferred) }
            let result: Int32
            if error != 0 {
                result = -error
            } else {
                result = io.kind == .read || io.kind == .write ? Int32(transferred) : 0
            }
            turn(reactor) { $0.complete(tag: tag, result: result) }
        case .worker(let slot, let name):
            done.append(name)
            if error == 0 && io.isSuperblock && flushesDataTooLate { flushDataTooLate() }
            workerResults[slot] = error
            workerLeft -= 1
            if workerLeft == 0 { pool.stepDone(workerResults, now: now) }
        }
    }

    private func fill(
        _ memory: [iovec], _ io: RecordedIO, _ disk: RecordedDisk, _ transferred: Int
    ) {
        var done = 0
        for piece in memory where done < transferred {
            let length = min(piece.iov_len, transferred - done)
            disk.platter.read(
                at: io.offset + done,
                into: UnsafeMutableRawBufferPointer(start: piece.iov_base, count: length))
            done += length
        }
    }

    // MARK: - The background

    private func step() -> Bool {
        // Its I/Os are held.
        if workerLeft > 0 { return false }
        switch pool.nextStep(now: now) {
        case .io(let ios):
            workerResults = Array(repeating: 0, count: ios.count)
            workerLeft = ios.count
            for (slot, io) in ios.enumerated() { begin(io, slot) }
            // All of them were left out.
            if workerLeft == 0 { pool.stepDone(workerResults, now: now) }
        case .again: break
        case .wait: return false
        }
        return true
    }

    private func begin(_ io: WorkerIO, _ slot: Int) {
        var record = RecordedIO(device: .metadata, kind: .write, actor: .worker)
        let name: String
        func block(_ copy: (UnsafeMutableRawPointer) -> MetadataBlock) {
            record.contents = [UInt8](unsafeUninitializedCapacity: Layout.blockSize) {
                let number = copy($0.baseAddress!)
                record.offset = Int(number.rawValue) * Layout.blockSize
                $1 = Layout.blockSize
            }
            record.length = Layout.blockSize
        }
        switch io {
        case .flushData:
            name = "flush data"
            if flushesDataTooLate {
                workerLeft -= 1
                return
            }
            record.device = .data
            record.kind = .flush
        case .flushMetadata:
            name = "flush metadata"
            record.kind = .flush
        case .writeMetadata(let transaction, let index):
            name = "write metadata"
            block { transaction.copyBlock(index, to: $0) }
        case .writeSuperblock(let transaction):
            name = "write superblock"
            record.isDurable = true
            block {
                transaction.copySuperblock(to: $0)
                return MetadataBlock(0)
            }
        case .writeData(let offset, let bytes):
            name = "write data"
            record.device = .data
            record.offset = Int(offset)
            record.length = bytes.count
            record.contents = [UInt8](bytes)
        case .discardData(let offset, let length):
            name = "discard data"
            record.device = .data
            record.kind = .discard
            record.offset = Int(offset)
            record.length = Int(length)
        }
        if skips.contains(name) {
            workerLeft -= 1
            return
        }
        inFlight.append((recording.begin(record), .worker(slot: slot, name: name)))
    }

    private func flushDataTooLate() {
        let io = RecordedIO(device: .data, kind: .flush, actor: .worker)
        let index = recording.begin(io)
        dataDisk.apply(io, transferred: 0)
        recording.end(index, error: 0, hasEffect: true)
    }
}

/// The data device of one reactor: what it is asked goes to the bench.
private final class EngineIO: DataIO {
    private let queue: (RecordedIO, UInt64, [iovec]) -> Void

    init(queue: @escaping (RecordedIO, UInt64, [iovec]) -> Void) { self.queue = queue }

    func read(
        at offset: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64
    ) -> Int32? {
        queue(
            record(.read, offset, length), tag, [iovec(iov_base: into, iov_len: length)])
        return nil
    }

    func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool, tag: UInt64
    ) -> Int32? {
        var io = record(.write, offset, 0)
        for index in 0..<count {
            io.contents += UnsafeRawBufferPointer(
                start: vectors[index].iov_base, count: vectors[index].iov_len)
        }
        io.length = io.contents.count
        queue(io, tag, [])
        return nil
    }

    func flush(tag: UInt64) -> Int32? {
        queue(record(.flush, 0, 0), tag, [])
        return nil
    }

    func isHole(at offset: UInt64, length: UInt64) -> Bool { false }

    func contents(at offset: UInt64, length: Int) -> UnsafeMutableRawPointer? { nil }

    func zero(at offset: UInt64, length: UInt64, tag: UInt64) -> Bool {
        queue(record(.zero, offset, Int(length)), tag, [])
        return true
    }

    private func record(_ kind: RecordedIO.Kind, _ offset: UInt64, _ length: Int) -> RecordedIO {
        RecordedIO(
            device: .data, kind: kind, actor: .engine(0), offset: Int(offset), length: length)
    }
}
