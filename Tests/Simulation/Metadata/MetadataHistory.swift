// A history of the metadata alone: large trees, many devices, nearly full devices; what the pool's
// histories, with their data and their clients, are too slow for.

import ThinMetadata

public struct MetadataHistory {
    public let seed: UInt64

    public init(seed: UInt64) { self.seed = seed }

    /// Runs it and looks at what is left.
    ///
    /// - Parameter inspect: gets the metadata device's bytes at the end, for outside checkers, if
    ///   they are not too many.
    public func run(
        log: ((String) -> Void)? = nil, inspect: ([UInt8]) throws -> Void = { _ in }
    ) throws -> MetadataCounts {
        var random = SeededRandom(seed: seed)
        let options = MetadataOptions(drawnFrom: &random)
        let world = try MetadataWorld(
            options: options, random: SeededRandom(seed: seed &* 31 &+ 7))
        world.log = log
        log?("\(options)")
        try world.run()
        if world.device.blocks <= 6000 {
            try inspect((0..<UInt64(world.device.blocks)).flatMap { world.device.peek($0) })
        }
        return world.counts
    }
}
