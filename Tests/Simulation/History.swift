// A history from its seed: what it may do is drawn first, then what it does.

import ThinMetadata

public struct History {
    public let seed: UInt64
    public var options: WorldOptions

    public init(seed: UInt64) {
        self.seed = seed
        var random = SeededRandom(seed: seed)
        options = WorldOptions(drawnFrom: &random)
    }

    /// Runs it and looks at what is left.
    ///
    /// - Parameter inspect: gets the metadata device's bytes after the first crash and at the end,
    ///   for outside checkers.
    public func run(
        meter: IOMeter = IOMeter(), log: ((String) -> Void)? = nil,
        inspect: @escaping ([UInt8]) throws -> Void = { _ in }
    ) throws -> WorldCounts {
        let world = try World(
            options: options, random: SeededRandom(seed: seed &* 31 &+ 7), meter: meter)
        world.log = log
        world.inspect = inspect
        do { try world.run() } catch {
            // It ended in the middle of things, which its parts would rather not.
            _ = Unmanaged.passRetained(world)
            throw error
        }
        if !world.isDamaged { try inspect(world.metadataDisk.bytes) }
        return world.counts
    }
}
