// A disk with a volatile write cache, and with faults.
//
// What was written since the last flush may survive a power cut or not, each 512-byte sector by
// itself, in any of the versions it had: that covers a cache that is written back in any order, at
// any time, and torn writes. Reads see the newest.

import BlockIO
import Glibc

public final class SimulatedDisk: BlockDevice {
    public static let sector = 512
    /// What a discarded sector reads as, but for a sparse disk: bytes that no volume ever wrote.
    static let discarded: UInt8 = 0xDD

    public let path: String
    /// What reads see.
    public private(set) var bytes: [UInt8]
    /// What is on the medium for certain.
    private var medium: [UInt8]
    /// Writes since the last flush, oldest first.
    private var cache: [CachedWrite] = []
    public private(set) var flushes = 0
    public private(set) var writes = 0
    /// Faults that have struck it.
    private(set) var struck = 0

    /// Like a sparse file: what is discarded reads as zeroes, and it is known where nothing is.
    public let isSparse: Bool
    /// Of a sparse disk, by sector: written since it was made, or discarded.
    private var isWritten: [Bool]

    public var faults: [Fault] = []
    var meter = IOMeter()
    var random = SeededRandom(seed: 1)
    /// The next write of a place other than the first block gets lost, without an error.
    var losesNextWrite = false
    /// The next such write lands here instead. Bytes.
    var misdirectsNextWrite: UInt64?
    private(set) var hasLostWrite = false
    var isToLose: Bool { losesNextWrite || misdirectsNextWrite != nil }
    /// Called before every read: a walker's chance to let others go on.
    public var onRead: (() -> Void)?
    /// The metadata blocks that have been read since it was set.
    var blocksRead: Set<Int>?

    /// Some of what reads see will never reach the medium.
    private var hasForgotten = false

    private struct CachedWrite {
        var sectors: Range<Int>
        var bytes: [UInt8]
        /// Sectors that have reached the medium since, in this or a newer version.
        var settled: Set<Int> = []
    }

    public convenience init(path: String, size: Int, isSparse: Bool = false) {
        self.init(
            path: path, bytes: [UInt8](repeating: 0, count: size),
            isWritten: isSparse ? [Bool](repeating: false, count: size / Self.sector) : nil)
    }

    /// A disk with these contents, all of them on the medium.
    public convenience init(path: String, bytes: [UInt8]) {
        self.init(path: path, bytes: bytes, isWritten: nil)
    }

    private init(path: String, bytes: [UInt8], isWritten: [Bool]?) {
        self.path = path
        self.bytes = bytes
        medium = bytes
        isSparse = isWritten != nil
        self.isWritten = isWritten ?? []
    }

    /// A copy of its own, without faults.
    func copy() -> SimulatedDisk {
        let other = SimulatedDisk(
            path: path, bytes: bytes, isWritten: isSparse ? isWritten : nil)
        other.medium = medium
        other.hasForgotten = hasForgotten
        other.cache = cache
        other.random = random
        return other
    }

    public var size: UInt64 { UInt64(bytes.count) }
    /// Writes that a power cut may undo.
    public var unflushed: Int { cache.count }

    public func grow(to size: Int) {
        precondition(size >= bytes.count)
        let more = [UInt8](repeating: 0, count: size - bytes.count)
        bytes.append(contentsOf: more)
        medium.append(contentsOf: more)
        if isSparse {
            isWritten.append(
                contentsOf: [Bool](repeating: false, count: more.count / Self.sector))
        }
    }

    /// Whether nothing is there, so that the range reads as zeroes.
    func isHole(at offset: UInt64, length: Int) -> Bool {
        guard isSparse else { return false }
        let first = Int(offset) / Self.sector
        return !isWritten[first..<first + length / Self.sector].contains(true)
    }

    // MARK: - I/O

    public func read(
        at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer
    ) throws(DeviceError) {
        onRead?()
        if blocksRead != nil { blocksRead!.insert(Int(offset) / 4096) }
        guard offset + UInt64(buffer.count) <= size else { throw past("read", offset) }
        try strike(.read, offset, buffer.count)
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
        do throws(DeviceError) { try strike(.write, offset, buffer.count) } catch {
            // A part of it may have been done.
            let part = random.below(buffer.count / Self.sector + 1) * Self.sector
            if part > 0 {
                store(
                    Int(offset), [UInt8](UnsafeRawBufferPointer(rebasing: buffer[..<part])))
            }
            throw error
        }
        var offset = offset
        if offset > 0 {
            if losesNextWrite {
                losesNextWrite = false
                hasLostWrite = true
                return
            }
            if let other = misdirectsNextWrite {
                misdirectsNextWrite = nil
                hasLostWrite = true
                offset = other
            }
        }
        store(Int(offset), [UInt8](buffer))
    }

    public func flush() throws(DeviceError) {
        flushes += 1
        do throws(DeviceError) { try strike(.flush, 0, 0) } catch {
            loseSome()
            throw error
        }
        for write in cache { reachMedium(write) }
        cache.removeAll(keepingCapacity: true)
    }

    /// A write with FUA: just these sectors are on the medium.
    func makeDurable(at offset: UInt64, length: Int) {
        let range = (Int(offset) / Self.sector)..<((Int(offset) + length) / Self.sector)
        let place = Int(offset)..<Int(offset) + length
        medium.replaceSubrange(place, with: bytes[place])
        for index in cache.indices where cache[index].sectors.overlaps(range) {
            cache[index].settled.formUnion(cache[index].sectors.clamped(to: range))
        }
    }

    /// Zeroes, with the same promise as a write: none before a flush.
    public func zero(at offset: UInt64, length: UInt64) {
        store(Int(offset), [UInt8](repeating: 0, count: Int(length)))
    }

    /// After a discard the sectors hold anything.
    public func discard(at offset: UInt64, length: UInt64) {
        store(
            Int(offset),
            [UInt8](repeating: isSparse ? 0 : Self.discarded, count: Int(length)))
        if isSparse {
            let first = Int(offset) / Self.sector
            for sector in first..<first + Int(length) / Self.sector { isWritten[sector] = false }
        }
    }

    func tryZero(at offset: UInt64, length: UInt64) throws(DeviceError) {
        try strike(.zero, offset, Int(length))
        zero(at: offset, length: length)
    }

    func tryDiscard(at offset: UInt64, length: UInt64) throws(DeviceError) {
        try strike(.discard, offset, Int(length))
        discard(at: offset, length: length)
    }

    private func store(_ offset: Int, _ new: [UInt8]) {
        bytes.withUnsafeMutableBytes { all in
            new.withUnsafeBytes {
                UnsafeMutableRawBufferPointer(rebasing: all[offset..<offset + new.count])
                    .copyMemory(from: $0)
            }
        }
        cache.append(
            CachedWrite(
                sectors: (offset / Self.sector)..<((offset + new.count) / Self.sector),
                bytes: new))
        if isSparse {
            for sector in cache.last!.sectors { isWritten[sector] = true }
        }
    }

    /// Older contents have come back: where they are is no hole.
    private func findWritten() {
        guard isSparse else { return }
        for sector in isWritten.indices where !isWritten[sector] {
            let place = sector * Self.sector
            isWritten[sector] = bytes[place..<place + Self.sector].contains { $0 != 0 }
        }
    }

    private func reachMedium(_ write: CachedWrite) {
        medium.withUnsafeMutableBytes { Self.apply(write, to: $0) }
    }

    private static func apply(_ write: CachedWrite, to image: UnsafeMutableRawBufferPointer) {
        let start = write.sectors.lowerBound * sector
        write.bytes.withUnsafeBytes { bytes in
            func copy(_ range: Range<Int>) {
                UnsafeMutableRawBufferPointer(rebasing: image[range]).copyMemory(
                    from: UnsafeRawBufferPointer(
                        rebasing: bytes[(range.lowerBound - start)..<(range.upperBound - start)]))
            }
            if write.settled.isEmpty {
                copy(start..<start + bytes.count)
            } else {
                for each in write.sectors where !write.settled.contains(each) {
                    copy(each * sector..<(each + 1) * sector)
                }
            }
        }
    }

    // MARK: - Faults

    private func strike(
        _ operation: Fault.Operations, _ offset: UInt64, _ length: Int
    ) throws(DeviceError) {
        var code = meter.next()
        if code == nil, !faults.isEmpty {
            let sectors = (Int(offset) / Self.sector)..<((Int(offset) + length) / Self.sector)
            if let index = faults.firstIndex(where: {
                $0.remaining > 0 && $0.operations.contains(operation)
                    && ($0.sectors?.overlaps(sectors) ?? true || sectors.isEmpty)
            }) {
                if faults[index].remaining != Fault.forEver { faults[index].remaining -= 1 }
                code = faults[index].code
                meter.struck += 1
            }
        }
        guard let code else { return }
        struck += 1
        throw DeviceError(
            operation: "use", path: path, offset: offset, code: code,
            reason: "a simulated fault: \(String(cString: strerror(code)))")
    }

    /// After a failed flush nobody knows what became of the cache: some of it can still be read, as
    /// from a page cache that takes it for clean, but will never reach the medium.
    private func loseSome() {
        guard random.oneIn(2) else { return }
        hasForgotten = true
        for (sector, write) in choice(from: cache).sorted(by: { $0.key < $1.key })
        where random.oneIn(2) {
            let place = sector * Self.sector
            for i in 0..<Self.sector {
                let byte =
                    write < 0
                    ? medium[place + i]
                    : cache[write].bytes[
                        (sector - cache[write].sectors.lowerBound) * Self.sector + i]
                medium[place + i] = byte
            }
            for index in cache.indices where cache[index].sectors.contains(sector) {
                cache[index].settled.insert(sector)
            }
        }
    }

    /// Nothing is remembered any more of what will not reach the medium.
    func forgetLost() {
        guard hasForgotten else { return }
        hasForgotten = false
        var result = medium
        result.withUnsafeMutableBytes { for write in cache { Self.apply(write, to: $0) } }
        bytes = result
        findWritten()
    }

    /// Changes a bit on the medium, mostly one of a byte that is in use; the block's bytes before.
    func rot(block: Int, of size: Int) -> [UInt8] {
        let old = Array(bytes[block * size..<(block + 1) * size])
        let used = random.oneIn(4) ? [] : old.indices.filter { old[$0] != 0 }
        let place =
            block * size + (used.isEmpty ? random.below(size) : used[random.below(used.count)])
        let bit = UInt8(1) << UInt8(random.below(8))
        bytes[place] ^= bit
        medium[place] ^= bit
        return old
    }

    /// Undoes `rot`, unless the block has been written since.
    func heal(block: Int, of size: Int, old: [UInt8]) {
        var different = 0
        for i in 0..<size where bytes[block * size + i] != old[i] { different += 1 }
        guard different == 1 else { return }
        for i in 0..<size {
            bytes[block * size + i] = old[i]
            medium[block * size + i] = old[i]
        }
    }

    // MARK: - Power cuts

    /// The power fails: every unflushed sector keeps one of its versions.
    public func cutPower(_ random: inout SeededRandom) {
        // All, none or some: the extremes are the likeliest bugs.
        switch random.below(5) {
        case 0: cutPower { _ in false }
        case 1: cutPower { _ in true }
        case 2: cutPower { _ in random.oneIn(2) }
        default:
            self.random = SeededRandom(seed: random.next())
            var result = medium
            for (sector, write) in choice(from: cache) where write >= 0 {
                let first = cache[write].sectors.lowerBound
                for i in 0..<Self.sector {
                    result[sector * Self.sector + i] =
                        cache[write].bytes[(sector - first) * Self.sector + i]
                }
            }
            finishCut(result)
        }
    }

    /// The power fails, and of the unflushed writes just those survive, in their order, for which
    /// `keeps` says so.
    func cutPower(_ keeps: (Int) -> Bool) {
        var result = medium
        for index in cache.indices where keeps(index) {
            result.withUnsafeMutableBytes { Self.apply(cache[index], to: $0) }
        }
        finishCut(result)
    }

    private func finishCut(_ result: [UInt8]) {
        bytes = result
        medium = result
        cache.removeAll()
        findWritten()
    }

    /// For every unflushed sector the write whose version survives, -1: none.
    private func choice(from cache: [CachedWrite]) -> [Int: Int] {
        var chosen: [Int: Int] = [:]
        var versions: [Int: UInt64] = [:]
        for index in cache.indices {
            for sector in cache[index].sectors where !cache[index].settled.contains(sector) {
                let count = versions[sector, default: 1] + 1
                versions[sector] = count
                if random.oneIn(count) {
                    chosen[sector] = index
                } else if chosen[sector] == nil {
                    chosen[sector] = -1
                }
            }
        }
        return chosen
    }

    private func past(_ operation: String, _ offset: UInt64) -> DeviceError {
        DeviceError(
            operation: operation, path: path, offset: offset, code: EIO,
            reason: "it lies past the device's end")
    }
}
