// The data device of one simulated reactor: operations wait until the scheduler completes them, in
// any order; a write reaches the disk when it is submitted or when it completes.

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
        var durable: Bool
        var tag: UInt64
        /// Its effect is on the disk already.
        var applied = false
        /// How often it is still passed over: now and then a device is slow for a long time.
        var patience = 0
    }

    let disk: SimulatedDisk
    var pending: [Operation] = []
    /// Shared with the world, so that the run stays one sequence of draws.
    let draw: (Int) -> Int

    init(disk: SimulatedDisk, draw: @escaping (Int) -> Int) {
        self.disk = disk
        self.draw = draw
    }

    func read(at offset: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64) {
        add(.read, offset, [iovec(iov_base: into, iov_len: length)], length, tag)
    }

    func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, durable: Bool, tag: UInt64
    ) {
        let memory = (0..<count).map { vectors[$0] }
        add(.write, offset, memory, memory.reduce(0) { $0 + $1.iov_len }, tag, durable)
    }

    func flush(tag: UInt64) { add(.flush, 0, [], 0, tag) }

    func zero(at offset: UInt64, length: UInt64, tag: UInt64) {
        add(.zero, offset, [], Int(length), tag)
    }

    private func add(
        _ kind: Kind, _ offset: UInt64, _ memory: [iovec], _ length: Int, _ tag: UInt64,
        _ durable: Bool = false
    ) {
        var operation = Operation(
            kind: kind, offset: offset, memory: memory, length: length, durable: durable, tag: tag)
        // A flush covers what completed before it was sent, so it may run at once or at the end.
        if draw(2) == 0 {
            apply(&operation, length)
            operation.applied = true
        } else if draw(12) == 0 {
            operation.patience = 10 + draw(90)
        }
        pending.append(operation)
    }

    /// An operation to complete next; nil if the one drawn takes its time.
    func next() -> Int? {
        let index = draw(pending.count)
        if pending[index].patience > 0 {
            pending[index].patience -= 1
            return nil
        }
        return index
    }

    /// Completes the `index`th pending operation; returns its tag and result.
    func complete(_ index: Int) -> (tag: UInt64, result: Int32) {
        var operation = pending.remove(at: index)
        var length = operation.length
        if !operation.applied {
            // Now and then the device transfers less than it was asked to.
            if operation.kind == .read || operation.kind == .write, length > 512, draw(16) == 0 {
                length = 512 * (1 + draw(length / 512 - 1))
            }
            apply(&operation, length)
        }
        switch operation.kind {
        case .read, .write: return (operation.tag, Int32(length))
        case .flush, .zero: return (operation.tag, 0)
        }
    }

    /// A power cut: what is in flight may reach the disk's cache, or not.
    func abandon() {
        for var operation in pending where !operation.applied && operation.kind != .read {
            if operation.kind != .flush, draw(2) == 0 { apply(&operation, operation.length) }
        }
        pending = []
    }

    private func apply(_ operation: inout Operation, _ length: Int) {
        switch operation.kind {
        case .flush:
            try! disk.flush()
        case .zero:
            disk.zero(at: operation.offset, length: UInt64(length))
        case .read, .write:
            var offset = operation.offset
            var left = length
            for vector in operation.memory where left > 0 {
                let count = min(left, vector.iov_len)
                if operation.kind == .read {
                    try! disk.read(
                        at: offset,
                        into: UnsafeMutableRawBufferPointer(start: vector.iov_base, count: count))
                } else {
                    try! disk.write(
                        at: offset,
                        from: UnsafeRawBufferPointer(start: vector.iov_base, count: count))
                }
                offset += UInt64(count)
                left -= count
            }
            // A durable write is on the medium when it completes; flushing everything would
            // promise too much, but a disk may always do so.
            if operation.kind == .write && operation.durable { disk.makeDurable(
                at: operation.offset, length: length) }
        }
    }
}
