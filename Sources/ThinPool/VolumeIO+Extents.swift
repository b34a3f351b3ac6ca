// Queries of the map, under the pool's lock: a few leaves at a time, read ahead without it.
//
// 1. A query takes a bounded number of steps, each of them one leaf (of two trees: one of each). What
//    two trees have in common is a step, however large it is.
// 2. Of a turn's steps only the first may read: what else is missing is read ahead of the next turn.
// 3. It tells what the open transaction says. A failed pool tells its last committed state.

import Glibc
import ThinMetadata

extension VolumeIO {
    func beginExtents(_ index: Int32) {
        let request = requests[index]
        let query = request.pointee.query!.takeUnretainedValue()
        query.begin(
            request.pointee.offset..<request.pointee.end, blockSize: blockSize,
            steps: pool.options.bounds.extentSteps)
        request.pointee.cursor = request.pointee.end
        ask(newStep(index, .extents))
    }

    func resolveExtents(_ index: Int32, _ volume: Volume) {
        let query = requests[steps[index].pointee.request].pointee.query!.takeUnretainedValue()
        switch pool.answer(query, of: volume, leaves: &leavesLeft) {
        case .failure(let error): fail(index, error)
        case .success(true): end(index)
        case .success(false): ask(index)
        }
    }
}

extension Pool {
    /// Goes on with the query.
    /// - Parameter leaves: as many steps are taken at most, and are then subtracted.
    /// - Returns: whether it is answered.
    func answer(_ query: ExtentQuery, of volume: Volume, leaves: inout Int) -> Answer<Bool> {
        if metadataIsUnreadable { return .failure(EIO) }
        do throws(MetadataError) {
            var isFirst = true
            while leaves > 0, isFirst || !lock.isAwaited, let kind = query.current {
                if case .difference(let other) = kind, volumesByID[other.id] !== other {
                    // It has been deleted: there is nothing left to compare with.
                    return .failure(EINVAL)
                }
                guard try takeStep(query, kind, of: volume, reading: isFirst) else { break }
                isFirst = false
                leaves -= 1
                query.stepDone(steps: options.bounds.extentSteps)
            }
        } catch { return .failure(EIO) }
        return .success(query.current == nil)
    }

    /// - Returns: false if a node is missing that was not to be read.
    private func takeStep(
        _ query: ExtentQuery, _ kind: ExtentKind, of volume: Volume, reading: Bool
    ) throws(MetadataError) -> Bool {
        let from = VirtualBlock(query.blocks.lowerBound)
        let limit = VirtualBlock(query.blocks.upperBound)
        if case .difference(let other) = kind {
            let common = VirtualBlock(commonBlocks(volume, other))
            if from < common {
                return try metadata.visitDifferences(
                    of: volume.id, from: other.id, from, limit: min(limit, common),
                    reading: reading
                ) { range, differs in
                    query.add(to: range.upperBound, differs ? Extent.changed : 0)
                } > from
            }
            if from.rawValue * blockSize < other.size {
                // The other one ends inside it: no block that has data is the same in both.
                guard reading else { return false }
                let mine = try metadata.lookup(volume.id, from)
                let others = try metadata.lookup(other.id, from)
                let isHole = mine == nil && others == nil
                query.add(to: from.rawValue + 1, isHole ? 0 : Extent.changed)
                return true
            }
        }
        if !reading {
            guard try metadata.hasLeafInMemory(volume.id, from) else { return false }
        }
        let end: VirtualBlock
        let ofHoles: UInt32
        switch kind {
        case .allocation:
            ofHoles = Extent.hole | Extent.zero
            end = try metadata.visitLeaf(volume.id, from: from, limit: limit) { block, _ in
                query.add(to: block.rawValue, ofHoles)
                query.add(to: block.rawValue + 1, 0)
            }
        case .sharing:
            ofHoles = 0
            end = try metadata.visitSharing(
                volume.id, from: from, limit: limit
            ) { block, isShared in
                query.add(to: block.rawValue, ofHoles)
                query.add(to: block.rawValue + 1, isShared ? Extent.shared : 0)
            }
        case .difference:
            // Beyond the other volume's end.
            ofHoles = 0
            end = try metadata.visitLeaf(volume.id, from: from, limit: limit) { block, _ in
                query.add(to: block.rawValue, ofHoles)
                query.add(to: block.rawValue + 1, Extent.changed)
            }
        }
        query.add(to: end.rawValue, ofHoles)
        return true
    }

    /// Blocks that are equally long in both volumes.
    private func commonBlocks(_ volume: Volume, _ other: Volume) -> UInt64 {
        other.size < volume.size
            ? other.size / blockSize : (volume.size + blockSize - 1) / blockSize
    }

    /// Calls `body` for each node that the next steps of the query would have to read.
    func forEachMissingNode(
        of query: ExtentQuery, _ volume: Volume, _ body: (MetadataBlock) -> Void
    ) throws(MetadataError) {
        guard let kind = query.current else { return }
        let slice = options.bounds.turnLeaves
        let range = query.blocks
        if case .difference(let other) = kind, range.lowerBound < commonBlocks(volume, other) {
            try metadata.forEachMissingNode(
                of: volume.id, from: other.id,
                range.clamped(to: 0..<commonBlocks(volume, other)), steps: slice, body)
        } else {
            try metadata.forEachMissingNode(volume.id, range, leaves: slice, body)
        }
    }
}
