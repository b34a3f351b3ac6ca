// Devices of metadata blocks that take memory only for what was written to them.
//
// Some of the metadata's shortcuts are taken only when tens of thousands of blocks are free. A
// history writes a few thousand.

import BlockIO
import ThinMetadata

/// A large device on a simulated disk that has a place for each block written so far. Faults and
/// power cuts are the disk's.
final class SparseDevice: BlockDevice {
    let disk: SimulatedDisk
    private(set) var blocks: Int
    /// Where on the disk a block is. One that is missing was never written, and is zero.
    private var places: [UInt64: Int] = [:]

    private static let firstPlaces = 256

    init(blocks: Int) {
        self.blocks = blocks
        disk = SimulatedDisk(
            path: "simulated metadata", size: Self.firstPlaces * Layout.blockSize)
    }

    var path: String { disk.path }
    var size: UInt64 { UInt64(blocks * Layout.blockSize) }

    func grow(to blocks: Int) {
        precondition(blocks >= self.blocks)
        self.blocks = blocks
    }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(DeviceError) {
        let first = blocks(offset, buffer.count)
        for index in 0..<buffer.count / Layout.blockSize {
            let part = UnsafeMutableRawBufferPointer(
                rebasing: buffer[index * Layout.blockSize..<(index + 1) * Layout.blockSize])
            if let place = places[first + UInt64(index)] {
                try disk.read(at: UInt64(place * Layout.blockSize), into: part)
            } else {
                part.initializeMemory(as: UInt8.self, repeating: 0)
            }
        }
    }

    func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        let first = blocks(offset, buffer.count)
        for index in 0..<buffer.count / Layout.blockSize {
            let part = UnsafeRawBufferPointer(
                rebasing: buffer[index * Layout.blockSize..<(index + 1) * Layout.blockSize])
            let place = place(of: first + UInt64(index))
            try disk.write(at: UInt64(place * Layout.blockSize), from: part)
        }
    }

    func flush() throws(DeviceError) { try disk.flush() }

    /// What a read would give; no fault strikes and nothing is counted.
    func peek(_ block: UInt64) -> [UInt8] {
        guard let place = places[block] else {
            return [UInt8](repeating: 0, count: Layout.blockSize)
        }
        return Array(disk.bytes[place * Layout.blockSize..<(place + 1) * Layout.blockSize])
    }

    private func place(of block: UInt64) -> Int {
        if let place = places[block] { return place }
        let place = places.count
        places[block] = place
        if (place + 1) * Layout.blockSize > disk.bytes.count {
            disk.grow(to: 2 * disk.bytes.count)
        }
        return place
    }

    private func blocks(_ offset: UInt64, _ length: Int) -> UInt64 {
        let size = UInt64(Layout.blockSize)
        precondition(
            offset % size == 0 && length % Layout.blockSize == 0
                && offset + UInt64(length) <= self.size, "not whole blocks of the device")
        return offset / size
    }
}

/// What another device holds, and changes of its own on top: to look at a state without faults, and
/// to spoil it.
final class ScratchDevice: BlockDevice {
    private let base: SparseDevice
    private var changed: [UInt64: [UInt8]] = [:]
    private(set) var size: UInt64

    init(_ base: SparseDevice) {
        self.base = base
        size = base.size
    }

    var path: String { "a copy of \(base.path)" }

    func truncate(to size: UInt64) { self.size = size }

    /// Makes its changes the other device's.
    func apply() throws {
        for (block, bytes) in changed.sorted(by: { $0.key < $1.key }) {
            try bytes.withUnsafeBytes {
                try base.write(at: block * UInt64(Layout.blockSize), from: $0)
            }
        }
    }

    subscript(block: UInt64) -> [UInt8] {
        get { changed[block] ?? base.peek(block) }
        set { changed[block] = newValue }
    }

    /// Changes a block and makes it a well-formed one of this kind again.
    func edit(_ block: UInt64, _ kind: BlockKind, _ change: (UnsafeMutableRawPointer) -> Void) {
        var bytes = self[block]
        bytes.withUnsafeMutableBytes {
            change($0.baseAddress!)
            $0.baseAddress!.setLE32(0, UnsafeRawPointer($0.baseAddress!).checksum(as: kind))
        }
        self[block] = bytes
    }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(DeviceError) {
        let first = offset / UInt64(Layout.blockSize)
        for index in 0..<buffer.count / Layout.blockSize {
            UnsafeMutableRawBufferPointer(
                rebasing: buffer[index * Layout.blockSize..<(index + 1) * Layout.blockSize]
            ).copyBytes(from: self[first + UInt64(index)])
        }
    }

    func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        let first = offset / UInt64(Layout.blockSize)
        for index in 0..<buffer.count / Layout.blockSize {
            self[first + UInt64(index)] = Array(
                buffer[index * Layout.blockSize..<(index + 1) * Layout.blockSize])
        }
    }

    func flush() throws(DeviceError) {}
}
