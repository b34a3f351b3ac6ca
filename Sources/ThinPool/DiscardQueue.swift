// Data blocks that wait to be passed down as discarded. Many come with one commit, some at a time
// go; no step takes longer the more there are.

import ThinMetadata

struct DiscardQueue {
    /// So many blocks are put in order together, so that neighbours become one discard.
    private static let portion = 1024

    private var blocks: [DataBlock] = []
    /// Those before `next` are gone, those up to `sorted` are in order.
    private var next = 0
    private var sorted = 0

    var isEmpty: Bool { next == blocks.count }

    mutating func append(_ more: [DataBlock]) { blocks += more }

    /// The next blocks, in at most so many runs of neighbours, ascending.
    mutating func take(runs limit: Int) -> [ArraySlice<DataBlock>] {
        if next == sorted {
            sorted = min(next + Self.portion, blocks.count)
            blocks[next..<sorted].sort()
        }
        var runs: [ArraySlice<DataBlock>] = []
        var start = next
        while start < sorted, runs.count < limit {
            var end = start + 1
            while end < sorted, blocks[end].rawValue == blocks[end - 1].rawValue + 1 { end += 1 }
            runs.append(blocks[start..<end])
            start = end
        }
        drop(to: start)
        return runs
    }

    mutating func takeAll() -> [DataBlock] {
        defer { self = DiscardQueue() }
        return Array(blocks[next...])
    }

    private mutating func drop(to end: Int) {
        next = end
        guard next > blocks.count / 2 else { return }
        blocks.removeFirst(next)
        sorted -= next
        next = 0
    }
}
