// Whatever bytes there are, the check comes back, and soon.

import Testing
import ThinMetadata

/// SplitMix64: the same numbers every time.
struct SeededGenerator: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}

@Suite struct FuzzTests {
    /// How a used block of the image is sealed.
    private static func kinds(_ image: PoolImage) -> [(block: UInt64, kind: BlockKind)] {
        (0..<image.firstFree).compactMap { block in
            let kind = image.with(block) { bytes in
                BlockKind.allCases.first {
                    UnsafeRawPointer(bytes).checksum(as: $0) == bytes.le32(0)
                }
            }
            return kind.map { (block, $0) }
        }
    }

    /// Sound pools that differ in what they have.
    private static func pool(_ seed: Int) -> PoolImage {
        SamplePool(held: [.none, .whole, .diverged][seed % 3]).image
    }

    @Test(arguments: 1...40)
    func unsealedChangesAreAlwaysFound(seed: Int) {
        var random = SeededGenerator(state: UInt64(seed))
        let image = Self.pool(seed)
        let block = UInt64.random(in: 0..<image.firstFree, using: &random)
        let byte = Int.random(in: 0..<4096, using: &random)
        image.bytes[Int(block) * 4096 + byte] ^= UInt8.random(in: 1...255, using: &random)
        let report = image.check()
        #expect(report.findings.contains { $0.severity == .damage })
    }

    @Test(arguments: 1...150)
    func sealedChangesNeverStopTheCheck(seed: Int) {
        var random = SeededGenerator(state: UInt64(seed))
        let image = Self.pool(seed)
        let blocks = Self.kinds(image)
        for _ in 0..<Int.random(in: 1...8, using: &random) {
            // Among the 270 blocks, those that the others hang on are taken more often.
            let rare = blocks.filter { $0.kind != .node } + blocks.suffix(8)
            let (block, kind) = (Bool.random(using: &random) ? rare : blocks)
                .randomElement(using: &random)!
            image.edit(block, as: kind) { bytes in
                for _ in 0..<Int.random(in: 1...4, using: &random) {
                    Self.spoil(bytes, kind, &random)
                }
            }
        }
        let report = image.check()
        #expect(report.findings.allSatisfy { !$0.description.isEmpty })
        #expect(image.reads < 4000)
    }

    /// Puts something interesting somewhere, more often where fields are.
    private static func spoil(
        _ bytes: UnsafeMutableRawPointer, _ kind: BlockKind, _ random: inout SeededGenerator
    ) {
        let values: [UInt64] = [
            0, 1, 2, 3, 255, 16_320, 16_321, 1 << 24, 1 << 32 - 1, 1 << 40, 1 << 63, .max,
            .random(in: 0..<1024, using: &random), .random(in: 0...(.max), using: &random),
        ]
        let value = values.randomElement(using: &random)!
        let fields = kind == .superblock ? 0..<368 : 16..<48
        let place =
            Bool.random(using: &random)
            ? Int.random(in: fields, using: &random) & ~3
            : Int.random(in: 16..<4088, using: &random)
        if Bool.random(using: &random) {
            bytes.setLE32(place, UInt32(truncatingIfNeeded: value))
        } else {
            bytes.setLE64(place, value)
        }
    }

    /// A tree whose every level points to one and the same node of the next has far more paths
    /// than nodes.
    @Test func manyPathsAreNotWalkedOneByOne() {
        let image = PoolImage(blocks: 400)
        var node = image.mappingLeaf([(0, 1, 0)])
        for _ in 0..<60 {
            node = image.internalNode((0..<252).map { (UInt64($0), node) })
        }
        let devices = [PoolImage.Device(id: 1, root: node, mapped: 1)]
        image.finish(
            top: image.topLevel(devices), details: image.details(devices), time: 0,
            dataBlocks: 10)
        let report = image.check()
        #expect(report.findings.contains { $0.kind == .keyRange })
        #expect(report.findings.contains { $0.kind == .mappedBlocks })
    }

    /// A tree as deep as the device is large.
    @Test func depthIsNoDanger() {
        let image = PoolImage(blocks: 20_000)
        var node = image.mappingLeaf([(0, 1, 0)])
        for _ in 0..<19_900 { node = image.internalNode([(0, node)]) }
        let devices = [PoolImage.Device(id: 1, root: node, mapped: 1)]
        image.finish(
            top: image.topLevel(devices), details: image.details(devices), time: 0,
            dataBlocks: 10)
        let report = image.check()
        #expect(report.findingCount == 19_901, "a root with one child, underfull nodes below")
        #expect(report.countBySeverity[.damage] == nil)
    }

    @Test(arguments: [0, 1, 4095, 4096, 4097, 8192])
    func tinyDevices(size: Int) {
        let image = PoolImage(bytes: Array(repeating: 0, count: size))
        #expect(image.check().findings.map(\.kind) == [.notAPool])
        let sound = SamplePool().image
        let cut = PoolImage(bytes: Array(sound.bytes[..<size]))
        #expect(!cut.check().isClean)
    }

    @Test func anyBlockMayBeUnreadable() {
        let pool = SamplePool(held: .diverged)
        for block in stride(from: 0, to: pool.image.firstFree, by: 3) {
            pool.image.unreadable = [block]
            let report = pool.image.check()
            #expect(report.findings.filter { $0.kind == .unreadable }.count == 1)
        }
        pool.image.unreadable = Set(0..<pool.image.blockCount)
        #expect(pool.image.check().findings.map(\.kind) == [.unreadable])
    }
}
