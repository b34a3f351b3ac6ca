// make-pool: makes a pool with many mappings, volumes or snapshots in seconds, for Scripts/scale.
//
// Nothing is written to the data device but the catalogue. Mappings go through ThinMetadata, as in
// the product, so what comes out passes the checks; only the durability of each commit is left out.

import ArgumentParser
import BlockIO
import Control
import Glibc
import ThinMetadata
import ThinPool

@main
struct MakePool: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "make-pool",
        abstract: "Make a large pool quickly: mappings without data.",
        discussion: """
            The volumes are v0, v1, ...; the snapshots, of v0 and the oldest first, s0, s1, ... \
            Mappings are spread over the whole volume; with --dense they are its first blocks. \
            Which data block a virtual block gets is shuffled.
            """)

    @Argument(help: "The pool's directory, which is made.")
    var pool: String
    @Option(help: "The data device, if it is not to be a file in the pool's directory.")
    var data: String?
    @Option(help: "Size of the data device, where it is to be made.", transform: Self.byteCount)
    var dataSize: UInt64?
    @Option(help: "Size of the metadata file.", transform: Self.byteCount)
    var metadataSize: UInt64 = 4 << 30
    @Option(help: "Size of each volume.", transform: Self.byteCount)
    var size: UInt64
    @Option(help: "Volumes.")
    var volumes = 1
    @Option(help: "Mapped blocks of each volume.")
    var mappings = 0
    @Flag(help: "Map the first blocks, one after the other.")
    var dense = false
    @Option(help: "Snapshots of the first volume.")
    var snapshots = 0
    @Option(help: "Blocks of the first volume that get a new place after each snapshot.")
    var changes = 0
    @Option(help: "Seed of the places.")
    var seed: UInt64 = 1

    private static let blockSize: UInt64 = 64 << 10
    /// Data blocks that are shuffled at once.
    private static let window = 65_536
    private static let cacheBlocks = 1 << 18

    func validate() throws {
        let blocks = size / Self.blockSize
        if UInt64(mappings) > blocks {
            throw ValidationError("--mappings: a volume has only \(blocks) blocks")
        }
        if changes > 0 && mappings == 0 {
            throw ValidationError("--changes needs --mappings")
        }
    }

    func run() throws {
        var plan = PoolPlan()
        plan.data = data
        plan.dataSize = dataSize
        plan.metadataSize = metadataSize
        plan.blockSize = Self.blockSize
        let directory = try PoolDirectory.create(pool, plan)
        let device = try FileDevice(path: directory.metadataPath, access: .readWrite)
        let writer = try Writer(device, cacheBlocks: Self.cacheBlocks)
        var places = Places(writer.metadata, window: Self.window, seed: seed)
        var catalogue = Catalogue()

        for number in 0..<volumes {
            let id = ThinDeviceID(UInt32(number + 1))
            try writer.metadata.createThin(id)
            try map(id, writer, &places)
            catalogue.volumes.append(entry(id, "v\(number)", origin: nil))
        }
        let origin = ThinDeviceID(1)
        for number in 0..<snapshots {
            let id = ThinDeviceID(UInt32(volumes + number + 1))
            try writer.metadata.createSnapshot(id, of: origin)
            catalogue.volumes.append(entry(id, "s\(number)", origin: "v0"))
            for _ in 0..<changes {
                let index = places.random.next() % UInt64(mappings)
                _ = try writer.metadata.insert(
                    origin, VirtualBlock(virtualBlock(index)), try places.next())
            }
            try writer.operationEnded()
        }
        try places.giveBack()
        let data = try FileDevice(path: directory.dataPath, access: .readWrite)
        try write(catalogue, writer, data)
        try data.flush()
        try writer.commit()
        try writer.finish()
    }

    @Sendable private static func byteCount(_ text: String) throws -> UInt64 {
        do { return try ByteSize(parsing: text).bytes } catch {
            throw ValidationError(error.description)
        }
    }

    private func entry(_ id: ThinDeviceID, _ name: String, origin: String?) -> Catalogue.Entry {
        Catalogue.Entry(id: id.rawValue, name: name, size: size, origin: origin, created: 0)
    }

    /// Where the mapping of this number is: somewhere in its part of the volume, the same each
    /// time.
    private func virtualBlock(_ index: UInt64) -> UInt64 {
        if dense { return index }
        let part = size / Self.blockSize / UInt64(mappings)
        var random = Random(state: seed &+ index)
        return index * part + random.next() % part
    }

    private func map(_ id: ThinDeviceID, _ writer: Writer, _ places: inout Places) throws {
        for index in 0..<UInt64(mappings) {
            _ = try writer.metadata.insert(
                id, VirtualBlock(virtualBlock(index)), try places.next())
            try writer.operationEnded()
        }
    }

    private func write(_ catalogue: Catalogue, _ writer: Writer, _ data: FileDevice) throws {
        try writer.metadata.createThin(CatalogueLayout.device)
        let bytes = try catalogue.encoded(blockSize: Self.blockSize)
        let step = Int(Self.blockSize)
        for (index, start) in stride(from: 0, to: bytes.count, by: step).enumerated() {
            guard let block = try writer.metadata.allocateDataBlock() else { throw Full() }
            try bytes[start..<start + step].withUnsafeBytes { piece in
                try data.write(at: block.rawValue * Self.blockSize, from: piece)
            }
            _ = try writer.metadata.insert(
                CatalogueLayout.device, VirtualBlock(UInt64(index)), block)
        }
    }
}

private struct Full: Error, CustomStringConvertible {
    var description: String { "the pool is full: give it a larger data device" }
}

/// Free data blocks in an order that keeps neighbours apart.
private struct Places {
    var random: Random
    private let metadata: ThinMetadata
    private let window: Int
    private var blocks: [DataBlock] = []

    init(_ metadata: ThinMetadata, window: Int, seed: UInt64) {
        self.metadata = metadata
        self.window = window
        random = Random(state: seed)
    }

    /// A reserved block.
    mutating func next() throws -> DataBlock {
        if blocks.isEmpty {
            while blocks.count < window, let block = try metadata.allocateDataBlock() {
                blocks.append(block)
            }
            blocks.shuffle(using: &random)
        }
        guard let block = blocks.popLast() else { throw Full() }
        return block
    }

    mutating func giveBack() throws {
        for block in blocks { metadata.releaseReservation(block) }
        blocks = []
    }
}

/// SplitMix64.
private struct Random: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var word = state
        word = (word ^ word >> 30) &* 0xBF58_476D_1CE4_E5B9
        word = (word ^ word >> 27) &* 0x94D0_49BB_1331_11EB
        return word ^ word >> 31
    }
}
