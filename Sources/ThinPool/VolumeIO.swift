// The engine of one reactor: requests in, data-device I/O out, and the pool's lock only where the
// map changes or is not in the mapping table.
//
// A turn: `beginTurn` pins the epoch; `submit` and `complete` do what needs no lock at once and
// queue the rest; `endTurn` takes the lock once for all that was queued, then unpins.
//
// 1. A mapping read from the table is used only under a pin that began before the read.
// 2. A request is finished only after all of its steps; a FUA request and a flush only after what
//    they cover is durable.
// 3. The mapping of a filled block is inserted after its data has been written, never before.
// 4. A turn copies and zeroes so many bytes on the spot, none of them under the pool's lock, and
//    requests take turns at it piece by piece: nobody waits for somebody's 32 MiB.
// 5. A turn goes through so many leaves of the map, whatever the number of requests that want to:
//    nobody waits for somebody's thousand questions.
// 6. Slots for steps are one for each request and a bounded number besides.

import BlockIO
import Glibc
import Synchronization
import ThinMetadata

public final class VolumeIO: @unchecked Sendable {
    static let flushTag: UInt64 = 1 << 32

    let pool: Pool
    let io: any DataIO
    let wake: @Sendable () -> Void
    private let bounds: PoolBounds
    let blockSize: UInt64
    let blockShift: UInt64?
    /// Index among the pool's engines, and slot among the epoch's readers.
    let index: Int
    let reader: Int

    let requests = SlotTable(Request())
    let steps = SlotTable(Step())
    private var finished: [(cookie: UInt64, error: Int32)] = []
    public private(set) var inFlight = 0

    private let pins = EpochPins()
    private var turnEpoch: UInt64 = 0
    private var inTurn = false

    /// Steps that need the lock, and steps whose block is filled.
    let asking = IndexQueue()
    /// Of the former, those that this turn may still look at.
    private var asksLeft = 0
    /// Steps that need it for a part of the map, however large: they go on by turns.
    let walking = IndexQueue()
    /// Leaves that they may still visit in this turn; negative when the last one was dearer.
    var leavesLeft = 0
    let filled = IndexQueue()
    /// Requests that have steps with I/O to issue; each of them is here once.
    private let ready = IndexQueue()
    /// There is more than one client.
    public var isShared = false
    /// Bytes that this turn may still copy or zero on the spot.
    private var bytesLeft = 0
    /// Requests that need a commit, and those that need a flush of the data device.
    private let committing = IndexQueue()
    private let flushNext = IndexQueue()
    private let flushing = IndexQueue()
    private var flushTicket: FlushLedger.Ticket?

    /// Reads metadata ahead; made when something is first missing.
    var nodes: NodeReader?

    private var bounces: [UnsafeMutableRawPointer] = []
    private var bouncesMade = 0
    private let waitingForBounce = IndexQueue()
    /// Steps for whose zeroing the device had no room.
    private let waitingToZero = IndexQueue()

    /// What other threads have for this reactor. Under the pool's lock.
    enum Message {
        case resume(Int32)
        case finish(Int32, error: Int32)
    }
    var inbox: [Message] = []
    private let hasMail = Atomic<Bool>(false)
    /// A turn is under way that looks for messages before it ends: nobody need wake the reactor.
    /// Under the pool's lock.
    private var looksForMail = false

    public init(pool: Pool, io: any DataIO, wake: @escaping @Sendable () -> Void) {
        self.pool = pool
        self.io = io
        self.wake = wake
        bounds = pool.options.bounds
        blockSize = pool.blockSize
        blockShift =
            pool.blockSize.nonzeroBitCount == 1
            ? UInt64(pool.blockSize.trailingZeroBitCount) : nil
        pool.lock.lock()
        reader = pool.epochs.register()
        index = pool.engineSlot()
        // Before anybody else gets the lock: an empty slot is there to be taken.
        pool.engines[index] = .passUnretained(self)
        pool.lock.unlock()
        finished.reserveCapacity(1024)
    }

    /// - Precondition: nothing is in flight.
    public func close() {
        precondition(inFlight == 0, "a reactor closed its engine with requests in flight")
        pool.lock.withLock {
            pool.epochs.unregister(reader)
            pool.engines[index] = nil
            pool.processDrains()
        }
        for bounce in bounces { free(bounce) }
        bounces = []
        nodes = nil
    }

    // MARK: - A turn

    /// What of `asking` is looked at, and read ahead for, in one go.
    static let askPortion = 64

    public func beginTurn() {
        turnEpoch = pool.epochs.now
        pool.epochs.publish(reader, min(turnEpoch, pins.oldest))
        inTurn = true
        bytesLeft = isShared ? bounds.sharedTurnBytes : bounds.turnBytes
        leavesLeft = bounds.turnLeaves
        asksLeft = bounds.turnAsks
    }

    public func submit(_ request: VolumeRequest) {
        precondition(inTurn)
        inFlight += 1
        let index = requests.take()
        let slot = requests[index]
        slot.pointee = Request(
            operation: request.operation, fua: request.fua, noHole: request.noHole,
            volume: Unmanaged.passUnretained(request.volume), offset: request.offset,
            cursor: request.offset, end: request.offset + request.length,
            buffer: request.buffer, query: request.query.map { .passUnretained($0) },
            holes: request.holes, isAbandoned: request.isAbandoned,
            cookie: request.cookie)
        switch request.operation {
        case .read, .write, .writeZeroes:
            advance(index)
        case .trim:
            trim(index)
        case .flush:
            slot.pointee.cursor = slot.pointee.end
            makeDurable(index)
        case .cache:
            cache(index)
        case .extents:
            beginExtents(index)
        }
    }

    public func endTurn() {
        precondition(inTurn)
        while true {
            if hasMail.load(ordering: .acquiring) || !filled.isEmpty || !committing.isEmpty
                || (!asking.isEmpty && asksLeft > 0) || (!walking.isEmpty && leavesLeft > 0)
            {
                underLock()
            }
            while bytesLeft > 0, let request = ready.popFirst() { issue(takeReady(request)) }
            guard asking.isEmpty || asksLeft == 0, filled.isEmpty, committing.isEmpty
            else { continue }
            startFlush()
            if !hasMail.load(ordering: .acquiring) { break }
        }
        inTurn = false
        if !asking.isEmpty || !walking.isEmpty || !ready.isEmpty { wake() }
        pool.epochs.publish(reader, pins.oldest)
        // Ordered after the publication: either we see that somebody waits for a pin to go, or he
        // sees that ours is gone.
        if pool.drainsPending.load(ordering: .sequentiallyConsistent) {
            pool.lock.withLock { pool.processDrains() }
        }
    }

    /// One flush at a time for all that wait for one: those that come meanwhile share the next.
    private func startFlush() {
        guard flushTicket == nil, !flushNext.isEmpty else { return }
        while let request = flushNext.popFirst() { flushing.append(request) }
        flushTicket = pool.lock.withLock { pool.flushes.begin() }
        if let result = io.flush(tag: Self.flushTag) { completeFlush(result) }
    }

    public func takeFinished(_ body: (_ cookie: UInt64, _ error: Int32) -> Void) {
        for entry in finished { body(entry.cookie, entry.error) }
        finished.removeAll(keepingCapacity: true)
    }

    private func underLock() {
        pool.lock.lock()
        looksForMail = true
        hasMail.store(false, ordering: .relaxed)
        if !inbox.isEmpty {
            for message in inbox {
                switch message {
                case .resume(let step): ask(step)
                case .finish(let request, let error):
                    requests[request].pointee.error = error
                    finish(request)
                }
            }
            inbox.removeAll(keepingCapacity: true)
        }
        // Filled blocks first: what waits for them is then resolved in the same turn.
        while let step = filled.popFirst() { insertFilled(step) }
        resolveAsking()
        while leavesLeft > 0, let step = walking.popFirst() {
            resolve(step)
            // Who waits for the lock has it as soon as may be; but a turn visits one leaf at least.
            if pool.lock.isAwaited { leavesLeft = 0 }
        }
        while let request = committing.popFirst() { joinCommit(request) }
        pool.endOperation()
        looksForMail = false
        pool.lock.unlock()
    }

    /// In portions that are read ahead together; who waits for the lock has it between them.
    private func resolveAsking() {
        if !asking.isEmpty || !walking.isEmpty { readAhead() }
        var portion = Self.askPortion
        while asksLeft > 0, let step = asking.popFirst() {
            resolve(step)
            asksLeft -= 1
            portion -= 1
            guard portion == 0 else { continue }
            portion = Self.askPortion
            pool.endOperation()
            if pool.lock.isAwaited { pool.lock.letOthersIn() }
            if !asking.isEmpty && asksLeft > 0 { readAhead() }
        }
    }

    /// Leaves a message for this reactor. The lock is held.
    func post(_ message: Message) {
        inbox.append(message)
        if !hasMail.exchange(true, ordering: .releasing), !looksForMail { wake() }
    }

    // MARK: - Requests

    @inline(__always)
    func block(of offset: UInt64) -> UInt64 {
        if let blockShift { return offset >> blockShift }
        return offset / blockSize
    }

    /// Gives out steps until the request's end or its window is reached.
    func advance(_ index: Int32) {
        let request = requests[index]
        switch request.pointee.operation {
        case .read: advanceRead(index)
        case .write: advanceWrite(index)
        default: advanceZeroes(index)
        }
        if request.pointee.pending == 0 && request.pointee.cursor == request.pointee.end {
            makeDurable(index)
        }
    }

    private func advanceRead(_ index: Int32) {
        let request = requests[index]
        let volume = request.pointee.volume!.takeUnretainedValue()
        let end = request.pointee.end
        var cursor = request.pointee.cursor
        while cursor < end, request.pointee.pending < window {
            let block = block(of: cursor)
            var limit = min(end, (block + 1) * blockSize)
            let memory = request.pointee.buffer! + Int(cursor - request.pointee.offset)
            switch volume.table.lookup(block) {
            case .unmapped:
                var next = block + 1
                while limit < end, case .unmapped = volume.table.lookup(next) {
                    next += 1
                    limit = min(end, next * blockSize)
                }
                if !isTold(request, hole: cursor..<limit) {
                    queue(newStep(index, .read), .hole, at: 0, memory, Int(limit - cursor))
                }
            case .unknown:
                ask(index, .read, block: block, from: cursor, to: limit, memory: memory)
            case .mapped(let mapping):
                var next = mapping.block.rawValue + 1
                var run = block + 1
                while limit < end, limit - cursor < bounds.run,
                    case .mapped(let following) = volume.table.lookup(run),
                    following.block.rawValue == next
                {
                    next += 1
                    run += 1
                    limit = min(end, run * blockSize)
                }
                transfer(
                    index, .read,
                    at: mapping.block.rawValue * blockSize + (cursor - block * blockSize),
                    memory, Int(limit - cursor))
            }
            cursor = limit
        }
        request.pointee.cursor = cursor
    }

    /// Whether the client hears of the hole, so that its memory need not be zeroed.
    @inline(__always)
    func isTold(_ request: UnsafeMutablePointer<Request>, hole: Range<UInt64>) -> Bool {
        guard let holes = request.pointee.holes else { return false }
        return holes.pointee.append(hole.lowerBound, hole.upperBound)
    }

    private func advanceWrite(_ index: Int32) {
        let request = requests[index]
        let volume = request.pointee.volume!.takeUnretainedValue()
        let end = request.pointee.end
        var cursor = request.pointee.cursor
        let gate = volume.openGate
        while cursor < end, request.pointee.pending < window {
            let block = block(of: cursor)
            var limit = min(end, (block + 1) * blockSize)
            let memory = request.pointee.buffer! + Int(cursor - request.pointee.offset)
            if let gate, case .mapped(let mapping) = volume.table.lookup(block),
                mapping.time >= gate
            {
                var next = mapping.block.rawValue + 1
                var run = block + 1
                while limit < end, limit - cursor < bounds.run,
                    case .mapped(let following) = volume.table.lookup(run),
                    following.block.rawValue == next, following.time >= gate
                {
                    next += 1
                    run += 1
                    limit = min(end, run * blockSize)
                }
                transfer(
                    index, .write,
                    at: mapping.block.rawValue * blockSize + (cursor - block * blockSize),
                    memory, Int(limit - cursor))
            } else {
                ask(index, .write, block: block, from: cursor, to: limit, memory: memory)
            }
            cursor = limit
        }
        request.pointee.cursor = cursor
    }

    /// Partial blocks are written; whole ones are unmapped, or provisioned where the client wants
    /// no hole. The volume's last block counts as whole when the request reaches the volume's end.
    private func advanceZeroes(_ index: Int32) {
        let request = requests[index]
        let volume = request.pointee.volume!.takeUnretainedValue()
        let end = request.pointee.end
        while request.pointee.cursor < end, request.pointee.pending < window {
            let cursor = request.pointee.cursor
            let block = block(of: cursor)
            let whole = wholeBlocks(from: cursor, to: end, volumeSize: volume.size)
            var limit = min(end, (block + 1) * blockSize)
            if !request.pointee.noHole, let whole, whole.lowerBound == block {
                limit = min(end, whole.upperBound * blockSize)
                unmap(index, whole)
            } else {
                ask(index, .zero, block: block, from: cursor, to: limit, memory: nil)
            }
            request.pointee.cursor = limit
        }
    }

    private func trim(_ index: Int32) {
        let request = requests[index]
        request.pointee.cursor = request.pointee.end
        let volume = request.pointee.volume!.takeUnretainedValue()
        if let whole = wholeBlocks(
            from: request.pointee.offset, to: request.pointee.end, volumeSize: volume.size)
        {
            unmap(index, whole)
        } else {
            makeDurable(index)
        }
    }

    /// Loads the map, not the data: that would take memory from what has been asked for.
    private func cache(_ index: Int32) {
        let request = requests[index]
        let volume = request.pointee.volume!.takeUnretainedValue()
        request.pointee.cursor = request.pointee.end
        guard request.pointee.offset < request.pointee.end else { return finish(index) }
        let first = block(of: request.pointee.offset)
        let end = block(of: request.pointee.end + blockSize - 1)
        let most = volume.table.pageEntries * UInt64(bounds.cachedPages)
        let step = newStep(index, .cache)
        steps[step].pointee.virtualBlock = first
        steps[step].pointee.blockLimit = min(end, first + most)
        ask(step)
    }

    /// The blocks that lie entirely in the byte range.
    private func wholeBlocks(from: UInt64, to: UInt64, volumeSize: UInt64) -> Range<UInt64>? {
        let first = block(of: from + blockSize - 1)
        let last = to == volumeSize ? block(of: to + blockSize - 1) : block(of: to)
        return first < last ? first..<last : nil
    }

    // MARK: - Steps

    /// Steps that a request may have outstanding: one, once there are many of all requests.
    private var window: Int32 { steps.taken < bounds.steps ? bounds.window : 1 }

    func newStep(_ request: Int32, _ intent: StepIntent) -> Int32 {
        let index = steps.take()
        steps[index].pointee = Step()
        steps[index].pointee.request = request
        steps[index].pointee.intent = intent
        requests[request].pointee.pending += 1
        return index
    }

    private func ask(
        _ request: Int32, _ intent: StepIntent, block: UInt64, from: UInt64, to: UInt64,
        memory: UnsafeMutableRawPointer?
    ) {
        let index = newStep(request, intent)
        let step = steps[index]
        step.pointee.virtualBlock = block
        step.pointee.start = Int(from - block * blockSize)
        step.pointee.length = Int(to - from)
        step.pointee.memory = memory
        ask(index)
    }

    /// The step goes on once the map has been asked, under the lock.
    func ask(_ index: Int32) {
        if steps[index].pointee.intent.walks { walking.append(index) } else { asking.append(index) }
    }

    private func unmap(_ request: Int32, _ blocks: Range<UInt64>) {
        let index = newStep(request, .unmap)
        steps[index].pointee.virtualBlock = blocks.lowerBound
        steps[index].pointee.blockLimit = blocks.upperBound
        ask(index)
    }

    private func transfer(
        _ request: Int32, _ intent: StepIntent, at position: UInt64,
        _ memory: UnsafeMutableRawPointer, _ length: Int
    ) {
        let index = newStep(request, intent)
        pin(steps[index])
        queue(index, .transfer, at: position, memory, length)
    }

    /// Queues the I/O of a phase that needs one piece of memory, if any.
    func queue(
        _ index: Int32, _ phase: StepPhase, at position: UInt64,
        _ memory: UnsafeMutableRawPointer?, _ length: Int
    ) {
        let step = steps[index]
        step.pointee.phase = phase
        step.pointee.position = position
        step.pointee.remaining = length
        step.pointee.vectors.0 = iovec(iov_base: memory, iov_len: length)
        step.pointee.vectorCount = 1
        makeReady(index)
    }

    /// The step has I/O to issue: when it is its request's turn, and its own there.
    func makeReady(_ index: Int32) {
        let request = steps[index].pointee.request
        let slot = requests[request]
        if slot.pointee.firstReady < 0 {
            slot.pointee.firstReady = index
            ready.append(request)
        } else {
            steps[slot.pointee.lastReady].pointee.nextReady = index
        }
        slot.pointee.lastReady = index
    }

    /// The next step of a request that was taken from `ready`; the request goes to the end of those
    /// if it has more.
    private func takeReady(_ request: Int32) -> Int32 {
        let slot = requests[request]
        let index = slot.pointee.firstReady
        let step = steps[index]
        slot.pointee.firstReady = step.pointee.nextReady
        step.pointee.nextReady = -1
        if slot.pointee.firstReady >= 0 { ready.append(request) }
        return index
    }

    func pin(_ step: UnsafeMutablePointer<Step>) {
        if !step.pointee.isPinned {
            step.pointee.isPinned = true
            step.pointee.pin = pins.enter(turnEpoch)
        }
    }

    /// Starts, or goes on with, the I/O of a step's phase.
    func issue(_ index: Int32) {
        let step = steps[index]
        if isAbandoned(step.pointee.request) {
            if step.pointee.phase.isZeroing { nextZeroing() }
            return fail(index, EIO)
        }
        if step.pointee.mayBeHole, skipsZeroes(index) { return }
        let tag = UInt64(UInt32(bitPattern: index))
        let result: Int32?
        switch step.pointee.phase {
        case .transfer where step.pointee.intent == .read, .copyRead:
            result = io.read(
                at: step.pointee.position, into: step.pointee.vectors.0.iov_base!,
                length: step.pointee.remaining, tag: tag)
        case .transfer, .copyWrite, .fill:
            let vectors =
                (UnsafeMutableRawPointer(step) + MemoryLayout<Step>.offset(of: \Step.vectors)!)
                .assumingMemoryBound(to: iovec.self)
            result = io.write(
                at: step.pointee.position, vectors: vectors,
                count: Int(step.pointee.vectorCount), isNew: step.pointee.phase != .transfer,
                tag: tag)
        case .hole:
            let piece = min(step.pointee.remaining, bounds.piece)
            memset(step.pointee.vectors.0.iov_base!, 0, piece)
            result = Int32(piece)
        case .zeroes, .clear:
            result = nil
            if !io.zero(
                at: step.pointee.position, length: UInt64(step.pointee.remaining), tag: tag)
            {
                waitingToZero.append(index)
            }
        case .asks, .filled:
            preconditionFailure("no I/O belongs to this phase")
        }
        if let result {
            bytesLeft -= Int(max(result, 0))
            complete(tag: tag, result: result)
        }
    }

    public func complete(tag: UInt64, result: Int32) {
        precondition(inTurn)
        // EAGAIN and EINTR did nothing: the same again.
        let didNothing = result == -EAGAIN || result == -EINTR
        if tag == Self.flushTag {
            guard didNothing else { return completeFlush(result) }
            if let result = io.flush(tag: tag) { completeFlush(result) }
            return
        }
        let index = Int32(truncatingIfNeeded: tag)
        let step = steps[index]
        if didNothing { return issue(index) }
        if step.pointee.phase.isZeroing { nextZeroing() }
        if result < 0 { return fail(index, Self.clientError(-result)) }
        if !step.pointee.phase.isZeroing {
            // Nothing transferred: the device ends where it should go on.
            if result == 0 { return fail(index, EIO) }
            step.pointee.position += UInt64(result)
            step.pointee.remaining -= Int(result)
            if step.pointee.remaining > 0 {
                step.pointee.advanceVectors(Int(result))
                makeReady(index)
                return
            }
        }
        switch step.pointee.phase {
        case .transfer, .hole, .zeroes: end(index)
        default: continueFill(index)
        }
    }

    /// A zeroing is over, or is not done: the device has room for one that waits.
    private func nextZeroing() {
        if let next = waitingToZero.popFirst() { makeReady(next) }
    }

    /// What a device's error becomes for the client.
    private static func clientError(_ code: Int32) -> Int32 {
        switch code {
        case ENOSPC, EDQUOT, EFBIG: return ENOSPC
        default: return EIO
        }
    }

    /// A step failed: its block is not inserted, the request gets the error.
    func fail(_ index: Int32, _ error: Int32) {
        let step = steps[index]
        fail(requests[step.pointee.request], error)
        if step.pointee.hasCell {
            // The cell and the reservation are given back under the lock.
            step.pointee.phase = .filled
            step.pointee.hasFailed = true
            filled.append(index)
        } else {
            end(index)
        }
    }

    /// The request gives out no more steps; its first error is the one that is told.
    func fail(_ request: UnsafeMutablePointer<Request>, _ error: Int32) {
        if request.pointee.error == 0 { request.pointee.error = error }
        request.pointee.cursor = request.pointee.end
    }

    /// The step's I/O is over for now: nothing holds blocks for it any more.
    func unpin(_ step: UnsafeMutablePointer<Step>) {
        guard step.pointee.isPinned else { return }
        step.pointee.isPinned = false
        pins.leave(step.pointee.pin)
    }

    /// A step is over.
    func end(_ index: Int32) {
        let step = steps[index]
        let request = step.pointee.request
        unpin(step)
        if let bounce = step.pointee.bounce { giveBounce(bounce) }
        steps.give(index)
        let slot = requests[request]
        slot.pointee.pending -= 1
        if slot.pointee.cursor < slot.pointee.end, isAbandoned(request) {
            fail(slot, EIO)
        }
        if slot.pointee.cursor < slot.pointee.end {
            advance(request)
        } else if slot.pointee.pending == 0 {
            makeDurable(request)
        }
    }

    /// Nobody waits for the answer: what has not begun is left undone, and the request fails.
    func isAbandoned(_ request: Int32) -> Bool {
        requests[request].pointee.isAbandoned?.pointee ?? false
    }

    // MARK: - The end of a request

    /// All steps are done: now what a flush or FUA needs, then the reply.
    private func makeDurable(_ index: Int32) {
        let request = requests[index]
        if request.pointee.error != 0 { return finish(index) }
        switch request.pointee.operation {
        case .flush: break
        case .read, .cache, .extents: return finish(index)
        case .write, .trim, .writeZeroes:
            guard request.pointee.fua else { return finish(index) }
        }
        let volume = request.pointee.volume!.takeUnretainedValue()
        if volume.changedIn.load(ordering: .acquiring)
            > pool.durableSequence.load(ordering: .acquiring) || volume.openGate == nil
        {
            committing.append(index)
        } else {
            flushNext.append(index)
        }
    }

    /// Under the lock: waits for the commit that will cover the request, if one is still needed.
    private func joinCommit(_ index: Int32) {
        let volume = requests[index].pointee.volume!.takeUnretainedValue()
        if pool.failure != nil {
            requests[index].pointee.error = EIO
            finish(index)
        } else if volume.changedIn.load(ordering: .relaxed)
            > pool.durableSequence.load(ordering: .relaxed)
        {
            pool.waitForCommit(.request(engine: self.index, request: index))
        } else {
            flushNext.append(index)
        }
    }

    private func completeFlush(_ result: Int32) {
        var waiters: [Pool.CommitWaiter] = []
        while let request = flushing.popFirst() {
            waiters.append(.request(engine: index, request: request))
        }
        pool.lock.withLock {
            looksForMail = true
            _ = pool.flushEnded(flushTicket!, error: max(-result, 0), waiters: waiters)
            looksForMail = false
        }
        flushTicket = nil
    }

    func finish(_ index: Int32) {
        let request = requests[index]
        finished.append((request.pointee.cookie, request.pointee.error))
        request.pointee.volume = nil
        requests.give(index)
        inFlight -= 1
    }

    // MARK: - Buffers for copies

    /// A buffer for a step that copies; nil: the step waits, and is continued when one is free.
    func takeBounce(for index: Int32) -> UnsafeMutableRawPointer? {
        if let bounce = bounces.popLast() { return bounce }
        if bouncesMade < bounds.bounces {
            bouncesMade += 1
            return aligned_alloc(4096, pool.copyPiece)!
        }
        waitingForBounce.append(index)
        return nil
    }

    func giveBounce(_ bounce: UnsafeMutableRawPointer) {
        bounces.append(bounce)
        if let next = waitingForBounce.popFirst() { continueFill(next) }
    }
}

extension Step {
    /// Drops `count` transferred bytes from the front of the vectors.
    mutating func advanceVectors(_ count: Int) {
        var left = count
        while left > 0 {
            if left < vectors.0.iov_len {
                vectors.0.iov_base += left
                vectors.0.iov_len -= left
                return
            }
            left -= vectors.0.iov_len
            vectors = (vectors.1, vectors.2, iovec())
            vectorCount -= 1
        }
    }
}
