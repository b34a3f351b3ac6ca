// What a finished request is answered with, in the format that was agreed on.
//
//   simple       a simple reply, and the data of a READ behind it
//   structured   READ and BLOCK_STATUS in chunks, the rest simply; errors in chunks, with a text
//   extended     everything in chunks
//
// 1. All data is in memory before the first byte of a reply is queued: the last chunk with content
//    can say DONE.

import NBDProtocol
import ThinPool

extension Transmission {
    func chunkHeader(cookie: UInt64, offset: UInt64) -> ChunkHeader {
        ChunkHeader(extended: format == .extended, cookie: cookie, offset: offset)
    }

    private func chunkHeader(of slot: UnsafeMutablePointer<Slot>) -> ChunkHeader {
        chunkHeader(cookie: slot.pointee.cookie, offset: slot.pointee.offset)
    }

    /// Success; the payload follows if the slot answers with it.
    @inline(__always)
    func reply(_ index: Int32, _ error: WireError) {
        if error != .none && format != .simple { return reply(index, error, error.text) }
        guard let slot = slotToAnswer(index) else { return }
        let length = slot.pointee.payload == nil ? 0 : slot.pointee.payloadLength
        var size = SimpleReply.size
        if format == .simple || (format == .structured && !slot.pointee.answersWithPayload) {
            SimpleReply.write(
                to: replies.appendHeader(size), error: error, cookie: slot.pointee.cookie)
        } else {
            let chunk = chunkHeader(of: slot)
            if length == 0 {
                size = chunk.size
                chunk.writeNone(to: replies.appendHeader(size))
            } else {
                size = chunk.dataSize
                chunk.writeData(
                    to: replies.appendHeader(size), at: slot.pointee.offset, length: length,
                    isLast: true)
            }
        }
        if length > 0 { replies.append(slot.pointee.payload!, length: length) }
        queued(index, bytes: size + length)
    }

    /// An error, and why in words where the format has room for them.
    func reply(_ index: Int32, _ error: WireError, _ text: StaticString) {
        if format == .simple { return reply(index, error) }
        guard let slot = slotToAnswer(index) else { return }
        let chunk = chunkHeader(of: slot)
        let size = chunk.errorSize(text)
        let memory = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 8)
        chunk.writeError(to: memory, error, text)
        slot.pointee.extra = memory
        replies.append(memory, length: size)
        queued(index, bytes: size)
    }

    /// Data and holes of a read, by their offsets.
    func replyWithHoles(_ index: Int32) {
        guard let slot = slotToAnswer(index) else { return }
        let chunk = chunkHeader(of: slot)
        let list = holes! + Int(index)
        list.pointee.sort()
        let payload = slot.pointee.payload!
        let start = slot.pointee.offset
        let end = start + UInt64(slot.pointee.payloadLength)
        let memory = UnsafeMutableRawPointer.allocate(
            byteCount: list.pointee.count * (chunk.holeSize + chunk.dataSize) + chunk.dataSize,
            alignment: 8)
        slot.pointee.extra = memory
        var header = memory
        var bytes = 0
        var cursor = start
        func addData(to limit: UInt64) {
            guard cursor < limit else { return }
            let length = Int(limit - cursor)
            chunk.writeData(to: header, at: cursor, length: length, isLast: limit == end)
            replies.append(header, length: chunk.dataSize)
            replies.append(payload + Int(cursor - start), length: length)
            header += chunk.dataSize
            bytes += chunk.dataSize + length
        }
        for place in 0..<list.pointee.count {
            let hole = list.pointee[place]
            addData(to: hole.offset)
            cursor = hole.offset + hole.length
            chunk.writeHole(
                to: header, at: hole.offset, length: Int(hole.length), isLast: cursor == end)
            replies.append(header, length: chunk.holeSize)
            header += chunk.holeSize
            bytes += chunk.holeSize
        }
        addData(to: end)
        precondition(cursor <= end, "a hole beyond the request")
        if bytes == chunk.holeSize { givePayload(index) }
        queued(index, bytes: bytes)
    }

    /// The status of a range, in the buffer that was taken for it.
    func reply(_ index: Int32, _ query: StatusQuery) {
        guard let slot = slotToAnswer(index) else { return }
        let chunk = chunkHeader(of: slot)
        let memory = slot.pointee.payload!
        let size = query.write(to: memory, chunk)
        precondition(size <= slot.pointee.payloadLength, "more extents than were asked for")
        replies.append(memory, length: size)
        queued(index, bytes: size)
    }
}

extension WireError {
    /// What a client's user can make of it.
    fileprivate var text: StaticString {
        switch self {
        case .noSpace: "the pool is full"
        case .notPermitted: "the volume or the pool is read-only"
        case .inputOutput: "the pool's device failed, or the pool has: see the server's log"
        case .noMemory: "out of memory"
        default: "the request could not be carried out"
        }
    }
}
