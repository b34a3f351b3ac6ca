// What a turn's steps need of the metadata and is not in memory, read before they are resolved: all
// of it at once, and while others have the pool's lock. The pool's thread does the same for a
// deletion.
//
// 1. Nobody relies on it: what is still missing is read under the lock.

import ThinMetadata

extension VolumeIO {
    /// The lock is held, and is given up while nodes are read.
    func readAhead() {
        let reader = nodes ?? pool.makeNodeReader()
        nodes = reader
        pool.readAhead(reader) { () throws(MetadataError) in
            let walkers = max(0, min(walking.count, leavesLeft))
            let askers = min(asking.count, Self.askPortion)
            for place in 0..<askers + walkers where !reader.isFull {
                let isWalker = place >= askers
                let step = steps[isWalker ? walking[place - askers] : asking[place]]
                let request = requests[step.pointee.request]
                guard step.pointee.intent != .unmap,
                    let volume = request.pointee.volume?.takeUnretainedValue()
                else { continue }
                if let query = request.pointee.query {
                    try pool.forEachMissingNode(
                        of: query.takeUnretainedValue(), volume, reader.want)
                    continue
                }
                guard case .unknown = volume.table.lookup(step.pointee.virtualBlock)
                else { continue }
                var range = volume.table.pageRange(of: step.pointee.virtualBlock)
                if step.pointee.intent == .cache {
                    range = range.lowerBound..<max(range.upperBound, step.pointee.blockLimit)
                }
                try pool.metadata.forEachMissingNode(
                    volume.id, range,
                    leaves: isWalker ? NodeReader.most / walkers : NodeReader.most, reader.want)
            }
        }
    }
}

extension Pool {
    /// Inner nodes may be missing, too; they are few and stay in memory.
    private static let readAheadRounds = 3

    func makeNodeReader() -> NodeReader {
        NodeReader(metadataDevice, allowRing: options.allowRing)
    }

    /// Reads what `collect` wants of the reader. The lock is held, and is given up meanwhile.
    func readAhead(_ reader: NodeReader, _ collect: () throws(MetadataError) -> Void) {
        for _ in 0..<Self.readAheadRounds {
            reader.wanted.removeAll(keepingCapacity: true)
            do throws(MetadataError) { try collect() } catch { return }
            if reader.wanted.isEmpty { return }
            let metadata = self.metadata
            let reuses = metadata.blockReuses
            lock.unlock()
            reader.read()
            lock.lock()
            // A pool that failed meanwhile has read its metadata anew.
            guard self.metadata === metadata else { return }
            reader.forEach { metadata.offer($0, $1, readAt: reuses) }
        }
    }

    /// The leaves that the next slices of a deletion give back.
    func readAheadOfDeletion(_ reader: NodeReader) {
        guard failure == nil, let id = nextDeletion else { return }
        readAhead(reader) { () throws(MetadataError) in
            try metadata.forEachMissingNode(
                ThinDeviceID(id), 0..<UInt64.max, leaves: NodeReader.most, reader.want)
        }
    }
}
