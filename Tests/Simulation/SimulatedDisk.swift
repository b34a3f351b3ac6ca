// A disk with a volatile write cache.
//
// What was written since the last flush may survive a power cut or not, each 512-byte sector by
// itself, in any of the versions it had. Reads see the newest.

import BlockIO

public final class SimulatedDisk: BlockDevice {
    public static let sector = 512

    public let path: String
    public private(set) var bytes: [UInt8]
    /// Older versions of the sectors written since the last flush, oldest first; the oldest is
    /// what is on the medium.
    private var volatileSectors: [Int: [[UInt8]]] = [:]
    public private(set) var flushes = 0
    public private(set) var writes = 0

    public init(path: String, size: Int) {
        self.path = path
        bytes = [UInt8](repeating: 0, count: size)
    }

    /// A disk with these contents, all of them on the medium.
    public init(path: String, bytes: [UInt8]) {
        self.path = path
        self.bytes = bytes
    }

    /// What was on the medium before anybody wrote.
    func fill(_ byte: UInt8) { bytes = [UInt8](repeating: byte, count: bytes.count) }

    public var size: UInt64 { UInt64(bytes.count) }

    public func grow(to size: Int) {
        precondition(size >= bytes.count)
        bytes.append(contentsOf: [UInt8](repeating: 0, count: size - bytes.count))
    }

    public func read(
        at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer
    ) throws(DeviceError) {
        guard offset + UInt64(buffer.count) <= size else { throw past("read", offset) }
        bytes.withUnsafeBytes {
            buffer.copyMemory(
                from: UnsafeRawBufferPointer(
                    rebasing: $0[Int(offset)..<Int(offset) + buffer.count]))
        }
    }

    public func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        guard offset + UInt64(buffer.count) <= size else { throw past("write", offset) }
        precondition(offset % 512 == 0 && buffer.count % 512 == 0, "unaligned write")
        writes += 1
        keepVersions(Int(offset), buffer.count)
        bytes.withUnsafeMutableBytes {
            UnsafeMutableRawBufferPointer(rebasing: $0[Int(offset)..<Int(offset) + buffer.count])
                .copyMemory(from: buffer)
        }
    }

    public func flush() throws(DeviceError) {
        flushes += 1
        volatileSectors.removeAll(keepingCapacity: true)
    }

    /// A write with FUA: just these sectors are on the medium.
    func makeDurable(at offset: UInt64, length: Int) {
        for sector in (Int(offset) / Self.sector)..<((Int(offset) + length) / Self.sector) {
            volatileSectors[sector] = nil
        }
    }

    /// Zeroes, with the same promise as a write: none before a flush.
    public func zero(at offset: UInt64, length: UInt64) {
        keepVersions(Int(offset), Int(length))
        for i in Int(offset)..<Int(offset + length) { bytes[i] = 0 }
    }

    /// After a discard the sectors hold anything: here bytes that no volume ever wrote.
    public func discard(at offset: UInt64, length: UInt64) {
        keepVersions(Int(offset), Int(length))
        for i in Int(offset)..<Int(offset + length) { bytes[i] = 0xDD }
    }

    /// The power fails: every unflushed sector keeps one of its versions.
    public func cutPower(_ random: inout SeededRandom) {
        // All, none or some: the extremes are the likeliest bugs.
        let mode = random.below(4)
        for sector in volatileSectors.keys.sorted() {
            let versions = volatileSectors[sector]!
            let kept: Int
            switch mode {
            case 0: kept = 0
            case 1: kept = versions.count
            default: kept = random.below(versions.count + 1)
            }
            if kept == versions.count { continue }
            for i in 0..<Self.sector { bytes[sector * Self.sector + i] = versions[kept][i] }
        }
        volatileSectors.removeAll()
    }

    private func keepVersions(_ offset: Int, _ length: Int) {
        for sector in (offset / Self.sector)..<((offset + length) / Self.sector) {
            let old = Array(bytes[(sector * Self.sector)..<((sector + 1) * Self.sector)])
            volatileSectors[sector, default: []].append(old)
        }
    }

    private func past(_ operation: String, _ offset: UInt64) -> DeviceError {
        DeviceError(
            operation: operation, path: path, offset: offset, code: 0,
            reason: "it lies past the device's end")
    }
}
