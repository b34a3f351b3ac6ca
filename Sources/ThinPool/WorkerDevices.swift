// The background's I/O on real devices. What belongs to one step is done together: the data device is
// flushed while metadata blocks are written, neighbours of them in one write.

import BlockIO
import Glibc
import ThinMetadata

final class WorkerDevices {
    /// Metadata blocks in flight at once.
    private static let batchBlocks = 256
    private static let queueEntries = 512

    private let metadata: FileDevice
    private let data: FileDevice
    /// Nil: the kernel gives none, and one operation is done after the other.
    private let queue: (any IOQueue)?
    /// The blocks of a batch, and what the kernel is told of where they are.
    private let buffer: UnsafeMutableRawPointer
    private let vectors: UnsafeMutablePointer<iovec>

    /// A metadata block to be written, and the number of the operation that asks for it.
    private typealias Block = (operation: Int, transaction: FrozenTransaction, index: Int)

    /// Blocks that are neighbours on the device and in the buffer.
    private struct Run {
        let offset: UInt64
        let memory: UnsafeMutableRawPointer
        var blocks = 1
        /// The one that is told how it went: the first.
        let operation: Int

        var length: Int { blocks * Layout.blockSize }
        var end: UInt64 { offset + UInt64(length) }
        var bytes: UnsafeRawBufferPointer { UnsafeRawBufferPointer(start: memory, count: length) }
    }

    /// - Note: made and used by one thread, which the queue belongs to.
    init(metadata: FileDevice, data: FileDevice, allowRing: Bool) {
        self.metadata = metadata
        self.data = data
        queue = try? makeIOQueue(entries: Self.queueEntries, allowRing: allowRing).0
        buffer = aligned_alloc(4096, Self.batchBlocks * Layout.blockSize)!
        vectors = .allocate(capacity: Self.batchBlocks)
    }

    deinit {
        free(buffer)
        vectors.deallocate()
    }

    /// - Returns: for each operation 0, or an errno.
    func perform(_ io: [WorkerIO]) -> [Int32] {
        guard let queue else { return io.map(performAlone) }
        var results = [Int32](repeating: 0, count: io.count)
        var blocks: [Block] = []
        var flushes = 0
        for (operation, what) in io.enumerated() {
            switch what {
            case .flushData, .flushMetadata:
                let device = if case .flushData = what { data } else { metadata }
                queue.flush(device.fileDescriptor, tag: UInt64(operation))
                flushes += 1
            case .writeMetadata(let transaction, let index):
                blocks.append((operation, transaction, index))
            case .writeSuperblock, .writeData, .discardData:
                results[operation] = performAlone(what)
            }
        }
        do throws(DeviceError) {
            for start in stride(from: 0, to: blocks.count, by: Self.batchBlocks) {
                let end = min(start + Self.batchBlocks, blocks.count)
                try write(blocks[start..<end], by: queue, beside: &flushes, &results)
            }
            while flushes > 0 {
                try queue.run(wait: true) { tag, result in
                    results[Int(tag)] = max(0, -result)
                    flushes -= 1
                }
            }
        } catch {
            // The kernel lost our ring: nothing is known of what was in flight.
            return [Int32](repeating: EIO, count: io.count)
        }
        return results
    }

    /// Writes a batch and waits for it, since the buffer is the next one's too. Flushes may end
    /// meanwhile.
    private func write(
        _ batch: ArraySlice<Block>, by queue: any IOQueue, beside flushes: inout Int,
        _ results: inout [Int32]
    ) throws(DeviceError) {
        let runs = load(batch)
        let firstTag = UInt64(results.count)
        for (number, run) in runs.enumerated() {
            vectors[number] = iovec(iov_base: run.memory, iov_len: run.length)
            queue.write(
                metadata.fileDescriptor, at: run.offset, vectors: vectors + number, count: 1,
                tag: firstTag + UInt64(number))
        }
        var writing = runs.count
        while writing > 0 {
            try queue.run(wait: true) { tag, result in
                if tag < firstTag {
                    results[Int(tag)] = max(0, -result)
                    flushes -= 1
                } else {
                    let run = runs[Int(tag - firstTag)]
                    if Int(result) != run.length { results[run.operation] = finish(run, result) }
                    writing -= 1
                }
            }
        }
    }

    /// The blocks of a batch in the buffer.
    private func load(_ batch: ArraySlice<Block>) -> [Run] {
        var runs: [Run] = []
        for (place, block) in batch.enumerated() {
            let memory = buffer + place * Layout.blockSize
            let number = block.transaction.copyBlock(block.index, to: memory)
            let offset = number.rawValue * UInt64(Layout.blockSize)
            if runs.last?.end == offset {
                runs[runs.count - 1].blocks += 1
            } else {
                runs.append(Run(offset: offset, memory: memory, operation: block.operation))
            }
        }
        return runs
    }

    /// A run that was written short is written again in full.
    private func finish(_ run: Run, _ result: Int32) -> Int32 {
        if result < 0 && result != -EAGAIN && result != -EINTR { return -result }
        return code { () throws(DeviceError) in
            try metadata.write(at: run.offset, from: run.bytes)
        }
    }

    private func performAlone(_ operation: WorkerIO) -> Int32 {
        let block = UnsafeRawBufferPointer(start: buffer, count: Layout.blockSize)
        return code { () throws(DeviceError) in
            switch operation {
            case .flushData: try data.flush()
            case .flushMetadata: try metadata.flush()
            case .writeMetadata(let transaction, let index):
                let number = transaction.copyBlock(index, to: buffer)
                try metadata.write(at: number.rawValue * UInt64(Layout.blockSize), from: block)
            case .writeSuperblock(let transaction):
                transaction.copySuperblock(to: buffer)
                try metadata.write(at: 0, from: block)
                try metadata.flush()
            case .writeData(let offset, let bytes):
                try data.write(at: offset, from: bytes)
            case .discardData(let offset, let length):
                try data.discard(at: offset, length: length)
            }
        }
    }

    /// 0, or the errno of what it throws.
    private func code(_ body: () throws(DeviceError) -> Void) -> Int32 {
        do throws(DeviceError) {
            try body()
            return 0
        } catch { return error.code == 0 ? EIO : error.code }
    }
}
