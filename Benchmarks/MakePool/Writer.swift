// Commits without a pool: blocks in ascending order, many at a time, durable only at the end.

import BlockIO
import ThinMetadata

final class Writer {
    let metadata: ThinMetadata
    private let device: FileDevice
    private let buffer: AlignedBuffer
    private static let batch = 1024

    init(_ device: FileDevice, cacheBlocks: Int) throws {
        self.device = device
        metadata = try ThinMetadata(device, cacheBlocks: cacheBlocks)
        buffer = AlignedBuffer(count: Self.batch * Layout.blockSize)
    }

    /// Commits if enough has changed.
    func operationEnded() throws {
        guard metadata.dirtyBlocks > metadata.cacheBlocks / 4 else { return }
        try commit()
        metadata.trimCache()
    }

    func commit() throws {
        let transaction = try metadata.freeze()
        // Blocks that follow each other on the device go there in one write.
        var first = MetadataBlock(0)
        var count = 0
        for index in 0..<transaction.blocks {
            let place = buffer.pointer + count * Layout.blockSize
            let number = transaction.copyBlock(index, to: place)
            if count == 0 {
                first = number
            } else if number.rawValue != first.rawValue + UInt64(count) {
                try write(first, buffer.pointer, count)
                buffer.pointer.copyMemory(from: place, byteCount: Layout.blockSize)
                first = number
                count = 0
            }
            count += 1
            if count == Self.batch {
                try write(first, buffer.pointer, count)
                count = 0
            }
        }
        if count > 0 { try write(first, buffer.pointer, count) }
        transaction.copySuperblock(to: buffer.pointer)
        try write(MetadataBlock(0), buffer.pointer, 1)
        let freed = metadata.committed(transaction)
        metadata.makeAvailable(freed.discarded + freed.replaced)
    }

    func finish() throws { try device.flush() }

    private func write(
        _ first: MetadataBlock, _ start: UnsafeMutableRawPointer, _ count: Int
    ) throws {
        try device.write(
            at: first.rawValue * UInt64(Layout.blockSize),
            from: UnsafeRawBufferPointer(start: start, count: count * Layout.blockSize))
    }
}
