// A short history again and again: each of its I/Os fails once, fails and all after it, or finds
// the power gone.

public struct EveryIO {
    public private(set) var runs = 0
    /// Every so many I/Os one is chosen; 1: all.
    public let stride: Int

    public init(stride: Int = 1) { self.stride = max(stride, 1) }

    public enum Trouble: String, CaseIterable, Sendable {
        case failsOnce, failsForEver, cut
    }

    /// All I/Os of the history of this seed.
    public mutating func run(seed: UInt64) throws {
        let meter = IOMeter()
        _ = try history(seed).run(meter: meter)
        // Not always the first of the stride, so that many seeds see all kinds.
        for number in Swift.stride(from: Int(seed) % stride, to: meter.count, by: stride) {
            for trouble in Trouble.allCases {
                try run(seed: seed, number: number, trouble: trouble)
            }
        }
    }

    public mutating func run(
        seed: UInt64, number: Int, trouble: Trouble, log: ((String) -> Void)? = nil
    ) throws {
        runs += 1
        let meter = IOMeter()
        switch trouble {
        case .failsOnce: meter.failing = number
        case .failsForEver:
            meter.failing = number
            meter.failsForEver = true
        case .cut: meter.cutting = number
        }
        do { _ = try history(seed).run(meter: meter, log: log) } catch {
            throw WorldFailure(
                description: "with I/O \(number) \(trouble.rawValue): \(error)")
        }
    }

    /// Short, and with no other trouble than the one I/O's.
    private func history(_ seed: UInt64) -> History {
        var history = History(seed: seed)
        history.options.operations = 24
        history.options.powerCuts = false
        history.options.kills = false
        history.options.dataFaults = false
        history.options.metadataFaults = false
        history.options.flushFaults = false
        history.options.cutsAtPromises = false
        history.options.rot = false
        history.options.lostWrites = false
        return history
    }
}
