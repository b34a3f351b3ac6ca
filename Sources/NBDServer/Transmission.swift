// One connection's transmission phase without its socket: received bytes become requests, finished
// requests become messages to send. The reactor moves the bytes.
//
// 1. A request holds a slot from its header until its reply has been sent. No free slot: nothing
//    more is parsed or received, so a client that does not read its replies stops being read.
// 2. A payload has its buffer, for its whole length, before its first byte is taken; a header that
//    finds no buffer stays in the input and is parsed again on `resume`.
// 3. A refused WRITE's payload is taken off the stream before the refusal is sent.
// 4. A reply needs no memory that the request did not take: what BLOCK_STATUS has to say goes into
//    a buffer taken with its header.
// 5. A buffer that the kernel (`receivingInPlace`) or the engine (`inFlight`) or the message under
//    way uses is not given back before they are done with it, whatever happens to the connection.

import Glibc
import NBDProtocol
import ThinPool

/// Where requests go: the engine of the reactor, or a test's.
package protocol RequestSink {
    func submit(_ request: VolumeRequest)
}

extension VolumeIO: RequestSink {}

package final class Transmission {
    /// Requests that a connection may have from header to sent reply. The kernel's client has at
    /// most 128.
    static let slotCount = 256
    /// Payload that a connection may hold at once; a single larger request passes.
    static let payloadLimit = 16 << 20
    /// One receive takes up to this much.
    static let inputCapacity = 128 << 10
    /// A payload is received in its own buffer if at least this much of it is missing; below, the
    /// copy costs less than another receive. A long one always is: what is behind it is probably
    /// another long one, which would be received into the input, and copied.
    private static let inPlaceMinimum = 16 << 10
    /// One receive of a payload, and one message of replies, so that a client that keeps up with the
    /// copying does not keep the reactor at it: where it has the reactor to itself, and where not.
    private static let longestReceive = 512 << 10
    private static let longestMessage = 1 << 20
    private static let longestShared = 128 << 10
    /// After a WRITE at least this long the next is expected to be like it: only its header is
    /// received, so that its payload need not be copied.
    private static let longWrite = 64 << 10
    private static let inputAfterLongWrite = 4 << 10

    static let noSlot: Int32 = -1

    /// A request's place, from its header to its sent reply.
    struct Slot {
        var cookie: UInt64 = 0
        var offset: UInt64 = 0
        var payload: UnsafeMutableRawPointer?
        var payloadLength = 0
        /// Chunk headers and texts that have no place in the queue of replies; freed with the slot.
        var extra: UnsafeMutableRawPointer?
        /// Bytes of the reply that are still to be sent.
        var unsent = 0
        /// The payload is the client's to have.
        var answersWithPayload = false
        var asksForStatus = false
        var mayHaveHoles = false
        /// The next free slot, or the slot of the next reply.
        var next: Int32 = 0
    }

    let volume: Volume
    let format: WireFormat
    /// Bytes of a request's header.
    private let headerSize: Int
    private let rules: RequestRules
    private let contexts: VolumeContexts
    private let buffers: BufferPool
    /// Names this connection to the buffer pool.
    private let owner: Int
    /// The high half of the cookies given to the engine.
    private let cookieBase: UInt64

    /// Other clients wait for the end of this one's part of the turn.
    package var isShared = false

    // Input: received and not yet parsed.
    private let input: UnsafeMutableRawPointer
    private var inputStart = 0
    private var inputEnd = 0
    private var expectsLongWrite = false
    /// Requests are still being taken.
    private(set) var isReading = true
    private var isStalled = false
    /// What arrives is kept for the next server.
    private var isPaused = false

    /// The request whose payload is being received, and how long that is.
    private var partial = Transmission.noSlot
    private var partialLength = 0
    private var partialHeader = RequestHeader(
        flags: [], command: 0, cookie: 0, offset: 0, length: 0)
    private var partialFilled = 0
    private var receivingInPlace = false
    /// The refused request whose payload is being thrown away.
    private var discarding: UInt64 = 0
    private var discardedSlot = Transmission.noSlot
    private var discardedRefusal = Refusal.unknownCommand

    // Slots
    let slots: UnsafeMutablePointer<Slot>
    /// The holes that reads have met, by slot; nil: the format cannot tell them.
    let holes: UnsafeMutablePointer<HoleList>?
    /// What the slots that ask for status have asked; made when the first one does.
    private var statusQueries: [StatusQuery?] = []
    private var freeSlot: Int32 = 0
    private(set) var occupied = 0
    /// Requests that the engine has.
    private(set) var inFlight = 0
    private var payloadBytes = 0

    // Output
    var replies = ReplyQueue(capacity: Transmission.slotCount)
    private var firstReply = Transmission.noSlot
    private var lastReply = Transmission.noSlot
    /// Nothing is sent any more. Where the engine sees it, too.
    private let broken: UnsafeMutablePointer<Bool>
    private var isBroken: Bool { broken.pointee }

    /// The client asked to disconnect.
    private(set) var didDisconnect = false
    /// What the client did wrong, once; the stream cannot be followed any more.
    private(set) var violation: String?
    /// The first refusal that is the client's mistake, for the log. To ask whether zeroing is fast is
    /// none: QEMU and nbdcopy do it all the time.
    private(set) var firstRefusal: Refusal?

    init(
        volume: Volume, agreement: Agreement, contexts: VolumeContexts, dataBlockSize: UInt64,
        buffers: BufferPool, owner: Int
    ) {
        self.volume = volume
        format = agreement.format
        headerSize =
            format == .extended ? RequestHeader.extendedSize : RequestHeader.size
        rules = RequestRules(
            exportSize: volume.size, isReadOnly: agreement.export.isReadOnly, format: format,
            hasContexts: !contexts.isEmpty, dataBlockSize: dataBlockSize)
        self.contexts = contexts
        self.buffers = buffers
        self.owner = owner
        cookieBase = UInt64(owner) << 32
        input = .allocate(byteCount: Self.inputCapacity, alignment: 64)
        slots = .allocate(capacity: Self.slotCount)
        for index in 0..<Self.slotCount {
            (slots + index).initialize(to: Slot(next: Int32(index + 1)))
        }
        slots[Self.slotCount - 1].next = Self.noSlot
        holes = format == .simple ? nil : .allocate(capacity: Self.slotCount)
        broken = .allocate(capacity: 1)
        broken.initialize(to: false)
    }

    deinit {
        precondition(occupied == 0, "a connection was freed with requests in flight")
        input.deallocate()
        slots.deallocate()
        holes?.deallocate()
        broken.deallocate()
    }

    /// The connection and slot of a cookie that was given to the engine.
    package static func place(of cookie: UInt64) -> (owner: Int, slot: Int) {
        (Int(cookie >> 32), Int(UInt32(truncatingIfNeeded: cookie)))
    }

    // MARK: - Receiving

    /// `receiveSpace` has room.
    var wantsInput: Bool { isReading && !isStalled && !isPaused }

    /// Where the next bytes go; nil: none are wanted now.
    func receiveSpace() -> UnsafeMutableRawBufferPointer? {
        guard wantsInput else { return nil }
        if partial != Self.noSlot {
            let missing = partialLength - partialFilled
            if missing >= Self.inPlaceMinimum || expectsLongWrite {
                receivingInPlace = true
                return UnsafeMutableRawBufferPointer(
                    start: slots[Int(partial)].payload! + partialFilled,
                    count: min(missing, isShared ? Self.longestShared : Self.longestReceive))
            }
        }
        // All that can be left is the beginning of a header.
        if inputStart > 0 {
            let left = inputEnd - inputStart
            memmove(input, input + inputStart, left)
            inputStart = 0
            inputEnd = left
        }
        let limit =
            expectsLongWrite && partial == Self.noSlot && discarding == 0
            ? Self.inputAfterLongWrite : Self.inputCapacity
        return UnsafeMutableRawBufferPointer(start: input + inputEnd, count: limit - inputEnd)
    }

    /// `count` bytes have been received into `receiveSpace`.
    func received(_ count: Int, _ sink: some RequestSink) {
        if receivingInPlace {
            receivingInPlace = false
            if !isReading {
                releasePartial()
                return
            }
            partialFilled += count
            if partialFilled == partialLength && !isPaused { submitPartial(sink) }
        } else {
            guard isReading else { return }
            inputEnd += count
            parse(sink)
        }
    }

    /// Bytes that arrived behind the handshake.
    func received(_ bytes: UnsafeRawBufferPointer, _ sink: some RequestSink) {
        precondition(bytes.count <= Self.inputCapacity && inputEnd == 0)
        if let base = bytes.baseAddress { memcpy(input, base, bytes.count) }
        received(bytes.count, sink)
    }

    /// Begins no more requests; what has arrived of the next ones can be carried to another server
    /// when all that were begun are answered.
    func pause() {
        isPaused = true
        buffers.stopWaiting(owner)
    }

    /// A refused request whose payload has not all arrived.
    struct Refused: Codable {
        var cookie: UInt64
        var offset: UInt64
        var refusal: Refusal
        /// Bytes of the payload that are still to come.
        var missing: UInt64
    }

    var refused: Refused? {
        guard discardedSlot != Self.noSlot else { return nil }
        let slot = slots[Int(discardedSlot)]
        return Refused(
            cookie: slot.cookie, offset: slot.offset, refusal: discardedRefusal,
            missing: discarding)
    }

    /// Goes on where another server was.
    /// - Precondition: nothing has been received.
    func takeOver(_ refused: Refused) {
        precondition(occupied == 0 && inputEnd == 0)
        discardedSlot = takeSlot(
            RequestHeader(
                flags: [], command: 0, cookie: refused.cookie, offset: refused.offset, length: 0))
        discardedRefusal = refused.refusal
        discarding = refused.missing
    }

    /// Everything that has arrived and was not acted on, as it arrived.
    func carriedInput() -> [UInt8] {
        precondition(isPaused && isReading && inFlight == 0 && replies.isEmpty && !receivingInPlace)
        var bytes: [UInt8] = []
        if partial != Self.noSlot {
            bytes.reserveCapacity(headerSize + partialFilled + inputEnd - inputStart)
            bytes += repeatElement(0, count: headerSize)
            bytes.withUnsafeMutableBytes {
                partialHeader.write(to: $0.baseAddress!, extended: format == .extended)
            }
            bytes += UnsafeRawBufferPointer(
                start: slots[Int(partial)].payload!, count: partialFilled)
        }
        bytes += UnsafeRawBufferPointer(start: input + inputStart, count: inputEnd - inputStart)
        return bytes
    }

    /// Goes on parsing, if it had to stop for want of a slot or of memory.
    func resume(_ sink: some RequestSink) {
        guard isStalled && !isPaused else { return }
        isStalled = false
        parse(sink)
    }

    /// Takes no more requests. True if that is between two requests.
    @discardableResult
    func endReading() -> Bool {
        let isAtBoundary =
            inputStart == inputEnd && partial == Self.noSlot && discardedSlot == Self.noSlot
        isReading = false
        isStalled = false
        buffers.stopWaiting(owner)
        if discardedSlot != Self.noSlot {
            release(discardedSlot)
            discardedSlot = Self.noSlot
        }
        releasePartial()
        return isAtBoundary
    }

    /// Part of a request has arrived, and the rest is awaited.
    var isInsideWrite: Bool { partial != Self.noSlot }
    var holdsPayload: Bool { payloadBytes > 0 }

    private func parse(_ sink: some RequestSink) {
        while isReading && !isPaused {
            if partial != Self.noSlot {
                guard fillPartial(sink) else { break }
            } else if discarding > 0 {
                guard discard() else { break }
            } else {
                guard inputEnd - inputStart >= headerSize else { break }
                guard freeSlot != Self.noSlot else {
                    isStalled = true
                    break
                }
                let isExtended = format == .extended
                guard let header = RequestHeader.parse(input + inputStart, extended: isExtended)
                else {
                    violation = "a request does not begin with its magic number"
                    endReading()
                    break
                }
                if isExtended, header.payloadLength(extended: true) > Limits.maximumPayload {
                    violation = "a payload of \(header.length) bytes"
                    endReading()
                    break
                }
                guard begin(header, sink) else {
                    isStalled = true
                    break
                }
            }
        }
        if inputStart == inputEnd {
            inputStart = 0
            inputEnd = 0
        }
    }

    /// Acts on a header; false: it stays in the input until there is memory.
    private func begin(_ header: RequestHeader, _ sink: some RequestSink) -> Bool {
        switch rules.verdict(header) {
        case .perform(.disconnect):
            inputStart += headerSize
            didDisconnect = true
            endReading()
        case .perform(.blockStatus):
            return beginStatus(header, sink)
        case .perform(let command):
            return begin(header, command, sink)
        case .refuse(let refusal):
            refuse(header, refusal)
        }
        return true
    }

    private func refuse(_ header: RequestHeader, _ refusal: Refusal) {
        inputStart += headerSize
        let slot = takeSlot(header)
        let payload = header.payloadLength(extended: format == .extended)
        if payload == 0 {
            reply(slot, refusal)
        } else {
            discarding = payload
            discardedSlot = slot
            discardedRefusal = refusal
        }
    }

    private func reply(_ slot: Int32, _ refusal: Refusal) {
        if firstRefusal == nil, refusal != .notFast { firstRefusal = refusal }
        reply(slot, refusal.error, refusal.text)
    }

    private func begin(
        _ header: RequestHeader, _ command: Command, _ sink: some RequestSink
    ) -> Bool {
        let hasPayload = command == .read || command == .write
        let length = hasPayload ? Int(header.length) : 0
        guard let index = takeSlot(header, payload: length) else { return false }
        slots[Int(index)].answersWithPayload = command == .read
        if header.length == 0 && command != .flush {
            reply(index, .none)
        } else if command == .write {
            awaitPayload(of: header, in: index, length: length)
            expectsLongWrite = length >= Self.longWrite
        } else {
            if hasPayload { expectsLongWrite = false }
            submit(index, header, command, sink)
        }
        return true
    }

    /// What follows the header goes into the slot's payload.
    private func awaitPayload(of header: RequestHeader, in slot: Int32, length: Int) {
        partial = slot
        partialHeader = header
        partialLength = length
        partialFilled = 0
    }

    // MARK: - Block status

    private func beginStatus(_ header: RequestHeader, _ sink: some RequestSink) -> Bool {
        let chunk = chunkHeader(cookie: header.cookie, offset: header.offset)
        if header.flags.contains(.payloadLength) {
            guard (1...UInt64(StatusPayload.maximumSize)).contains(header.length) else {
                refuse(header, .damagedStatusPayload)
                return true
            }
            let room = StatusQuery.mostMemory(contexts, chunk)
            guard let index = takeSlot(header, payload: room) else { return false }
            slots[Int(index)].asksForStatus = true
            expectsLongWrite = false
            awaitPayload(of: header, in: index, length: Int(header.length))
        } else {
            let query = statusQuery(contexts, header)
            guard let index = takeSlot(header, payload: query.memory(chunk)) else {
                return false
            }
            slots[Int(index)].asksForStatus = true
            expectsLongWrite = false
            submit(index, header, query, sink)
        }
        return true
    }

    private func statusQuery(_ contexts: VolumeContexts, _ header: RequestHeader) -> StatusQuery {
        StatusQuery(
            contexts, isSingle: header.flags.contains(.requestOne),
            blocks: header.length / rules.dataBlockSize)
    }

    private func submit(
        _ slot: Int32, _ header: RequestHeader, _ query: StatusQuery, _ sink: some RequestSink
    ) {
        if statusQueries.isEmpty {
            statusQueries = Array(repeating: nil, count: Self.slotCount)
        }
        statusQueries[Int(slot)] = query
        submit(slot, header, .blockStatus, sink)
    }

    /// The payload names contexts, and how long the range is.
    private func submitStatus(_ slot: Int32, _ header: RequestHeader, _ sink: some RequestSink) {
        let bytes = UnsafeRawBufferPointer(
            start: slots[Int(slot)].payload!, count: Int(header.length))
        guard let payload = StatusPayload(bytes, selected: contexts.selected) else {
            return reply(slot, .damagedStatusPayload)
        }
        if let refusal = rules.statusRefusal(offset: header.offset, length: payload.length) {
            return reply(slot, refusal)
        }
        var header = header
        header.length = payload.length
        submit(slot, header, statusQuery(contexts.only(payload.contexts), header), sink)
    }

    /// Copies what has arrived of the payload; false: some is missing.
    private func fillPartial(_ sink: some RequestSink) -> Bool {
        let count = min(partialLength - partialFilled, inputEnd - inputStart)
        memcpy(slots[Int(partial)].payload! + partialFilled, input + inputStart, count)
        partialFilled += count
        inputStart += count
        guard partialFilled == partialLength else { return false }
        submitPartial(sink)
        return true
    }

    private func submitPartial(_ sink: some RequestSink) {
        let slot = partial
        partial = Self.noSlot
        if slots[Int(slot)].asksForStatus {
            submitStatus(slot, partialHeader, sink)
        } else {
            submit(slot, partialHeader, .write, sink)
        }
    }

    private func releasePartial() {
        guard partial != Self.noSlot && !receivingInPlace else { return }
        release(partial)
        partial = Self.noSlot
    }

    private func discard() -> Bool {
        let count = min(discarding, UInt64(inputEnd - inputStart))
        inputStart += Int(count)
        discarding -= count
        guard discarding == 0 else { return false }
        let slot = discardedSlot
        discardedSlot = Self.noSlot
        reply(slot, discardedRefusal)
        return true
    }

    private func submit(
        _ slot: Int32, _ header: RequestHeader, _ command: Command, _ sink: some RequestSink
    ) {
        let operation: VolumeOperation =
            switch command {
            case .read: .read
            case .write: .write
            case .flush: .flush
            case .trim: .trim
            case .writeZeroes: .writeZeroes
            case .cache: .cache
            case .blockStatus: .extents
            case .disconnect: preconditionFailure("a disconnect is not for the engine")
            }
        var holes: UnsafeMutablePointer<HoleList>?
        if let all = self.holes, command == .read, !header.flags.contains(.dontFragment) {
            holes = all + Int(slot)
            holes!.initialize(to: HoleList())
            slots[Int(slot)].mayHaveHoles = true
        }
        inFlight += 1
        sink.submit(
            VolumeRequest(
                operation: operation, volume: volume, offset: header.offset,
                length: header.length, buffer: slots[Int(slot)].payload,
                fua: header.flags.contains(.fua), noHole: header.flags.contains(.noHole),
                query: slots[Int(slot)].asksForStatus ? statusQueries[Int(slot)]!.query : nil,
                holes: holes, isAbandoned: broken,
                cookie: cookieBase | UInt64(slot)))
    }

    // MARK: - Replying

    /// The engine has finished a request; `code` is an errno, 0 for success.
    func finish(_ index: Int, code: Int32) {
        inFlight -= 1
        let slot = Int32(index)
        if slots[index].asksForStatus {
            let query = statusQueries[index]!
            statusQueries[index] = nil
            if code == 0 { return reply(slot, query) }
        }
        if slots[index].mayHaveHoles, code == 0, holes![index].count > 0 {
            return replyWithHoles(slot)
        }
        if !slots[index].answersWithPayload || code != 0 { givePayload(slot) }
        if code == 0 { reply(slot, .none) } else { reply(slot, WireError(errno: code)) }
    }

    /// Where the replies of a request go; nil: nowhere, as nothing is sent any more.
    func slotToAnswer(_ index: Int32) -> UnsafeMutablePointer<Slot>? {
        guard isBroken else { return slots + Int(index) }
        release(index)
        return nil
    }

    /// The slot's reply, of so many bytes, has been put into the queue.
    func queued(_ index: Int32, bytes: Int) {
        let slot = slots + Int(index)
        slot.pointee.unsent = bytes
        slot.pointee.next = Self.noSlot
        if lastReply == Self.noSlot {
            firstReply = index
        } else {
            slots[Int(lastReply)].next = index
        }
        lastReply = index
    }

    var hasReplies: Bool { !replies.isEmpty }

    /// The message to send next, or nil. Valid until `sent` or `breakOff`.
    func nextMessage() -> UnsafePointer<msghdr>? {
        isBroken
            ? nil : replies.next(atMost: isShared ? Self.longestShared : Self.longestMessage)
    }

    /// `count` bytes of the message have been sent: frees the slots of the replies in them.
    func sent(_ count: Int) {
        guard !isBroken else {
            releaseReplies()
            return
        }
        replies.advance(count)
        var left = count
        while left > 0 {
            let index = firstReply
            let slot = slots + Int(index)
            let part = min(left, slot.pointee.unsent)
            slot.pointee.unsent -= part
            left -= part
            guard slot.pointee.unsent == 0 else { break }
            firstReply = slot.pointee.next
            if firstReply == Self.noSlot { lastReply = Self.noSlot }
            release(index)
        }
    }

    /// The socket is of no use any more: nothing is sent, nothing is read.
    /// - Parameter isSending: a message is under way; `sent` follows when the kernel is done.
    func breakOff(isSending: Bool) {
        broken.pointee = true
        endReading()
        if !isSending { releaseReplies() }
    }

    private func releaseReplies() {
        while firstReply != Self.noSlot {
            let index = firstReply
            firstReply = slots[Int(index)].next
            release(index)
        }
        lastReply = Self.noSlot
    }

    // MARK: - Slots

    private func takeSlot(_ header: RequestHeader) -> Int32 {
        let index = freeSlot
        let slot = slots + Int(index)
        freeSlot = slot.pointee.next
        occupied += 1
        slot.pointee = Slot(cookie: header.cookie, offset: header.offset)
        return index
    }

    /// Takes the header off the input, and a slot with a buffer for it; nil: there is no memory now,
    /// and the header stays.
    private func takeSlot(_ header: RequestHeader, payload length: Int) -> Int32? {
        var payload: UnsafeMutableRawPointer?
        if length > 0 {
            guard payloadBytes == 0 || payloadBytes + length <= Self.payloadLimit else {
                return nil
            }
            let holdsNothing = payloadBytes == 0
            payload = buffers.take(length, for: owner, holdsNothing: holdsNothing)
            if payload == nil { return nil }
        }
        inputStart += headerSize
        let index = takeSlot(header)
        slots[Int(index)].payload = payload
        slots[Int(index)].payloadLength = length
        payloadBytes += length
        return index
    }

    private func release(_ index: Int32) {
        givePayload(index)
        if let extra = slots[Int(index)].extra {
            extra.deallocate()
            slots[Int(index)].extra = nil
        }
        slots[Int(index)].next = freeSlot
        freeSlot = index
        occupied -= 1
    }

    func givePayload(_ index: Int32) {
        let slot = slots + Int(index)
        guard let payload = slot.pointee.payload else { return }
        buffers.give(payload, length: slot.pointee.payloadLength)
        payloadBytes -= slot.pointee.payloadLength
        slot.pointee.payload = nil
        slot.pointee.payloadLength = 0
    }
}
