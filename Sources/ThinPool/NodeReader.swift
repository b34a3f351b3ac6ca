// Reads of metadata nodes for one thread: several at once, into memory of its own, without the
// pool's lock.

import BlockIO
import ThinMetadata

/// Made, used and released on one thread.
final class NodeReader {
    /// Nodes read at once.
    static let most = 64

    private let device: any BlockDevice
    /// Nil where the device is no file, or the system gives no queue: one read after the other.
    private let queue: (any IOQueue)?
    private let descriptor: Int32
    private let buffer = AlignedBuffer(count: NodeReader.most * Layout.blockSize)
    /// What to read.
    var wanted: [MetadataBlock] = []

    func want(_ block: MetadataBlock) {
        if !isFull, !wanted.contains(block) { wanted.append(block) }
    }

    private var isRead: [Bool] = []

    init(_ device: any BlockDevice, allowRing: Bool) {
        self.device = device
        let file = device as? FileDevice
        descriptor = file?.fileDescriptor ?? -1
        queue =
            file == nil
            ? nil : try? makeIOQueue(entries: NodeReader.most, allowRing: allowRing).0
    }

    var isFull: Bool { wanted.count == Self.most }

    /// Reads what is wanted. What cannot be read is left out: whoever needs it will say why.
    func read() {
        isRead = [Bool](repeating: false, count: wanted.count)
        if let queue, wanted.count > 1, readTogether(queue) { return }
        for (index, block) in wanted.enumerated() where !isRead[index] {
            do throws(DeviceError) {
                try device.read(at: Self.offset(block), into: memory(index))
                isRead[index] = true
            } catch {}
        }
    }

    private func readTogether(_ queue: any IOQueue) -> Bool {
        for (index, block) in wanted.enumerated() {
            queue.read(
                descriptor, at: Self.offset(block), into: memory(index).baseAddress!,
                length: Layout.blockSize, tag: UInt64(index))
        }
        do throws(DeviceError) {
            while queue.outstanding > 0 {
                try queue.run(wait: true) { index, result in
                    isRead[Int(index)] = Int(result) == Layout.blockSize
                }
            }
            return true
        } catch { return false }
    }

    /// Calls `body` for each node that was read.
    func forEach(_ body: (MetadataBlock, UnsafeRawPointer) -> Void) {
        for (index, block) in wanted.enumerated() where isRead[index] {
            body(block, UnsafeRawPointer(memory(index).baseAddress!))
        }
    }

    private func memory(_ index: Int) -> UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(
            start: buffer.pointer + index * Layout.blockSize, count: Layout.blockSize)
    }

    private static func offset(_ block: MetadataBlock) -> UInt64 {
        block.rawValue * UInt64(Layout.blockSize)
    }
}
