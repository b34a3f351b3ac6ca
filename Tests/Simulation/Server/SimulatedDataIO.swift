// The data device of one simulated reactor: operations wait until the scheduler completes them, in
// any order; a write reaches the disk when it is submitted or when it completes. A device in memory
// does most of them at once.

import BlockIO
import Glibc
import ThinPool

final class SimulatedDataIO: DataIO {
    enum Kind { case read, write, flush, zero }

    struct Operation {
        var kind: Kind
        var offset: UInt64
        var memory: [iovec]
        var length: Int
        var tag: UInt64
        /// How it ended, if its effect is on the disk already: bytes or -errno.
        var result: Int32?
        /// How often it is still passed over: now and then a device is slow for a long time.
        var patience = 0
    }

    let disk: SimulatedDisk
    private(set) var pending: [Operation] = []
    /// The next operation of this kind takes very long, and does what it does at its end.
    var delaysNext: Kind?
    /// The next flush is done at once, and its result is long on its way.
    var tellsFlushLate = false
    /// Shared with the world, so that the run stays one sequence of draws. Nil: operations are done
    /// when they are completed, whole and in order.
    private let draw: ((Int) -> Int)?
    private let slowOneIn: Int
    private let isInMemory: Bool

    /// Memory that stands for a part of the disk: it has the disk's bytes at the moment when a write
    /// takes them from there.
    private final class Loan {
        let memory: UnsafeMutableRawBufferPointer
        let offset: UInt64

        init(_ length: Int, at offset: UInt64) {
            memory = .allocate(byteCount: length, alignment: 16)
            self.offset = offset
        }

        deinit { memory.deallocate() }
    }
    private var loans: [Loan] = []

    init(
        disk: SimulatedDisk, slowOneIn: Int = 12, isInMemory: Bool = false, draw: ((Int) -> Int)?
    ) {
        self.disk = disk
        self.slowOneIn = slowOneIn
        self.isInMemory = isInMemory
        self.draw = draw
    }

    func read(
        at offset: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64
    ) -> Int32? {
        start(.read, offset, [iovec(iov_base: into, iov_len: length)], length, tag)
    }

    func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool, tag: UInt64
    ) -> Int32? {
        let memory = (0..<count).map { vectors[$0] }
        return start(.write, offset, memory, memory.reduce(0) { $0 + $1.iov_len }, tag)
    }

    func flush(tag: UInt64) -> Int32? { start(.flush, 0, [], 0, tag) }

    func isHole(at offset: UInt64, length: UInt64) -> Bool {
        disk.isHole(at: offset, length: Int(length))
    }

    func contents(at offset: UInt64, length: Int) -> UnsafeMutableRawPointer? {
        guard isInMemory else { return nil }
        let loan = Loan(length, at: offset)
        loans.append(loan)
        return loan.memory.baseAddress
    }

    /// Bytes that are written; on loan, what the disk has there now.
    private func source(_ vector: iovec, _ count: Int) throws(DeviceError)
        -> UnsafeMutableRawPointer
    {
        let start = vector.iov_base!
        for loan in loans {
            let place = start - loan.memory.baseAddress!
            if place >= 0 && place < loan.memory.count {
                try disk.read(
                    at: loan.offset + UInt64(place),
                    into: UnsafeMutableRawBufferPointer(start: start, count: count))
            }
        }
        return start
    }

    func zero(at offset: UInt64, length: UInt64, tag: UInt64) -> Bool {
        guard pending.count(where: { $0.kind == .zero }) < Self.zeroings else { return false }
        add(
            Operation(
                kind: .zero, offset: offset, memory: [], length: Int(length), tag: tag))
        return true
    }
    private static let zeroings = 3

    /// The result, if the operation is done at once.
    private func start(
        _ kind: Kind, _ offset: UInt64, _ memory: [iovec], _ length: Int, _ tag: UInt64
    ) -> Int32? {
        let operation = Operation(
            kind: kind, offset: offset, memory: memory, length: length, tag: tag)
        if isInMemory, let draw, delaysNext != kind, !tellsFlushLate, draw(8) > 0 {
            return apply(operation, lengthDone(of: operation, draw))
        }
        add(operation)
        return nil
    }

    private func add(_ operation: Operation) {
        var operation = operation
        let kind = operation.kind
        let length = operation.length
        if delaysNext == kind {
            delaysNext = nil
            operation.patience = 150
        } else if tellsFlushLate, kind == .flush {
            tellsFlushLate = false
            operation.result = apply(operation, length)
            operation.patience = 60
        } else if let draw {
            // A flush covers what completed before it was sent, so it may run at once or at the end.
            if draw(2) == 0 { operation.result = apply(operation, length) }
            if draw(slowOneIn) == 0 { operation.patience = 10 + draw(90) }
        }
        pending.append(operation)
    }

    /// An operation to complete next; nil if the one drawn takes its time.
    func next() -> Int? {
        guard let draw else { return 0 }
        let index = draw(pending.count)
        if pending[index].patience > 0 {
            pending[index].patience -= 1
            return nil
        }
        return index
    }

    /// Completes the `index`th pending operation; returns its tag and result.
    func complete(_ index: Int) -> (tag: UInt64, result: Int32) {
        let operation = pending.remove(at: index)
        if let result = operation.result { return (operation.tag, result) }
        guard let draw else { return (operation.tag, apply(operation, operation.length)) }
        // Now and then the device transfers nothing yet.
        if draw(64) == 0 { return (operation.tag, draw(2) == 0 ? -EAGAIN : -EINTR) }
        return (operation.tag, apply(operation, lengthDone(of: operation, draw)))
    }

    /// Now and then the device transfers less than it was asked to.
    private func lengthDone(of operation: Operation, _ draw: (Int) -> Int) -> Int {
        let length = operation.length
        guard operation.kind == .read || operation.kind == .write, length > 512, draw(16) == 0
        else { return length }
        return 512 * (1 + draw(length / 512 - 1))
    }

    /// The machine or the server ends: what is in flight may reach the disk's cache, or not.
    func abandon(_ happens: () -> Bool) {
        for (index, operation) in pending.enumerated() where operation.result == nil {
            if operation.kind != .flush, operation.kind != .read, happens() {
                pending[index].result = apply(operation, operation.length)
            }
        }
    }

    /// The writes that are in flight, done on a copy of the disk.
    func copyWrites(to copy: SimulatedDisk) {
        let other = SimulatedDataIO(disk: copy, draw: nil)
        other.loans = loans
        for operation in pending where operation.result == nil {
            if operation.kind == .write || operation.kind == .zero {
                _ = other.apply(operation, operation.length)
            }
        }
    }

    private func apply(_ operation: Operation, _ length: Int) -> Int32 {
        do throws(DeviceError) {
            switch operation.kind {
            case .flush:
                try disk.flush()
                return 0
            case .zero:
                try disk.tryZero(at: operation.offset, length: UInt64(length))
                return 0
            case .read:
                try disk.read(
                    at: operation.offset,
                    into: UnsafeMutableRawBufferPointer(
                        start: operation.memory[0].iov_base, count: length))
            case .write:
                let bytes = UnsafeMutableRawBufferPointer.allocate(
                    byteCount: length, alignment: 16)
                defer { bytes.deallocate() }
                var done = 0
                for vector in operation.memory where done < length {
                    let count = min(length - done, vector.iov_len)
                    (bytes.baseAddress! + done).copyMemory(
                        from: try source(vector, count), byteCount: count)
                    done += count
                }
                try disk.write(at: operation.offset, from: UnsafeRawBufferPointer(bytes))
            }
            return Int32(length)
        } catch { return -error.code }
    }
}
