// A pool on two simulated disks with one reactor, driven step by step by a test.

import BlockIO
import Glibc
import Simulation
import Testing
import ThinMetadata
import ThinPool

final class Bench {
    static let blockSize = 65_536

    let metadataDisk: SimulatedDisk
    let dataDisk: SimulatedDisk
    private(set) var pool: Pool
    private var io: QueuedDataIO
    private var engine: VolumeIO
    private var nextCookie: UInt64 = 1
    private var answers: [UInt64: Int32] = [:]
    var now: UInt64 = 1_000_000_000

    /// The background I/Os done so far, in order.
    var done: [String] = []
    /// The errno that a background I/O of this kind ends with.
    var failing: [String: Int32] = [:]

    init(dataBlocks: Int = 32, metadataBlocks: Int = 512) throws {
        metadataDisk = SimulatedDisk(
            path: "metadata", bytes: [UInt8](repeating: 0, count: metadataBlocks * 4096))
        // Old contents that nobody may read.
        dataDisk = SimulatedDisk(
            path: "data", bytes: [UInt8](repeating: 0xEE, count: dataBlocks * Self.blockSize))
        try ThinMetadata.format(
            metadataDisk, dataBlockSectors: 128, dataBlocks: UInt64(dataBlocks))
        pool = try Pool(metadata: metadataDisk, data: dataDisk)
        io = QueuedDataIO(disk: dataDisk)
        engine = VolumeIO(pool: pool, io: io) {}
    }

    /// As after a restart; what was not flushed is kept.
    func reopen() throws {
        pool = try Pool(metadata: metadataDisk, data: dataDisk)
        io = QueuedDataIO(disk: dataDisk)
        engine = VolumeIO(pool: pool, io: io) {}
        answers = [:]
    }

    // MARK: - Volumes

    func change(_ change: VolumeChange) throws {
        nonisolated(unsafe) var result: PoolError??
        pool.request(change) { result = .some($0) }
        try settle { result != nil }
        if let error = result! { throw error }
    }

    func volume(_ name: String) throws -> Volume {
        let volume = try #require(pool.open(exportNamed: name))
        pool.close(volume)
        return volume
    }

    // MARK: - Requests

    /// Sends a request; returns what `answer` is asked with.
    func send(
        _ operation: VolumeOperation, _ volume: Volume, at offset: Int = 0, length: Int = 0,
        buffer: UnsafeMutableRawPointer? = nil, fua: Bool = false, noHole: Bool = false
    ) -> UInt64 {
        let cookie = nextCookie
        nextCookie += 1
        turn {
            $0.submit(
                VolumeRequest(
                    operation: operation, volume: volume, offset: UInt64(offset),
                    length: UInt64(length), buffer: buffer, fua: fua, noHole: noHole,
                    cookie: cookie))
        }
        return cookie
    }

    /// The answer, if there is one by now: 0 or errno.
    func answer(_ cookie: UInt64) -> Int32? { answers[cookie] }

    /// Sends a request and waits for its answer.
    func perform(
        _ operation: VolumeOperation, _ volume: Volume, at offset: Int = 0, length: Int = 0,
        buffer: UnsafeMutableRawPointer? = nil, fua: Bool = false, noHole: Bool = false
    ) throws -> Int32 {
        let cookie = send(
            operation, volume, at: offset, length: length, buffer: buffer, fua: fua,
            noHole: noHole)
        try settle { answers[cookie] != nil }
        return answers[cookie]!
    }

    func write(
        _ byte: UInt8, _ volume: Volume, at offset: Int, length: Int, fua: Bool = false
    ) throws -> Int32 {
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: length, alignment: 4096)
        defer { buffer.deallocate() }
        memset(buffer, Int32(byte), length)
        return try perform(.write, volume, at: offset, length: length, buffer: buffer, fua: fua)
    }

    func read(_ volume: Volume, at offset: Int, length: Int) throws -> [UInt8] {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: length, alignment: 4096)
        defer { buffer.deallocate() }
        let error = try perform(
            .read, volume, at: offset, length: length, buffer: buffer.baseAddress)
        try #require(error == 0, "a read failed with \(error)")
        return [UInt8](buffer)
    }

    // MARK: - Time

    /// Everything that can happen happens, until `isDone`.
    func settle(_ isDone: () -> Bool) throws {
        for _ in 0..<100_000 {
            if isDone() { return }
            turn { engine in io.completeAll { engine.complete(tag: $0, result: $1) } }
            if isDone() { return }
            step()
        }
        Issue.record("what is waited for never happens")
        throw WorldFailure(description: "stuck")
    }

    /// The background is at rest, after the commit interval has passed.
    func rest() throws {
        now += 2_000_000_000
        try settle { pool.isAtRest }
    }

    private func turn(_ body: (VolumeIO) -> Void) {
        engine.beginTurn()
        body(engine)
        engine.endTurn()
        engine.takeFinished { answers[$0] = $1 }
    }

    private func step() {
        switch pool.nextStep(now: now) {
        case .io(let io): pool.stepDone(io.map(perform), now: now)
        case .again, .wait: break
        }
    }

    private func perform(_ io: WorkerIO) -> Int32 {
        let name: String
        switch io {
        case .flushData: name = "flush data"
        case .flushMetadata: name = "flush metadata"
        case .writeMetadata: name = "write metadata"
        case .writeSuperblock: name = "write superblock"
        case .writeData: name = "write data"
        case .discardData: name = "discard data"
        }
        done.append(name)
        if let error = failing[name] { return error }
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        defer { buffer.deallocate() }
        let block = UnsafeRawBufferPointer(start: buffer, count: 4096)
        switch io {
        case .flushData: try! dataDisk.flush()
        case .flushMetadata: try! metadataDisk.flush()
        case .writeMetadata(let transaction, let index):
            let number = transaction.copyBlock(index, to: buffer)
            try! metadataDisk.write(at: number.rawValue * 4096, from: block)
        case .writeSuperblock(let transaction):
            transaction.copySuperblock(to: buffer)
            try! metadataDisk.write(at: 0, from: block)
            try! metadataDisk.flush()
        case .writeData(let offset, let bytes): try! dataDisk.write(at: offset, from: bytes)
        case .discardData(let offset, let length): dataDisk.discard(at: offset, length: length)
        }
        return 0
    }
}

/// A data device that does what it is told when the test lets it.
final class QueuedDataIO: DataIO {
    private let disk: SimulatedDisk
    private var pending: [(tag: UInt64, action: () -> Int32)] = []

    init(disk: SimulatedDisk) { self.disk = disk }

    func completeAll(_ body: (UInt64, Int32) -> Void) {
        let batch = pending
        pending = []
        for (tag, action) in batch { body(tag, action()) }
    }

    func read(at offset: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64) {
        pending.append((tag, { [disk] in
            try! disk.read(
                at: offset, into: UnsafeMutableRawBufferPointer(start: into, count: length))
            return Int32(length)
        }))
    }

    func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, durable: Bool, tag: UInt64
    ) {
        let vectors = (0..<count).map { vectors[$0] }
        pending.append((tag, { [disk] in
            var position = offset
            for vector in vectors {
                try! disk.write(
                    at: position,
                    from: UnsafeRawBufferPointer(start: vector.iov_base, count: vector.iov_len))
                position += UInt64(vector.iov_len)
            }
            return Int32(position - offset)
        }))
    }

    func flush(tag: UInt64) {
        pending.append((tag, { [disk] in
            try! disk.flush()
            return 0
        }))
    }

    func zero(at offset: UInt64, length: UInt64, tag: UInt64) {
        pending.append((tag, { [disk] in
            disk.zero(at: offset, length: length)
            return 0
        }))
    }
}
