// The data device as one reactor's engine sees it: operations go through the reactor's queue, but
// for a file in memory, whose I/O is a copy that nobody need wait for: done at once, it costs no
// completion (and the kernel's queue would give it to a thread of its own). A long one is done in
// pieces, between which the engine lets others have theirs.
//
// Zeroing is one call where the file system has it, else pieces of zeroes are written.

import BlockIO
import Glibc
import ThinPool

final class QueueDataIO: DataIO {
    private let queue: any IOQueue
    private let fd: Int32
    private let memory: MemoryFile?

    /// A zeroing that is done by writing: where it is, and what is left.
    private struct Zeroing {
        var engineTag: UInt64 = 0
        var offset: UInt64 = 0
        var length: UInt64 = 0
        var vector = iovec()
        var isWriting = false
        var nextFree: Int32 = 0
    }

    /// One I/O of a zeroing by writing.
    static let pieceSize = 1 << 20
    /// Zeroings at once. Zeroing is rare, and each may be 4 GiB.
    private static let zeroingCount = 64

    private let zeroings: UnsafeMutablePointer<Zeroing>
    private var freeZeroing: Int32 = 0
    private lazy var zeroes = AlignedMemory(Self.pieceSize)
    /// The file system said that it cannot zero a range; it is not asked again.
    private var lacksZeroRange = false

    init(queue: any IOQueue, fd: Int32, memory: MemoryFile?) {
        self.queue = queue
        self.fd = fd
        self.memory = memory
        zeroings = .allocate(capacity: Self.zeroingCount)
        for index in 0..<Self.zeroingCount {
            (zeroings + index).initialize(to: Zeroing(nextFree: Int32(index + 1)))
        }
        zeroings[Self.zeroingCount - 1].nextFree = -1
    }

    deinit {
        zeroings.deallocate()
    }

    func read(
        at offset: UInt64, into target: UnsafeMutableRawPointer, length: Int, tag: UInt64
    ) -> Int32? {
        if let memory { return memory.read(at: offset, into: target, length: length) }
        queue.read(fd, at: offset, into: target, length: length, tag: tag | Tag.engineBit)
        return nil
    }

    func write(
        at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool, tag: UInt64
    ) -> Int32? {
        if let memory {
            return memory.write(at: offset, vectors: vectors, count: count, isNew: isNew)
        }
        queue.write(fd, at: offset, vectors: vectors, count: count, tag: tag | Tag.engineBit)
        return nil
    }

    func flush(tag: UInt64) -> Int32? {
        if let memory { return memory.flush() }
        queue.flush(fd, tag: tag | Tag.engineBit)
        return nil
    }

    func isHole(at offset: UInt64, length: UInt64) -> Bool {
        // On a disk whole blocks are worth their zeroes: the file stays in one piece, and later writes
        // to the block find their space allocated.
        memory?.isHole(at: offset, length: length) ?? false
    }

    func contents(at offset: UInt64, length: Int) -> UnsafeMutableRawPointer? {
        memory?.contents(at: offset, length: length)
    }

    func zero(at offset: UInt64, length: UInt64, tag: UInt64) -> Bool {
        guard freeZeroing >= 0 else { return false }
        let index = Int(freeZeroing)
        freeZeroing = zeroings[index].nextFree
        zeroings[index] = Zeroing(engineTag: tag, offset: offset, length: length)
        if lacksZeroRange {
            writePiece(index)
        } else {
            queue.allocate(
                fd, mode: AllocateMode.zeroRange, at: offset, length: length, tag: zeroTag(index))
        }
        return true
    }

    /// A completion of this device: the engine's tag and result, or nil if the operation goes on.
    func completed(_ tag: Tag, _ result: Int32) -> (tag: UInt64, result: Int32)? {
        guard tag.rawValue & Tag.zeroBit != 0 else {
            return (tag.rawValue & ~Tag.engineBit, result)
        }
        let index = tag.index
        let zeroing = zeroings + index
        if !zeroing.pointee.isWriting {
            switch result {
            case -EOPNOTSUPP, -ENOSYS:
                lacksZeroRange = true
                fallthrough
            // Not whole sectors of a block device: only writing takes that.
            case -EINVAL:
                writePiece(index)
                return nil
            default: break
            }
        } else if result > 0 {
            zeroing.pointee.offset += UInt64(result)
            zeroing.pointee.length -= UInt64(result)
            if zeroing.pointee.length > 0 {
                writePiece(index)
                return nil
            }
        }
        let isShort = zeroing.pointee.isWriting && result == 0
        let done = (zeroing.pointee.engineTag, isShort ? -EIO : min(result, 0))
        zeroing.pointee.nextFree = freeZeroing
        freeZeroing = Int32(index)
        return done
    }

    private func zeroTag(_ index: Int) -> UInt64 {
        Tag.engineBit | Tag.zeroBit | UInt64(index)
    }

    private func writePiece(_ index: Int) {
        let zeroing = zeroings + index
        zeroing.pointee.isWriting = true
        zeroing.pointee.vector = iovec(
            iov_base: zeroes.buffer.pointer,
            iov_len: Int(min(zeroing.pointee.length, UInt64(Self.pieceSize))))
        let offset = MemoryLayout<Zeroing>.offset(of: \.vector)!
        let vector = (UnsafeRawPointer(zeroing) + offset).assumingMemoryBound(to: iovec.self)
        queue.write(
            fd, at: zeroing.pointee.offset, vectors: vector, count: 1,
            tag: zeroTag(index))
    }
}

/// A buffer that a class can make when it is first needed.
private final class AlignedMemory {
    let buffer: AlignedBuffer
    init(_ count: Int) { buffer = AlignedBuffer(count: count) }
}
