// A row of the table: nanoseconds an operation takes, the median of some repetitions and their
// range.

import Glibc

struct Timing {
    static let repetitions = 9

    let name: String
    private var samples: [Double] = []

    /// Times `body`, which does so many operations; `prepare` comes before each repetition,
    /// untimed.
    init<Failure: Error>(
        _ name: String, operations: Int, prepare: () throws(Failure) -> Void,
        body: () throws(Failure) -> Void
    ) throws(Failure) {
        self.name = name
        for _ in 0..<Self.repetitions {
            try prepare()
            let began = Self.now()
            try body()
            samples.append(Double(Self.now() - began) / Double(operations))
        }
        samples.sort()
    }

    init(_ name: String, operations: Int, body: () -> Void) {
        self.init(name, operations: operations, prepare: {}, body: body)
    }

    var median: Double { samples[samples.count / 2] }

    static let head = "| operation | ns, median | least | most |\n|---|---|---|---|"
    var row: String {
        let numbers = [median, samples.first!, samples.last!].map(Self.words)
        return "| \(name) | \(numbers.joined(separator: " | ")) |"
    }

    /// Three digits or so.
    private static func words(_ value: Double) -> String {
        if value >= 100 { return "\(Int(value.rounded()))" }
        let tenths = Int((value * 10).rounded())
        return "\(tenths / 10).\(tenths % 10)"
    }

    private static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

/// Keeps a result, so that the work for it is done: the optimizer does not know what this does.
@_optimize(none) @inline(never) func keep<Value>(_ value: Value) {}

/// SplitMix64.
struct Random {
    var state: UInt64

    mutating func below(_ bound: UInt64) -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var word = state
        word = (word ^ word >> 30) &* 0xBF58_476D_1CE4_E5B9
        word = (word ^ word >> 27) &* 0x94D0_49BB_1331_11EB
        return (word ^ word >> 31) % bound
    }
}
