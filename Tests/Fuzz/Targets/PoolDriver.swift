// A pool on devices in memory, in one thread: whatever it wants done is done at once, in order.

import BlockIO
import Glibc
import ThinMetadata
import ThinPool

final class PoolDriver {
    let pool: Pool
    private let metadata: OverlayDevice
    private let data: OverlayDevice
    private let io: DirectDataIO
    private(set) var engine: VolumeIO!
    private var now: UInt64 = 1_000_000_000
    private var answers: [UInt64: Int32] = [:]
    private var nextCookie: UInt64 = 1
    private var isAwake = false

    /// No state of a small pool needs more steps than this to come to rest.
    private static let patience = 20_000

    init(
        metadata: OverlayDevice, data: OverlayDevice, options: PoolOptions = PoolOptions()
    ) throws(PoolError) {
        self.metadata = metadata
        self.data = data
        pool = try Pool(metadata: metadata, data: data, options: options)
        io = DirectDataIO(data)
        nonisolated(unsafe) weak let box = self
        engine = VolumeIO(pool: pool, io: io) { box?.isAwake = true }
    }

    /// To be called before the driver is given up.
    func close() {
        settle()
        require(engine.inFlight == 0, "\(engine.inFlight) requests are never answered")
        engine.close()
    }

    /// Sends a request and lets everything come to rest. Returns 0 or errno.
    func perform(
        _ operation: VolumeOperation, _ volume: Volume, _ offset: UInt64, _ length: UInt64,
        _ buffer: UnsafeMutableRawPointer? = nil, fua: Bool = false, noHole: Bool = false
    ) -> Int32 {
        let cookie = nextCookie
        nextCookie += 1
        turn {
            engine.submit(
                VolumeRequest(
                    operation: operation, volume: volume, offset: offset, length: length,
                    buffer: buffer, fua: fua, noHole: noHole, cookie: cookie))
        }
        settle()
        guard let answer = answers.removeValue(forKey: cookie) else {
            fatalError("fuzz: a request is never answered: \(operation) \(offset) \(length)")
        }
        return answer
    }

    func change(_ change: VolumeChange) -> PoolError? {
        nonisolated(unsafe) var result: PoolError??
        pool.request(change) { result = .some($0) }
        settle()
        guard let result else { fatalError("fuzz: a change is never answered: \(change)") }
        return result
    }

    /// Until nobody has anything to do any more, and the open transaction is committed.
    func settle() {
        for _ in 0..<Self.patience {
            if isAwake || io.hasCompletions { turn {} }
            switch pool.nextStep(now: now) {
            case .io(let steps): pool.stepDone(steps.map { perform($0) }, now: now)
            case .again: break
            case .wait(let deadline):
                if let deadline { now = max(now, deadline) }
                if deadline == nil && !isAwake && !io.hasCompletions { return }
            }
        }
        fatalError("fuzz: the pool never comes to rest")
    }

    private func turn(_ body: () -> Void) {
        isAwake = false
        engine.beginTurn()
        body()
        for (tag, result) in io.takeCompletions() { engine.complete(tag: tag, result: result) }
        engine.endTurn()
        engine.takeFinished { cookie, error in
            require(answers.updateValue(error, forKey: cookie) == nil, "answered twice")
        }
    }

    private func perform(_ io: WorkerIO) -> Int32 {
        do throws(DeviceError) {
            switch io {
            case .flushData, .flushMetadata: break
            case .writeMetadata(let transaction, let index):
                try metadata.write { transaction.copyBlock(index, to: $0) }
            case .writeSuperblock(let transaction):
                try metadata.write {
                    transaction.copySuperblock(to: $0)
                    return MetadataBlock(0)
                }
            case .writeData(let offset, let bytes): try data.write(at: offset, from: bytes)
            case .discardData(let offset, let length):
                try data.zero(at: offset, length: length)
            }
            return 0
        } catch { return error.code }
    }
}

extension OverlayDevice {
    /// Writes a block, which `fill` puts into memory and says the place of.
    func write(_ fill: (UnsafeMutableRawPointer) -> MetadataBlock) throws(DeviceError) {
        let memory = UnsafeMutableRawPointer.allocate(
            byteCount: Layout.blockSize, alignment: Layout.blockSize)
        defer { memory.deallocate() }
        let number = fill(memory)
        try write(
            at: number.rawValue * UInt64(Layout.blockSize),
            from: UnsafeRawBufferPointer(start: memory, count: Layout.blockSize))
    }
}

/// All I/O is done on the spot, but zeroing, which the interface has no immediate answer for.
private final class DirectDataIO: DataIO {
    private let device: OverlayDevice

    init(_ device: OverlayDevice) { self.device = device }

    func read(
        at offset: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64
    ) -> Int32? {
        do throws(DeviceError) {
            try device.read(
                at: offset, into: UnsafeMutableRawBufferPointer(start: into, count: length))
            return Int32(length)
        } catch { return -error.code }
    }

    func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool, tag: UInt64
    ) -> Int32? {
        do throws(DeviceError) {
            var done: UInt64 = 0
            for vector in UnsafeBufferPointer(start: vectors, count: count) {
                try device.write(
                    at: offset + done,
                    from: UnsafeRawBufferPointer(start: vector.iov_base, count: vector.iov_len))
                done += UInt64(vector.iov_len)
            }
            return Int32(done)
        } catch { return -error.code }
    }

    func flush(tag: UInt64) -> Int32? { 0 }
    func isHole(at offset: UInt64, length: UInt64) -> Bool { false }
    func contents(at offset: UInt64, length: Int) -> UnsafeMutableRawPointer? { nil }

    /// Tags and results that `VolumeIO.complete` is still to be told.
    private var completions: [(tag: UInt64, result: Int32)] = []
    var hasCompletions: Bool { !completions.isEmpty }
    func takeCompletions() -> [(tag: UInt64, result: Int32)] {
        defer { completions = [] }
        return completions
    }

    func zero(at offset: UInt64, length: UInt64, tag: UInt64) -> Bool {
        var result: Int32 = 0
        do throws(DeviceError) { try device.zero(at: offset, length: length) } catch {
            result = -error.code
        }
        completions.append((tag, result))
        return true
    }
}
