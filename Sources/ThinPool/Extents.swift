// What can be asked of a volume's map (NBD's block status), and how far the answer has got.
//
// 1. The extents of a kind follow each other without a gap from the request's offset on, end with the
//    request at the latest, and no two neighbours have one status.
// 2. They may end earlier, but never before the first.

import ThinMetadata

public enum ExtentKind: Sendable {
    /// What has a block, and what is a hole that reads as zeroes.
    case allocation
    /// What a write would have to copy, because another volume has it, too.
    case sharing
    /// What is not in the same block of that volume, or in one of the two volumes only. It has to
    /// be open as long as it is asked about.
    case difference(from: Volume)
}

public struct Extent: Equatable, Sendable {
    /// Bytes.
    public var length: UInt64
    /// Bits, by the kind.
    public var status: UInt32

    public init(length: UInt64, status: UInt32) {
        self.length = length
        self.status = status
    }

    /// Allocation: no block, and zeroes are read. Always both.
    public static let hole: UInt32 = 1
    public static let zero: UInt32 = 2
    /// Sharing.
    public static let shared: UInt32 = 1
    /// Difference.
    public static let changed: UInt32 = 1
}

/// A query that goes with a request, and its answer when that is finished. It can be used again.
public final class ExtentQuery {
    public let kinds: [ExtentKind]
    /// The most extents of each kind.
    public let limit: Int
    /// One list for each kind.
    public private(set) var extents: [[Extent]]

    /// The request's bytes.
    private var range: Range<UInt64> = 0..<0
    private var blockSize: UInt64 = 1
    /// The kind that is being answered; the number of kinds when all are.
    private var kind = 0
    /// Bytes of that kind that are answered.
    private var answered: UInt64 = 0
    private var isFull = false
    /// Steps that this kind may still take.
    private var stepsLeft = 0

    public init(kinds: [ExtentKind], limit: Int) {
        precondition(limit > 0)
        self.kinds = kinds
        self.limit = limit
        extents = Array(repeating: [], count: kinds.count)
    }

    // MARK: - For the pool

    package func begin(_ range: Range<UInt64>, blockSize: UInt64, steps: Int) {
        self.range = range
        self.blockSize = blockSize
        kind = 0
        for index in extents.indices { extents[index].removeAll(keepingCapacity: true) }
        beginKind(steps: steps)
    }

    private func beginKind(steps: Int) {
        answered = range.lowerBound
        isFull = false
        stepsLeft = steps
    }

    package var current: ExtentKind? { kind < kinds.count && !range.isEmpty ? kinds[kind] : nil }

    /// The blocks that the present kind is still to be told of.
    package var blocks: Range<UInt64> {
        answered / blockSize..<(range.upperBound + blockSize - 1) / blockSize
    }

    /// The blocks up to `block`, from those on that were told last, have this status.
    package func add(to block: UInt64, _ status: UInt32) {
        let end = min(block * blockSize, range.upperBound)
        guard !isFull, end > answered else { return }
        let last = extents[kind].count - 1
        if last >= 0, extents[kind][last].status == status {
            extents[kind][last].length += end - answered
        } else if last + 1 < limit {
            extents[kind].append(Extent(length: end - answered, status: status))
        } else {
            isFull = true
            return
        }
        answered = end
    }

    /// A step of the present kind has been taken; each may take so many.
    package func stepDone(steps: Int) {
        stepsLeft -= 1
        if isFull || answered == range.upperBound || stepsLeft == 0 {
            kind += 1
            beginKind(steps: steps)
        }
    }
}
