// What a history may do, and what it did.

import ThinPool

/// Drawn from the seed, so that seeds differ in kind, not only in order: each history has some of
/// the operations and faults, and small bounds where the server has large ones.
public struct WorldOptions {
    public var dataBlocks = 64
    public var metadataBlocks = 512
    public var blockSectors: UInt32 = 128
    public var operations = 120
    public var reactors = 2
    public var clients = 3
    public var cacheBlocks = 64
    public var tableBytes = 1024
    public var bounds = PoolBounds()
    /// Volumes that are made, snapshots not counted.
    public var volumes = 6
    /// Most of what clients do is small and in this block of a volume, and in the oldest volume.
    public var hotBlock: Int?
    /// Snapshots of the oldest volume come and go all the time.
    public var churns = false
    /// What is shared stops being shared while I/O to it is under way.
    public var drills = false
    /// The data device is a sparse file in memory: most I/O is done at once, holes are known.
    public var dataInMemory = false
    /// One in so many I/Os of the reactors takes long.
    public var slowOneIn = 12
    /// One in so many changes is durable when it is answered.
    public var fuaOneIn: UInt64 = 8

    // Operations
    public var snapshots = true
    public var discards = true
    public var deletions = true
    /// Thin devices appear that another program has made, and are adopted.
    public var strangers = false
    public var grows = true
    public var checks = true
    public var passDiscardsDown = true
    /// Changes of a sector that another change in flight is about to change, too.
    public var overlaps = true
    /// Requests that have to be refused, and clients that do not keep to the protocol.
    public var wrongRequests = false
    /// Once a client or two send more at once than the server takes.
    public var floods = false
    /// The pool is served read-only for a while.
    public var readOnlyTimes = false
    /// Volumes become read-only, and writable again.
    public var accessChanges = true
    /// Many small volumes take nearly all metadata.
    public var scarceMetadata = false
    /// Now and then the pool at rest is filled to the brim, and emptied again.
    public var fills = false

    // Faults
    public var powerCuts = true
    /// The power goes just after something was promised.
    public var cutsAtPromises = false
    public var kills = true
    public var drops = true
    public var dataFaults = false
    public var metadataFaults = false
    public var flushFaults = false
    public var rot = false
    public var lostWrites = false

    public init() {}

    public init(drawnFrom random: inout SeededRandom) {
        dataBlocks = [12, 24, 48, 96][random.below(4)]
        metadataBlocks = [96, 96, 256, 1024][random.below(4)]
        if random.oneIn(8) {
            // Larger blocks than the pieces in which they are copied.
            blockSectors = 256
            dataBlocks = 16
        }
        operations = 40 + random.below(160)
        reactors = 1 + random.below(3)
        clients = 1 + random.below(5)
        cacheBlocks = [8, 32, 256][random.below(3)]
        tableBytes = [1, 512, 65_536][random.below(3)]
        bounds = .init(drawnFrom: &random)
        snapshots = !random.oneIn(4)
        discards = !random.oneIn(4)
        deletions = !random.oneIn(3)
        grows = random.oneIn(2)
        checks = random.oneIn(2)
        passDiscardsDown = !random.oneIn(4)
        overlaps = random.oneIn(2)
        powerCuts = !random.oneIn(3)
        kills = random.oneIn(3)
        drops = random.oneIn(2)
        dataFaults = random.oneIn(4)
        metadataFaults = random.oneIn(4)
        scarceMetadata = metadataBlocks <= 96 && random.oneIn(3)
        strangers = random.oneIn(4)
        flushFaults = random.oneIn(2)
        rot = random.oneIn(6)
        lostWrites = random.oneIn(12)
        volumes = 1 + random.below(6)
        hotBlock = random.oneIn(2) ? random.below(3) : nil
        churns = snapshots && deletions && random.oneIn(3)
        drills = snapshots && discards && random.oneIn(3)
        if drills, random.oneIn(2) { tableBytes = 1 }
        slowOneIn = [3, 12, 12, 1000][random.below(4)]
        fuaOneIn = [2, 8][random.below(2)]
        wrongRequests = random.oneIn(3)
        floods = random.oneIn(40)
        readOnlyTimes = random.oneIn(4)
        accessChanges = random.oneIn(2)
        fills = dataFaults || random.oneIn(3)
        cutsAtPromises = powerCuts && random.oneIn(3)
        dataInMemory = random.oneIn(3)
    }
}

extension PoolOptions {
    /// To look at a pool, and to leave it as it is.
    static var forReading: PoolOptions {
        var options = PoolOptions()
        options.readOnly = true
        return options
    }
}

extension PoolBounds {
    /// Half of the time the server's own bounds, else such that the code beyond them is reached.
    init(drawnFrom random: inout SeededRandom) {
        self.init()
        guard random.oneIn(2) else { return }
        copyPiece = [4096, 65_536][random.below(2)]
        bounces = 1 + random.below(3)
        window = Int32(1 + random.below(3))
        run = UInt64(65_536 * (1 + random.below(3)))
        turnBytes = 4096 << random.below(6)
        sharedTurnBytes = 512 << random.below(6)
        piece = 512 << random.below(6)
        // Few volumes here have more than some dozens of blocks.
        tablePageShift = [0, 1, 3, 6, 9][random.below(5)]
        unmapsPerLeaf = 1 + random.below(3)
        extentSteps = 1 + random.below(3)
        turnLeaves = 1 + random.below(2)
        steps = 1 + random.below(8)
        cachedPages = 1 + random.below(3)
        smallDeletion = UInt64(random.below(4))
        deletionSlice = 1 + random.below(3)
        deletionBatch = 4 * deletionSlice
        discardsPerStep = 1 + random.below(2)
    }
}

public struct WorldCounts: Sendable {
    public var requests = 0
    /// Queries of the map.
    public var queries = 0
    public var commits = 0
    public var snapshots = 0
    public var deletions = 0
    public var grows = 0
    public var checks = 0
    public var reopens = 0
    public var handOvers = 0
    public var reconnects = 0
    /// Requests that had to be refused.
    public var refused = 0
    public var readOnlyTimes = 0
    public var fills = 0
    public var outOfSpace = 0
    public var powerCuts = 0
    public var kills = 0
    /// I/Os that were made to fail.
    public var faults = 0
    /// Pools that failed, and went on after a check.
    public var failures = 0
    public var rot = 0
    public var lostWrites = 0
    /// Lost writes that left a state which the check takes for right, and which is not: an older
    /// node in the same place with the same counts.
    public var unseenLosses = 0
    /// Nanoseconds of the pool's clock.
    public var simulated: UInt64 = 0

    public init() {}

    public static func + (a: Self, b: Self) -> Self {
        var sum = a
        for field in Self.fields { sum[keyPath: field.path] += b[keyPath: field.path] }
        sum.simulated += b.simulated
        return sum
    }

    private static var fields: [(name: String, path: WritableKeyPath<Self, Int>)] {
        [
            ("requests", \.requests), ("queries", \.queries), ("commits", \.commits),
            ("snapshots", \.snapshots),
            ("deletions", \.deletions), ("growths", \.grows), ("checks", \.checks),
            ("reopenings", \.reopens), ("restarts in place", \.handOvers),
            ("reconnections", \.reconnects),
            ("refusals", \.refused), ("read-only times", \.readOnlyTimes),
            ("pools filled", \.fills),
            ("out of space", \.outOfSpace), ("power cuts", \.powerCuts), ("kills", \.kills),
            ("I/O faults", \.faults), ("failed pools", \.failures), ("rotten blocks", \.rot),
            ("lost writes", \.lostWrites), ("of them unseen", \.unseenLosses),
        ]
    }

    /// Numbers with their names, for people.
    public var words: [(String, Int)] {
        Self.fields.map { ($0.name, self[keyPath: $0.path]) }
    }
}

/// What went wrong, in words; the seed is the caller's to add.
public struct WorldFailure: Error, CustomStringConvertible {
    public let description: String
    public init(description: String) { self.description = description }
}
