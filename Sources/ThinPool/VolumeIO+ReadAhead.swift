// What a turn's steps need of the metadata and is not in memory, read before they are resolved: all
// of it at once, and while others have the pool's lock.
//
// 1. A step that is resolved does not rely on it: what is still missing is read under the lock.

import ThinMetadata

extension VolumeIO {
    /// Inner nodes may be missing, too; they are few and stay in memory.
    private static let rounds = 3

    /// The lock is held, and is given up while nodes are read.
    func readAhead() {
        let reader = nodes ?? NodeReader(pool.metadataDevice, allowRing: pool.options.allowRing)
        nodes = reader
        for _ in 0..<Self.rounds {
            reader.wanted.removeAll(keepingCapacity: true)
            do throws(MetadataError) { try collectMissing(reader) } catch { return }
            if reader.wanted.isEmpty { return }
            let metadata = pool.metadata
            let reuses = metadata.blockReuses
            pool.lock.unlock()
            reader.read()
            pool.lock.lock()
            // A pool that failed meanwhile has read its metadata anew.
            guard pool.metadata === metadata else { return }
            reader.forEach { metadata.offer($0, $1, readAt: reuses) }
        }
    }

    private func collectMissing(_ reader: NodeReader) throws(MetadataError) {
        for place in 0..<asking.count {
            if reader.isFull { return }
            let step = steps[asking[place]]
            guard step.pointee.intent != .unmap,
                let volume = requests[step.pointee.request].pointee.volume?.takeUnretainedValue(),
                case .unknown = volume.table.lookup(step.pointee.virtualBlock)
            else { continue }
            try pool.metadata.forEachMissingNode(
                volume.id, volume.table.pageRange(of: step.pointee.virtualBlock)
            ) { block in
                if !reader.isFull, !reader.wanted.contains(block) { reader.wanted.append(block) }
            }
        }
    }
}
