// The engine under the pool's lock: what a step becomes once the map is asked.
//
// 1. One step at a time provisions, copies or zeroes a block through the map (the cell); others
//    that change the same block wait for it.
// 2. A block is allocated before its data is written, its mapping inserted after.
// 3. While a volume is held (a snapshot is being taken) no step begins to change it.

import Glibc
import ThinMetadata

extension VolumeIO {
    func resolve(_ index: Int32) {
        let step = steps[index]
        if isAbandoned(step.pointee.request) { return fail(index, EIO) }
        let volume = requests[step.pointee.request].pointee.volume!.takeUnretainedValue()
        if step.pointee.intent == .read { return resolveRead(index, volume) }
        if step.pointee.intent == .extents { return resolveExtents(index, volume) }
        if step.pointee.intent == .cache { return resolveCache(index, volume) }
        if pool.failure != nil { return fail(index, EIO) }
        if volume.isReadOnly || pool.isReadOnly { return fail(index, EPERM) }
        if volume.isHeld { return pool.park(reference(index), in: &volume.heldSteps) }
        if step.pointee.intent == .unmap { return resolveUnmap(index, volume) }
        let key = CellKey(volume.id, step.pointee.virtualBlock)
        if pool.cells[key] != nil { return pool.park(reference(index), inCell: key) }

        switch pool.mapping(of: volume, step.pointee.virtualBlock) {
        case .failure(let error):
            fail(index, error)
        case .success(.none) where step.pointee.intent == .zero && !isNoHole(index):
            // It reads as zeroes already.
            end(index)
        case .success(.none):
            startFill(index, volume, key, old: nil)
        case .success(.some(let mapping)):
            if mapping.time >= volume.snapshottedTime {
                startInPlace(index, mapping)
            } else if pool.isExclusive(volume, step.pointee.virtualBlock, mapping) {
                startInPlace(index, mapping)
            } else if !pool.mayCopy(step.pointee.virtualBlock, of: volume) {
                pool.park(reference(index), in: &pool.drainWaiters)
            } else {
                startFill(index, volume, key, old: mapping)
            }
        }
    }

    private func reference(_ index: Int32) -> StepReference {
        StepReference(engine: self.index, step: index)
    }

    private func isNoHole(_ index: Int32) -> Bool {
        requests[steps[index].pointee.request].pointee.noHole
    }

    private func resolveRead(_ index: Int32, _ volume: Volume) {
        let step = steps[index]
        switch pool.mapping(of: volume, step.pointee.virtualBlock) {
        case .failure(let error):
            fail(index, error)
        case .success(.none):
            let offset = step.pointee.virtualBlock * blockSize + UInt64(step.pointee.start)
            let hole = offset..<offset + UInt64(step.pointee.length)
            if isTold(requests[step.pointee.request], hole: hole) { return end(index) }
            queue(index, .hole, at: 0, step.pointee.memory, step.pointee.length)
        case .success(.some(let mapping)):
            startInPlace(index, mapping)
        }
    }

    /// A page at a time. Only a hint: an error is for whoever needs the page.
    private func resolveCache(_ index: Int32, _ volume: Volume) {
        let step = steps[index]
        leavesLeft -= 1
        let next = volume.table.pageRange(of: step.pointee.virtualBlock).upperBound
        guard case .success = pool.mapping(of: volume, step.pointee.virtualBlock),
            next < step.pointee.blockLimit
        else { return end(index) }
        step.pointee.virtualBlock = next
        ask(index)
    }

    private func startInPlace(_ index: Int32, _ mapping: Mapping) {
        let step = steps[index]
        pin(step)
        queue(
            index, step.pointee.intent == .zero ? .zeroes : .transfer,
            at: mapping.block.rawValue * blockSize + UInt64(step.pointee.start),
            step.pointee.memory, step.pointee.length)
    }

    // MARK: - Unmapping

    /// Commits that an unmap waits for where there is no metadata space. The next one has enough
    /// for some of those who wait, and theirs then comes back with the one after it.
    private static let unmapPatience: UInt8 = 100

    /// In one go: each mapping may have to have a bitmap read. A whole node is among it, so that a
    /// shared one is dropped, not copied to be emptied.
    private static let mostLeavesUnmapped = 8
    /// Busy blocks that are gone through in the time for a leaf.
    private static let cellsOfLeaf = 1024

    private func resolveUnmap(_ index: Int32, _ volume: Volume) {
        let step = steps[index]
        var range = step.pointee.virtualBlock..<step.pointee.blockLimit
        // Blocks being filled or copied were asked for first: unmap up to them, then wait.
        let busy = pool.firstCell(of: volume.id, in: range)
        leavesLeft -= pool.cells.count / Self.cellsOfLeaf
        if let busy {
            if busy == range.lowerBound {
                leavesLeft -= 1
                return pool.park(reference(index), inCell: CellKey(volume.id, busy))
            }
            range = range.lowerBound..<busy
        }
        let bounds = pool.options.bounds
        if pool.metadata.discardedBlocks >= bounds.deletionBatch, pool.failure == nil {
            leavesLeft -= 1
            pool.requestCommit()
            return pool.park(reference(index), in: &pool.metadataWaiters)
        }
        let perLeaf = bounds.unmapsPerLeaf
        let leaves = pool.lock.isAwaited ? 1 : Self.mostLeavesUnmapped
        switch pool.unmap(volume, range, limit: perLeaf * leaves) {
        case .failure(ENOSPC)
        where step.pointee.commitsAwaited < Self.unmapPatience && pool.commitGivesBack:
            leavesLeft -= 1
            step.pointee.commitsAwaited += 1
            pool.park(reference(index), in: &pool.metadataWaiters)
        case .failure(let error):
            if error == ENOSPC { pool.metadataWasRefused() }
            fail(index, error)
        case .success((let next, let removed)):
            leavesLeft -= max(removed / perLeaf, 1)
            if let next = next ?? busy {
                step.pointee.commitsAwaited = 0
                step.pointee.virtualBlock = next
                ask(index)
            } else {
                end(index)
            }
        }
    }

    // MARK: - Filling a block

    private func startFill(_ index: Int32, _ volume: Volume, _ key: CellKey, old: Mapping?) {
        let step = steps[index]
        switch pool.allocate() {
        case .failure(let error):
            return fail(index, error)
        case .success(.none):
            return pool.park(reference(index), in: &pool.spaceWaiters)
        case .success(.some(let block)):
            step.pointee.newBlock = block.rawValue
        }
        pool.cells[key] = ParkedSteps()
        step.pointee.hasCell = true
        let covers = step.pointee.length == Int(blockSize)
        step.pointee.copies = old != nil && !covers
        step.pointee.oldBlock = old?.block.rawValue ?? 0
        step.pointee.mayBeHole = old == nil && !covers && step.pointee.intent == .write
        pin(step)
        firstFillPhase(step)
        start(index)
    }

    private func firstFillPhase(_ step: UnsafeMutablePointer<Step>) {
        step.pointee.copied = 0
        if step.pointee.copies {
            step.pointee.phase = .copyRead
        } else if step.pointee.intent == .zero
            || (Int(blockSize) > pool.copyPiece && step.pointee.length < Int(blockSize))
        {
            step.pointee.phase = .clear
        } else {
            step.pointee.phase = .fill
        }
    }

    /// A block is copied and written as a whole.
    private var isSmall: Bool { Int(blockSize) <= pool.copyPiece }

    /// Sets up the I/O of the step's phase and queues it.
    private func start(_ index: Int32) {
        let step = steps[index]
        let target = step.pointee.newBlock * blockSize
        switch step.pointee.phase {
        case .clear:
            // After a copy only the user's range is cleared, else the whole block.
            let whole = !step.pointee.copies
            step.pointee.position = target + (whole ? 0 : UInt64(step.pointee.start))
            step.pointee.remaining = whole ? Int(blockSize) : step.pointee.length
        case .copyRead:
            let old = step.pointee.oldBlock * blockSize
            if isSmall, let contents = io.contents(at: old, length: Int(blockSize)) {
                // Nobody writes to the old block: the step is pinned until it ends.
                step.pointee.contents = contents
                step.pointee.phase = .fill
                return start(index)
            }
            if step.pointee.bounce == nil {
                guard let bounce = takeBounce(for: index) else { return }
                step.pointee.bounce = bounce
                step.pointee.contents = bounce
            }
            let piece = min(pool.copyPiece, Int(blockSize) - step.pointee.copied)
            step.pointee.position = old + UInt64(step.pointee.copied)
            step.pointee.remaining = piece
            step.pointee.vectors.0 = iovec(iov_base: step.pointee.bounce, iov_len: piece)
            step.pointee.vectorCount = 1
        case .copyWrite:
            let piece = min(pool.copyPiece, Int(blockSize) - step.pointee.copied)
            step.pointee.position = target + UInt64(step.pointee.copied)
            step.pointee.remaining = piece
            step.pointee.vectors.0 = iovec(iov_base: step.pointee.bounce, iov_len: piece)
            step.pointee.vectorCount = 1
        case .fill:
            setFillVectors(step, target)
        default:
            preconditionFailure("not a phase of filling")
        }
        makeReady(index)
    }

    /// The block in one write where it fits a piece: what is around the user's bytes comes from
    /// the copy or is zero. Otherwise the user's bytes alone: the rest has been written before.
    private func setFillVectors(_ step: UnsafeMutablePointer<Step>, _ target: UInt64) {
        let start = step.pointee.start
        let length = step.pointee.length
        if !isSmall || length == Int(blockSize) {
            return setUserVector(step, target)
        }
        let around = step.pointee.copies ? step.pointee.contents! : pool.zeroes
        let end = start + length
        var pieces = (iovec(), iovec(), iovec())
        var count: Int32 = 0
        func add(_ memory: UnsafeMutableRawPointer, _ bytes: Int) {
            guard bytes > 0 else { return }
            let piece = iovec(iov_base: memory, iov_len: bytes)
            switch count {
            case 0: pieces.0 = piece
            case 1: pieces.1 = piece
            default: pieces.2 = piece
            }
            count += 1
        }
        add(around, start)
        add(step.pointee.intent == .zero ? pool.zeroes : step.pointee.memory!, length)
        add(around + end, Int(blockSize) - end)
        step.pointee.vectors = pieces
        step.pointee.vectorCount = count
        step.pointee.position = target
        step.pointee.remaining = Int(blockSize)
    }

    /// A block that is a hole needs no zeroes around the user's bytes. Not asked under the lock: the
    /// answer takes a system call. True: the phase, which was to clear the block, is done.
    func skipsZeroes(_ index: Int32) -> Bool {
        let step = steps[index]
        step.pointee.mayBeHole = false
        let target = step.pointee.newBlock * blockSize
        guard io.isHole(at: target, length: blockSize) else { return false }
        if step.pointee.phase == .clear {
            continueFill(index)
            return true
        }
        setUserVector(step, target)
        return false
    }

    private func setUserVector(_ step: UnsafeMutablePointer<Step>, _ target: UInt64) {
        step.pointee.position = target + UInt64(step.pointee.start)
        step.pointee.remaining = step.pointee.length
        step.pointee.vectors.0 = iovec(
            iov_base: step.pointee.memory, iov_len: step.pointee.length)
        step.pointee.vectorCount = 1
    }

    /// The next phase after a completed one (or the same again, when a buffer has become free).
    func continueFill(_ index: Int32) {
        let step = steps[index]
        switch step.pointee.phase {
        case .copyRead where step.pointee.bounce == nil:
            break
        case .copyRead:
            step.pointee.phase = isSmall ? .fill : .copyWrite
        case .copyWrite:
            step.pointee.copied += min(pool.copyPiece, Int(blockSize) - step.pointee.copied)
            if step.pointee.copied < Int(blockSize) {
                step.pointee.phase = .copyRead
            } else {
                step.pointee.phase = step.pointee.intent == .zero ? .clear : .fill
            }
        case .clear where step.pointee.intent == .write:
            step.pointee.phase = .fill
        default:
            step.pointee.phase = .filled
            filled.append(index)
            return
        }
        start(index)
    }

    /// Under the lock: the data is written, so the mapping may be; or it failed, and the block is
    /// given back.
    func insertFilled(_ index: Int32) {
        let step = steps[index]
        let request = requests[step.pointee.request]
        let volume = request.pointee.volume!.takeUnretainedValue()
        let key = CellKey(volume.id, step.pointee.virtualBlock)
        var again = false
        let block = DataBlock(step.pointee.newBlock)
        if step.pointee.hasFailed {
            pool.giveBack(block)
        } else {
            switch pool.insert(volume, step.pointee.virtualBlock, block) {
            case .done: break
            case .failed(let error): fail(request, error)
            case .noMetadataSpace where step.pointee.commitsAwaited > 0 || !pool.commitGivesBack:
                pool.metadataWasRefused()
                fail(request, ENOSPC)
            case .noMetadataSpace: again = true
            }
        }
        step.pointee.hasCell = false
        pool.releaseCell(key)
        if again {
            // No metadata space until a commit gives some back: then the block is filled anew.
            step.pointee.commitsAwaited += 1
            step.pointee.phase = .asks
            unpin(step)
            // Who is pinned may need the buffer to go on, and this step may have to wait for that.
            if let bounce = step.pointee.bounce {
                step.pointee.bounce = nil
                giveBounce(bounce)
            }
            pool.requestCommit()
            pool.park(reference(index), in: &pool.metadataWaiters)
        } else {
            end(index)
        }
    }
}
