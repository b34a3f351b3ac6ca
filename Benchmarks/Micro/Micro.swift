// microbench: what the small pieces of the data path and of a commit cost, with everything in
// memory.
//
// One thread, nothing contended, no device: see Docs/scale.md for how the numbers add up.

import BlockIO
import CLinux
import Glibc
import NBDProtocol
import ThinMetadata
import ThinPool

@main
enum Micro {
    static func main() throws {
        print(Timing.head)
        for row in table() + codec() { print(row.row) }
        for row in try metadata() { print(row.row) }
    }

    // MARK: - Mapping table and epochs

    private static let lookups = 1_000_000

    private static func table() -> [Timing] {
        let dense = filled(every: 1)
        let sparse = filled(every: 16)
        var random = Random(state: 1)
        let places = (0..<lookups).map { _ in random.below(UInt64(lookups)) }
        let epochs = Epochs()
        let reader = epochs.register()
        let pins = EpochPins()
        return [
            Timing("mapping table: random block, all mapped", operations: lookups) {
                for place in places { keep(dense.lookup(place)) }
            },
            Timing("mapping table: random block, one of 16 mapped", operations: lookups) {
                for place in places { keep(sparse.lookup(place)) }
            },
            Timing("epoch: pin for a turn, unpin", operations: lookups) {
                for _ in 0..<lookups {
                    epochs.publish(reader, epochs.now)
                    epochs.publish(reader, Epochs.idle)
                }
            },
            Timing("epoch: an I/O counted in and out", operations: lookups) {
                for _ in 0..<lookups { pins.leave(pins.enter(1)) }
            },
        ]
    }

    private static func filled(every step: UInt64) -> MappingTable {
        let table = MappingTable(blocks: UInt64(lookups))!
        var first: UInt64 = 0
        while first < UInt64(lookups) {
            let range = table.pageRange(of: first)
            table.load(pageOf: first) { set in
                for block in range where block % step == 0 {
                    set(VirtualBlock(block), Mapping(block: DataBlock(block), time: 0))
                }
            }
            first = range.upperBound
        }
        return table
    }

    // MARK: - The wire

    private static func codec() -> [Timing] {
        let memory = UnsafeMutableRawPointer.allocate(
            byteCount: Layout.blockSize, alignment: Layout.blockSize)
        defer { memory.deallocate() }
        memset(memory, 1, Layout.blockSize)
        // A READ of 4 KiB.
        let header: [UInt8] = [
            0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 16, 0, 0,
            0, 16, 0,
        ]
        let request = UnsafeMutableRawPointer.allocate(byteCount: header.count, alignment: 8)
        defer { request.deallocate() }
        request.copyMemory(from: header, byteCount: header.count)
        return [
            Timing("(keeping a number, part of every row)", operations: lookups) {
                for number in 0..<lookups { keep(number) }
            },
            Timing("codec: request header parsed", operations: lookups) {
                for _ in 0..<lookups { keep(RequestHeader.parse(request)) }
            },
            Timing("codec: reply header written", operations: lookups) {
                for cookie in 0..<UInt64(lookups) {
                    SimpleReply.write(to: memory, error: .none, cookie: cookie)
                    keep(memory.loadUnaligned(fromByteOffset: 8, as: UInt64.self))
                }
            },
            Timing("CRC-32C of 4 KiB", operations: lookups / 10) {
                for _ in 0..<lookups / 10 { keep(clinux_crc32c(memory, Layout.blockSize)) }
            },
        ]
    }

    // MARK: - Metadata

    private static let mappings: UInt64 = 10_000_000
    /// Mapped are the multiples of this.
    private static let spacing: UInt64 = 4
    private static let samples = 100_000
    private static let id = ThinDeviceID(1)

    private static func metadata() throws -> [Timing] {
        let device = try MemoryDevice(size: 4 << 30)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 1 << 25)
        let metadata = try ThinMetadata(device, cacheBlocks: 1 << 19)
        try metadata.createThin(id)
        for index in 0..<mappings { try insert(metadata, index * spacing) }
        try commit(metadata, device)

        var random = Random(state: 2)
        let known = (0..<samples).map { _ in VirtualBlock(random.below(mappings) * spacing) }
        var rows = [
            try Timing(
                "metadata: random lookup in 10 M mappings", operations: samples, prepare: {}
            ) { for block in known { keep(try metadata.lookup(id, block)) } },
            try Timing(
                "metadata: exclusive by path, in 10 M", operations: samples, prepare: {}
            ) { for block in known { keep(try metadata.isExclusive(id, block)) } },
        ]
        var next = mappings * spacing
        rows.append(
            try Timing(
                "metadata: block reserved and mapped, ascending", operations: samples,
                prepare: { try commit(metadata, device) },
                body: {
                    for _ in 0..<samples {
                        try insert(metadata, next)
                        next += 1
                    }
                }))
        var fresh: [UInt64] = []
        rows.append(
            try Timing(
                "metadata: block reserved and mapped, random", operations: samples,
                prepare: {
                    try commit(metadata, device)
                    // Between two multiples, a place that no other sample has.
                    fresh = (0..<samples).map { _ in random.below(mappings) * spacing + 1 }
                },
                body: { for block in fresh { try insert(metadata, block) } }))
        for dirty in [100, 10_000] {
            var frozen: FrozenTransaction?
            let memory = AlignedBuffer(count: Layout.blockSize)
            try commit(metadata, device)
            rows.append(
                try Timing(
                    "commit: freeze and checksums, a block of \(dirty)", operations: dirty,
                    prepare: {
                        if let frozen { try finish(frozen, metadata, device) }
                        while metadata.dirtyBlocks < dirty {
                            try insert(metadata, random.below(mappings) * spacing + 2)
                        }
                    },
                    body: {
                        let transaction = try metadata.freeze()
                        for index in 0..<transaction.blocks {
                            keep(transaction.copyBlock(index, to: memory.pointer))
                        }
                        frozen = transaction
                    }))
            if let frozen { try finish(frozen, metadata, device) }
        }
        return rows
    }

    private static func insert(_ metadata: ThinMetadata, _ block: UInt64) throws(MetadataError) {
        guard let place = try metadata.allocateDataBlock() else { return }
        keep(try metadata.insert(id, VirtualBlock(block), place))
    }

    private static func commit(_ metadata: ThinMetadata, _ device: MemoryDevice) throws {
        try finish(try metadata.freeze(), metadata, device)
    }

    private static func finish(
        _ transaction: FrozenTransaction, _ metadata: ThinMetadata, _ device: MemoryDevice
    ) throws {
        let memory = AlignedBuffer(count: Layout.blockSize)
        for index in 0..<transaction.blocks {
            let number = transaction.copyBlock(index, to: memory.pointer)
            try device.write(
                at: number.rawValue * UInt64(Layout.blockSize),
                from: UnsafeRawBufferPointer(memory.bytes))
        }
        let freed = metadata.committed(transaction)
        metadata.makeAvailable(freed.discarded + freed.replaced)
        metadata.trimCache()
    }
}
