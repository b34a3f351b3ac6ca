// An independent reader of metadata images: parses raw blocks by the format's tables, recounts
// every reference, and compares with what the space maps claim. Shares no code with the module.

import Foundation

struct ImageFault: Error, CustomStringConvertible {
    let description: String
    init(_ text: String) { description = text }
}

struct ImageDevice: Equatable {
    var mapped: UInt64 = 0
    var transaction: UInt64 = 0
    var created: UInt32 = 0
    var snapped: UInt32 = 0
    /// Virtual block -> (data block << 24 | time).
    var mappings: [UInt64: UInt64] = [:]
}

struct Image {
    var time: UInt32 = 0
    var devices: [UInt64: ImageDevice] = [:]
    /// Blocks that the superblock reaches, block 0 included.
    var live: Set<UInt64> = []
    var dataAllocated: UInt64 = 0
    var metadataAllocated: UInt64 = 0
    /// Levels of the deepest mapping tree.
    var depth = 0
}

private let crcTable: [UInt32] = (0..<256).map { index in
    var crc = UInt32(index)
    for _ in 0..<8 { crc = crc >> 1 ^ (crc & 1 == 1 ? 0x82F6_3B78 : 0) }
    return crc
}

func referenceChecksum(_ block: UnsafeRawPointer, salt: UInt32) -> UInt32 {
    crcTable.withUnsafeBufferPointer { table in
        var crc: UInt32 = 0xFFFF_FFFF
        for index in 4..<4096 {
            let byte = block.load(fromByteOffset: index, as: UInt8.self)
            crc = crc >> 8 ^ table[Int(UInt8(truncatingIfNeeded: crc) ^ byte)]
        }
        return crc ^ salt
    }
}

/// Reads and checks a whole image.
/// - Parameter strictHints: also nr_free, none_free_before and nr_allocated have to be exact.
func readImage(_ device: TestDevice, strictHints: Bool = true) throws -> Image {
    let reader = ImageReader(device)
    try reader.read(strictHints: strictHints)
    return reader.image
}

private final class ImageReader {
    enum Kind { case top, mapping, details, index, overflow }
    static let saltSuper: UInt32 = 160_774
    static let saltNode: UInt32 = 121_107
    static let saltBitmap: UInt32 = 240_779
    static let saltIndex: UInt32 = 160_478

    let device: TestDevice
    var image = Image()
    var counts: [UInt32]
    var dataCounts: [UInt32] = []
    var depths: [UInt64: Int] = [:]
    var leafRanges: [UInt64: (first: UInt64, last: UInt64, entries: Int)] = [:]

    init(_ device: TestDevice) {
        self.device = device
        counts = Array(repeating: 0, count: device.blocks)
    }

    func u32(_ p: UnsafeRawPointer, _ o: Int) -> UInt32 {
        p.loadUnaligned(fromByteOffset: o, as: UInt32.self).littleEndian
    }
    func u64(_ p: UnsafeRawPointer, _ o: Int) -> UInt64 {
        p.loadUnaligned(fromByteOffset: o, as: UInt64.self).littleEndian
    }
    func fail(_ text: String) -> ImageFault { ImageFault(text) }

    func block(_ number: UInt64, salt: UInt32, _ what: String) throws -> UnsafeRawPointer {
        guard number < UInt64(device.blocks) else { throw fail("\(what): block \(number) outside") }
        let p = UnsafeRawPointer(device.block(number))
        guard u32(p, 0) == referenceChecksum(p, salt: salt) else {
            throw fail("\(what): block \(number): checksum")
        }
        guard u64(p, 8) == number else { throw fail("\(what): block \(number): blocknr") }
        return p
    }

    /// Counts a pointer; true when the block is seen for the first time.
    func reference(_ number: UInt64) throws -> Bool {
        guard number < UInt64(counts.count) else { throw fail("pointer to \(number) outside") }
        counts[Int(number)] += 1
        image.live.insert(number)
        return counts[Int(number)] == 1
    }

    static func valueSize(_ kind: Kind) -> Int {
        switch kind {
        case .top, .mapping: 8
        case .details: 24
        case .index: 16
        case .overflow: 4
        }
    }

    /// Visits a tree in key order. `leafEntry` is called for the entries of a node only on the
    /// first visit of that node; `entry` on every visit.
    func walk(
        _ root: UInt64, _ kind: Kind, isRoot: Bool = true, from: UInt64 = 0, to: UInt64? = nil,
        depth: Int = 1, firstVisit: (UInt64, UnsafeRawPointer) throws -> Void,
        entry: (UInt64, UnsafeRawPointer) throws -> Void, counting: Bool = true
    ) throws -> Int {
        var isFirst = false
        if counting { isFirst = try reference(root) }
        let p = try block(root, salt: Self.saltNode, "\(kind) node")
        let flags = u32(p, 4)
        guard flags == 1 || flags == 2 else { throw fail("node \(root): flags \(flags)") }
        let isLeaf = flags == 2
        let size = isLeaf ? Self.valueSize(kind) : 8
        let capacity = 4064 / (8 + size) / 3 * 3
        let count = Int(u32(p, 16))
        guard u32(p, 20) == UInt32(capacity), u32(p, 24) == UInt32(size), u32(p, 28) == 0 else {
            throw fail("node \(root): geometry")
        }
        guard count <= capacity else { throw fail("node \(root): count") }
        guard isRoot || count >= capacity / 3 else {
            throw fail("node \(root) of \(kind): underfull, \(count) of \(capacity)")
        }
        guard isLeaf || !isRoot || count >= 2 else { throw fail("node \(root): single child root") }
        var levels = 1
        for index in 0..<count {
            let key = u64(p, 32 + 8 * index)
            if index > 0, key <= u64(p, 24 + 8 * index) { throw fail("node \(root): key order") }
            guard key >= from, to.map({ key < $0 }) ?? true else {
                throw fail("node \(root): key \(key) outside \(from)..<\(to ?? 0)")
            }
            let value = p + 32 + 8 * capacity + size * index
            if isLeaf {
                if isFirst { try firstVisit(key, value) }
                try entry(key, value)
            } else {
                let next = index + 1 < count ? u64(p, 40 + 8 * index) : to
                let below = try walk(
                    u64(value, 0), kind, isRoot: false, from: key, to: next, depth: depth + 1,
                    firstVisit: firstVisit, entry: entry, counting: counting && isFirst)
                if index > 0 && levels != below + 1 { throw fail("node \(root): uneven depth") }
                levels = below + 1
            }
        }
        return levels
    }

    func read(strictHints: Bool) throws {
        let superblock = try block(0, salt: Self.saltSuper, "superblock")
        guard u64(superblock, 32) == 27_022_010, u32(superblock, 40) == 2 else {
            throw fail("superblock: magic or version")
        }
        image.time = u32(superblock, 44)
        _ = try reference(0)
        let dataBlocks = u64(superblock, 64)
        let metadataBlocks = u64(superblock, 192)
        guard metadataBlocks <= UInt64(device.blocks) else { throw fail("metadata too large") }
        dataCounts = Array(repeating: 0, count: Int(dataBlocks))

        try readDevices(top: u64(superblock, 320), details: u64(superblock, 328))
        let held = u64(superblock, 56)
        if held != 0 {
            _ = try reference(held)
            let copy = try block(held, salt: Self.saltSuper, "held superblock")
            try readTopLevel(u64(copy, 320)) { _, _ in }
            _ = try walk(u64(copy, 328), .details, firstVisit: { _, _ in }, entry: { _, _ in })
        }
        try readSpaceMaps(superblock, dataBlocks, metadataBlocks, strictHints)
        for device in image.devices.values {
            for raw in device.mappings.values where raw & 0xFF_FFFF > UInt64(image.time) {
                throw fail("a mapping is newer than the pool")
            }
            guard device.snapped <= image.time, device.created <= image.time else {
                throw fail("a device is newer than the pool")
            }
        }
    }

    func readTopLevel(_ root: UInt64, _ each: (UInt64, UInt64) throws -> Void) throws {
        var roots: [(UInt64, UInt64)] = []
        var newRoots: [UInt64] = []
        _ = try walk(
            root, .top, firstVisit: { _, value in newRoots.append(self.u64(value, 0)) },
            entry: { key, value in roots.append((key, self.u64(value, 0))) })
        // Entries count once per leaf of the top level, however often that is shared.
        for mappingRoot in newRoots {
            let levels = try walk(
                mappingRoot, .mapping,
                firstVisit: { _, value in
                    let data = self.u64(value, 0) >> 24
                    guard data < UInt64(self.dataCounts.count) else {
                        throw self.fail("data block \(data) outside")
                    }
                    self.dataCounts[Int(data)] += 1
                }, entry: { _, _ in })
            image.depth = max(image.depth, levels)
        }
        for (key, mappingRoot) in roots { try each(key, mappingRoot) }
    }

    func readDevices(top: UInt64, details: UInt64) throws {
        try readTopLevel(top) { id, root in
            var device = ImageDevice()
            _ = try self.walk(
                root, .mapping, firstVisit: { _, _ in },
                entry: { key, value in device.mappings[key] = self.u64(value, 0) },
                counting: false)
            self.image.devices[id] = device
        }
        var seen = 0
        _ = try walk(
            details, .details, firstVisit: { _, _ in },
            entry: { id, value in
                seen += 1
                guard var device = self.image.devices[id] else {
                    throw self.fail("device \(id) has details only")
                }
                device.mapped = self.u64(value, 0)
                device.transaction = self.u64(value, 8)
                device.created = self.u32(value, 16)
                device.snapped = self.u32(value, 20)
                guard device.mapped == UInt64(device.mappings.count) else {
                    throw self.fail(
                        "device \(id): mapped_blocks \(device.mapped), \(device.mappings.count)")
                }
                self.image.devices[id] = device
            })
        guard seen == image.devices.count else { throw fail("a device without details") }
    }

    func readSpaceMaps(
        _ superblock: UnsafeRawPointer, _ dataBlocks: UInt64, _ metadataBlocks: UInt64,
        _ strict: Bool
    ) throws {
        var entries: [(UInt64, UInt32, UInt32)] = []
        _ = try walk(
            u64(superblock, 80), .index, firstVisit: { _, _ in },
            entry: { key, value in
                guard key == UInt64(entries.count) else { throw self.fail("data index keys") }
                entries.append((self.u64(value, 0), self.u32(value, 8), self.u32(value, 12)))
            })
        var dataOverflow: [UInt64: UInt32] = [:]
        _ = try walk(
            u64(superblock, 88), .overflow, firstVisit: { _, _ in },
            entry: { dataOverflow[$0] = self.u32($1, 0) })
        var metadataOverflow: [UInt64: UInt32] = [:]
        _ = try walk(
            u64(superblock, 216), .overflow, firstVisit: { _, _ in },
            entry: { metadataOverflow[$0] = self.u32($1, 0) })
        let index = u64(superblock, 208)
        _ = try reference(index)
        let indexBlock = try block(index, salt: Self.saltIndex, "index block")
        var metadataEntries: [(UInt64, UInt32, UInt32)] = []
        for slot in 0..<255 {
            let p = indexBlock + 16 + 16 * slot
            if slot < Int((metadataBlocks + 16_319) / 16_320) {
                metadataEntries.append((u64(p, 0), u32(p, 8), u32(p, 12)))
            } else if u64(p, 0) != 0 || u64(p, 8) != 0 {
                throw fail("index entry \(slot) is not zero")
            }
        }
        for entry in entries + metadataEntries { _ = try reference(entry.0) }
        image.dataAllocated = try compare(
            "data", dataCounts, dataBlocks, entries, dataOverflow, u64(superblock, 72), strict)
        image.metadataAllocated = try compare(
            "metadata", counts, metadataBlocks, metadataEntries, metadataOverflow,
            u64(superblock, 200), strict)
    }

    func compare(
        _ name: String, _ counts: [UInt32], _ blocks: UInt64, _ entries: [(UInt64, UInt32, UInt32)],
        _ overflow: [UInt64: UInt32], _ allocated: UInt64, _ strict: Bool
    ) throws -> UInt64 {
        guard entries.count == Int((blocks + 16_319) / 16_320) else {
            throw fail("\(name): \(entries.count) bitmaps for \(blocks) blocks")
        }
        var used: UInt64 = 0
        var large = 0
        for (page, entry) in entries.enumerated() {
            let p = try block(entry.0, salt: Self.saltBitmap, "\(name) bitmap \(page)")
            var free: UInt32 = 0
            var first: UInt32?
            for bit in 0..<16_320 {
                let byte = p.load(fromByteOffset: 16 + bit / 4, as: UInt8.self)
                let pair = byte >> UInt8(2 * (bit % 4)) & 3
                let short: UInt32 = [0, 2, 1, 3][Int(pair)]
                let number = page * 16_320 + bit
                let expected = number < Int(blocks) ? counts[number] : 0
                if short != min(expected, 3) {
                    throw fail("\(name) block \(number): bitmap \(short), counted \(expected)")
                }
                if short == 3 {
                    large += 1
                    guard overflow[UInt64(number)] == expected else {
                        throw fail(
                            "\(name) block \(number): overflow "
                                + "\(overflow[UInt64(number)] ?? 0), counted \(expected)")
                    }
                }
                if short == 0 {
                    free += 1
                    if first == nil { first = UInt32(bit) }
                } else {
                    used += 1
                }
            }
            if strict {
                guard free == entry.1 else {
                    throw fail("\(name) bitmap \(page): nr_free \(entry.1), counted \(free)")
                }
                guard entry.2 <= first ?? 16_320 else {
                    throw fail("\(name) bitmap \(page): none_free_before \(entry.2)")
                }
            }
        }
        guard large == overflow.count else { throw fail("\(name): stale overflow entries") }
        guard !strict || used == allocated else {
            throw fail("\(name): nr_allocated \(allocated), counted \(used)")
        }
        return used
    }
}
