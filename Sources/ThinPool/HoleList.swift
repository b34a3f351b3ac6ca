// The parts of a read that have no block: the engine tells them instead of filling them with zeroes,
// as far as there is room.
//
// 1. Bytes of the buffer that are told as holes are not written; all others are.

/// Holes of one read, in the order in which they were found. Reset by whoever asks.
public struct HoleList: BitwiseCopyable {
    /// More are filled with zeroes: data in so many pieces is better sent as it is.
    public static let capacity = 16

    public struct Hole: BitwiseCopyable {
        /// Bytes, on the volume.
        public var offset: UInt64 = 0
        public var length: UInt64 = 0
        var end: UInt64 { offset + length }
    }

    private var holes = InlineArray<16, Hole>(repeating: Hole())
    public private(set) var count = 0

    public init() {}

    public subscript(index: Int) -> Hole { holes[index] }

    /// - Returns: false if there is no room.
    package mutating func append(_ from: UInt64, _ to: UInt64) -> Bool {
        if count > 0, holes[count - 1].end == from {
            holes[count - 1].length += to - from
            return true
        }
        guard count < Self.capacity else { return false }
        holes[count] = Hole(offset: from, length: to - from)
        count += 1
        return true
    }

    /// By offset, neighbours in one.
    public mutating func sort() {
        for index in stride(from: 1, to: count, by: 1) {
            let hole = holes[index]
            var place = index
            while place > 0, holes[place - 1].offset > hole.offset {
                holes[place] = holes[place - 1]
                place -= 1
            }
            holes[place] = hole
        }
        var kept = 0
        for index in stride(from: 1, to: count, by: 1) {
            if holes[kept].end == holes[index].offset {
                holes[kept].length += holes[index].length
            } else {
                kept += 1
                holes[kept] = holes[index]
            }
        }
        count = min(count, kept + 1)
    }
}
