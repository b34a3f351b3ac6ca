// Latencies, counted in buckets that are a sixty-fourth of their value wide.

struct Histogram {
    private static let subBits = 6
    private static let subBuckets = 1 << subBits
    private var buckets = [UInt64](repeating: 0, count: (64 - subBits + 1) * subBuckets)
    private(set) var maximum: UInt64 = 0

    @inline(__always)
    mutating func record(nanoseconds value: UInt64) {
        buckets[Self.bucket(of: value)] += 1
        if value > maximum { maximum = value }
    }

    mutating func merge(_ other: Histogram) {
        for index in buckets.indices { buckets[index] += other.buckets[index] }
        maximum = max(maximum, other.maximum)
    }

    var count: UInt64 { buckets.reduce(0, +) }

    /// Nanoseconds that the given share of the values did not exceed.
    func percentile(_ share: Double) -> UInt64 {
        let wanted = share * Double(self.count)
        var count: UInt64 = 0
        for (index, bucket) in buckets.enumerated() where bucket > 0 {
            count += bucket
            if Double(count) >= wanted { return min(Self.upperEdge(of: index), maximum) }
        }
        return maximum
    }

    @inline(__always)
    private static func bucket(of value: UInt64) -> Int {
        let shift = max(0, 63 - subBits - value.leadingZeroBitCount)
        return shift << subBits + Int(value >> UInt64(shift))
    }

    private static func upperEdge(of index: Int) -> UInt64 {
        guard index >= 2 * subBuckets else { return UInt64(index) }
        let shift = UInt64(index >> subBits - 1)
        let mantissa = UInt64(index) - shift << subBits
        return ((mantissa + 1) << shift) - 1
    }
}
