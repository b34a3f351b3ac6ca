// What a history of the metadata may do, and what it did.

/// Drawn from the seed, so that seeds differ in kind, not only in order.
struct MetadataOptions {
    /// How a history's devices look.
    enum Shape: CaseIterable {
        /// A few devices with thousands of mappings.
        case wide
        /// Hundreds of devices with a few mappings.
        case manyDevices
        /// One with tens of thousands of mappings: trees of three levels.
        case deep
        /// A metadata device that is full most of the time.
        case full
    }

    enum Operation: Int, CaseIterable {
        case create, snapshot, write, remove, delete, deleteSlice, look, walk, exclusive, reserve
        case pin, growData, growMetadata, misuse
    }

    var shape: Shape
    var metadataBlocks: Int
    var dataBlocks: UInt64
    var cacheBlocks: Int
    var steps: Int
    /// How many mappings a step writes at most.
    var bulk: Int
    /// Keys are mostly below this.
    var span: Int
    /// How many devices a step makes or removes at most.
    var deviceBulk: Int
    /// How often each operation is chosen, in proportion.
    var weights: [Int]
    /// One commit is begun in about so many steps.
    var commitEvery: UInt64
    var powerCuts: Bool
    var kills: Bool
    var faults: Bool
    /// So many snapshots before the pool's time is used up.
    var timeLeft: UInt32?
    /// The kernel takes a metadata snapshot at some restart.
    var metadataSnapshot: Bool
    /// Spoilt copies of the final state that are looked at.
    var damagedStates: Int

    init(drawnFrom random: inout SeededRandom) {
        switch random.below(16) {
        case 0..<7: shape = .wide
        case 7..<11: shape = .manyDevices
        case 11: shape = .deep
        default: shape = .full
        }
        metadataBlocks = [700, 2000, 6000, 30_000, 90_000][random.below(5)]
        dataBlocks = UInt64([900, 3000, 17_000, 40_000, 300_000][random.below(5)])
        cacheBlocks = [1, 8, 64, 1000][random.below(4)]
        steps = 30 + random.below(90)
        bulk = [40, 300, 1200][random.below(3)]
        span = [600, 3000, 20_000][random.below(3)]
        deviceBulk = 3
        weights = Operation.allCases.map { _ in [0, 1, 1, 3][random.below(4)] }
        weights[Operation.create.rawValue] += 1
        weights[Operation.write.rawValue] += 3
        weights[Operation.remove.rawValue] += 1
        switch shape {
        case .wide: break
        case .manyDevices:
            deviceBulk = [80, 250][random.below(2)]
            metadataBlocks = max(metadataBlocks, 6000)
            bulk = 40
            weights[Operation.snapshot.rawValue] += 2
        case .deep:
            metadataBlocks = max(metadataBlocks, 6000)
            dataBlocks = max(dataBlocks, 300_000)
            steps /= 3
        case .full:
            metadataBlocks = 100 + random.below(260)
            dataBlocks = min(dataBlocks, 40_000)
            bulk = max(bulk, 300)
            if !random.oneIn(3) { weights[Operation.growMetadata.rawValue] = 0 }
        }
        if random.oneIn(12) {
            // The index of the data bitmaps has several leaves.
            dataBlocks = UInt64(16_320 * (160 + random.below(60)))
            metadataBlocks = max(metadataBlocks, 2000)
        }
        commitEvery = [4, 10, 30][random.below(3)]
        powerCuts = !random.oneIn(4)
        kills = random.oneIn(3)
        faults = random.oneIn(3)
        timeLeft = random.oneIn(8) ? UInt32(random.below(12)) : nil
        metadataSnapshot = random.oneIn(4)
        damagedStates = random.oneIn(3) ? 20 : 0
    }
}

public struct MetadataCounts: Sendable {
    public var commits = 0
    public var insertions = 0
    public var removals = 0
    public var devices = 0
    public var snapshots = 0
    public var deletions = 0
    public var growths = 0
    public var reopenings = 0
    public var powerCuts = 0
    public var faults = 0
    public var outOfSpace = 0
    public var damagedStates = 0

    public init() {}

    public static func + (a: Self, b: Self) -> Self {
        var sum = a
        for field in fields { sum[keyPath: field.path] += b[keyPath: field.path] }
        return sum
    }

    private static var fields: [(name: String, path: WritableKeyPath<Self, Int>)] {
        [
            ("commits", \.commits), ("insertions", \.insertions), ("removals", \.removals),
            ("devices", \.devices), ("snapshots", \.snapshots), ("deletions", \.deletions),
            ("growths", \.growths), ("reopenings", \.reopenings), ("power cuts", \.powerCuts),
            ("I/O faults", \.faults), ("out of space", \.outOfSpace),
            ("damaged states", \.damagedStates),
        ]
    }

    /// Numbers with their names, for people.
    public var words: [(String, Int)] {
        Self.fields.map { ($0.name, self[keyPath: $0.path]) }
    }
}
