// A history from its seed: what it may do is drawn first, then what it does.

import ThinMetadata

public struct History {
    public let seed: UInt64
    public let options: WorldOptions

    public init(seed: UInt64) {
        self.seed = seed
        var random = SeededRandom(seed: seed)
        options = WorldOptions(drawnFrom: &random)
    }

    /// Runs it and looks at what is left.
    ///
    /// - Parameter inspect: gets the metadata device's bytes at the end, for outside checkers.
    public func run(
        meter: IOMeter = IOMeter(), inspect: ([UInt8]) throws -> Void = { _ in }
    ) throws -> WorldCounts {
        let world = try World(
            options: options, random: SeededRandom(seed: seed &* 31 &+ 7), meter: meter)
        try world.run()
        if !world.isDamaged { try inspect(world.metadataDisk.bytes) }
        return world.counts
    }
}
