// One connection's transmission phase without its socket: received bytes become requests, finished
// requests become messages to send. The reactor moves the bytes.
//
// 1. A request holds a slot from its header until its reply has been sent. No free slot: nothing
//    more is parsed or received, so a client that does not read its replies stops being read.
// 2. A payload has its buffer, for its whole length, before its first byte is taken; a header that
//    finds no buffer stays in the input and is parsed again on `resume`.
// 3. A refused WRITE's payload is taken off the stream before the refusal is sent.
// 4. A buffer that the kernel (`receivingInPlace`) or the engine (`inFlight`) or the message under
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
    /// After a WRITE at least this long the next is expected to be like it: only its header is
    /// received, so that its payload need not be copied.
    private static let longWrite = 64 << 10
    private static let inputAfterLongWrite = 4 << 10

    private static let noSlot: Int32 = -1

    /// A request's place, from its header to its sent reply.
    private struct Slot {
        var cookie: UInt64 = 0
        var payload: UnsafeMutableRawPointer?
        var payloadLength = 0
        /// Header and payload that are still to be sent.
        var unsent = 0
        var isRead = false
        /// The next free slot, or the slot of the next reply.
        var next: Int32 = 0
    }

    let volume: Volume
    private let size: UInt64
    private let isReadOnly: Bool
    private let buffers: BufferPool
    /// Names this connection to the buffer pool.
    private let owner: Int
    /// The high half of the cookies given to the engine.
    private let cookieBase: UInt64

    // Input: received and not yet parsed.
    private let input: UnsafeMutableRawPointer
    private var inputStart = 0
    private var inputEnd = 0
    private var expectsLongWrite = false
    /// Requests are still being taken.
    private(set) var isReading = true
    private var isStalled = false

    /// The WRITE whose payload is being received.
    private var partial = Transmission.noSlot
    private var partialHeader = RequestHeader(
        flags: [], command: 0, cookie: 0, offset: 0, length: 0)
    private var partialFilled = 0
    private var receivingInPlace = false
    /// The refused WRITE whose payload is being thrown away.
    private var discarding: UInt64 = 0
    private var discardedSlot = Transmission.noSlot
    private var discardedError = WireError.none

    // Slots
    private let slots: UnsafeMutablePointer<Slot>
    private var freeSlot: Int32 = 0
    private(set) var occupied = 0
    /// Requests that the engine has.
    private(set) var inFlight = 0
    private var payloadBytes = 0

    // Output
    private var replies = ReplyQueue(capacity: Transmission.slotCount)
    private var firstReply = Transmission.noSlot
    private var lastReply = Transmission.noSlot
    private var isBroken = false

    /// The client asked to disconnect.
    private(set) var didDisconnect = false
    /// What the client did wrong, once; the stream cannot be followed any more.
    private(set) var violation: String?
    /// The first refusal, for the log.
    private(set) var firstRefusal: Refusal?

    init(volume: Volume, isReadOnly: Bool, buffers: BufferPool, owner: Int) {
        self.volume = volume
        size = volume.size
        self.isReadOnly = isReadOnly
        self.buffers = buffers
        self.owner = owner
        cookieBase = UInt64(owner) << 32
        input = .allocate(byteCount: Self.inputCapacity, alignment: 64)
        slots = .allocate(capacity: Self.slotCount)
        for index in 0..<Self.slotCount {
            (slots + index).initialize(to: Slot(next: Int32(index + 1)))
        }
        slots[Self.slotCount - 1].next = Self.noSlot
    }

    deinit {
        precondition(occupied == 0, "a connection was freed with requests in flight")
        input.deallocate()
        slots.deallocate()
    }

    /// The connection and slot of a cookie that was given to the engine.
    package static func place(of cookie: UInt64) -> (owner: Int, slot: Int) {
        (Int(cookie >> 32), Int(UInt32(truncatingIfNeeded: cookie)))
    }

    // MARK: - Receiving

    /// Where the next bytes go; nil: none are wanted now.
    func receiveSpace() -> UnsafeMutableRawBufferPointer? {
        guard isReading && !isStalled else { return nil }
        if partial != Self.noSlot {
            let slot = slots + Int(partial)
            let missing = slot.pointee.payloadLength - partialFilled
            if missing >= Self.inPlaceMinimum || expectsLongWrite {
                receivingInPlace = true
                return UnsafeMutableRawBufferPointer(
                    start: slot.pointee.payload! + partialFilled, count: missing)
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
            if partialFilled == slots[Int(partial)].payloadLength { submitPartial(sink) }
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

    /// Goes on parsing, if it had to stop for want of a slot or of memory.
    func resume(_ sink: some RequestSink) {
        guard isStalled else { return }
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
        while isReading {
            if partial != Self.noSlot {
                guard fillPartial(sink) else { break }
            } else if discarding > 0 {
                guard discard() else { break }
            } else {
                guard inputEnd - inputStart >= RequestHeader.size else { break }
                guard freeSlot != Self.noSlot else {
                    isStalled = true
                    break
                }
                guard let header = RequestHeader.parse(input + inputStart) else {
                    violation = "a request does not begin with its magic number"
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
        switch header.validated(exportSize: size, isReadOnly: isReadOnly) {
        case .perform(.disconnect):
            inputStart += RequestHeader.size
            didDisconnect = true
            endReading()
        case .perform(let command):
            return begin(header, command, sink)
        case .refuse(let refusal):
            inputStart += RequestHeader.size
            if firstRefusal == nil { firstRefusal = refusal }
            let slot = takeSlot(header)
            if header.payloadLength == 0 {
                reply(slot, refusal.error)
            } else {
                discarding = header.payloadLength
                discardedSlot = slot
                discardedError = refusal.error
            }
        }
        return true
    }

    private func begin(
        _ header: RequestHeader, _ command: Command, _ sink: some RequestSink
    ) -> Bool {
        let hasPayload = command == .read || command == .write
        let length = hasPayload ? Int(header.length) : 0
        var payload: UnsafeMutableRawPointer?
        if length > 0 {
            guard payloadBytes == 0 || payloadBytes + length <= Self.payloadLimit else {
                return false
            }
            payload = buffers.take(length, for: owner)
            if payload == nil { return false }
        }
        inputStart += RequestHeader.size
        let index = takeSlot(header)
        let slot = slots + Int(index)
        slot.pointee.payload = payload
        slot.pointee.payloadLength = length
        slot.pointee.isRead = command == .read
        payloadBytes += length
        if header.length == 0 && command != .flush {
            reply(index, .none)
        } else if command == .write {
            partial = index
            partialHeader = header
            partialFilled = 0
            expectsLongWrite = length >= Self.longWrite
        } else {
            if hasPayload { expectsLongWrite = false }
            submit(index, header, command, sink)
        }
        return true
    }

    /// Copies what has arrived of the payload; false: some is missing.
    private func fillPartial(_ sink: some RequestSink) -> Bool {
        let slot = slots + Int(partial)
        let count = min(slot.pointee.payloadLength - partialFilled, inputEnd - inputStart)
        memcpy(slot.pointee.payload! + partialFilled, input + inputStart, count)
        partialFilled += count
        inputStart += count
        guard partialFilled == slot.pointee.payloadLength else { return false }
        submitPartial(sink)
        return true
    }

    private func submitPartial(_ sink: some RequestSink) {
        let slot = partial
        partial = Self.noSlot
        submit(slot, partialHeader, .write, sink)
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
        reply(slot, discardedError)
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
            case .disconnect: preconditionFailure("a disconnect is not for the engine")
            }
        inFlight += 1
        sink.submit(
            VolumeRequest(
                operation: operation, volume: volume, offset: header.offset,
                length: header.length, buffer: slots[Int(slot)].payload,
                fua: header.flags.contains(.fua), noHole: header.flags.contains(.noHole),
                cookie: cookieBase | UInt64(slot)))
    }

    // MARK: - Replying

    /// The engine has finished a request; `code` is an errno, 0 for success.
    func finish(_ index: Int, code: Int32) {
        inFlight -= 1
        let slot = Int32(index)
        if !slots[index].isRead || code != 0 { givePayload(slot) }
        reply(slot, code == 0 ? .none : WireError(errno: code))
    }

    private func reply(_ index: Int32, _ error: WireError) {
        if isBroken {
            release(index)
            return
        }
        let slot = slots + Int(index)
        let payload = slot.pointee.payload
        let length = slot.pointee.payloadLength
        replies.append(
            error: error, cookie: slot.pointee.cookie, payload: payload, length: length)
        slot.pointee.unsent = SimpleReply.size + (payload == nil ? 0 : length)
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
        isBroken ? nil : replies.next()
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
        isBroken = true
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
        slot.pointee = Slot(cookie: header.cookie)
        return index
    }

    private func release(_ index: Int32) {
        givePayload(index)
        slots[Int(index)].next = freeSlot
        freeSlot = index
        occupied -= 1
    }

    private func givePayload(_ index: Int32) {
        let slot = slots + Int(index)
        guard let payload = slot.pointee.payload else { return }
        buffers.give(payload, length: slot.pointee.payloadLength)
        payloadBytes -= slot.pointee.payloadLength
        slot.pointee.payload = nil
        slot.pointee.payloadLength = 0
    }
}
