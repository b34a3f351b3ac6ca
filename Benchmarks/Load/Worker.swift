// One connection under load: receive what there is, take every reply in it, and send the requests
// that follow in one piece. The clock is read once a batch: what a batch received ended then, and
// what it sends begins then.
//
// Sending never blocks, so that a server which waits for its replies to be read cannot be waited
// for in turn.

import Glibc
import NBDProtocol

/// What all connections do.
struct Load {
    var operation: Operation
    var blockSize: Int
    var depth: Int
    var connections: Int
    /// Bytes of the volume that are used.
    var size: UInt64
    var seed: UInt64
}

func nanoseconds() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
}

struct Worker: ~Copyable {
    /// Receives at most so much at once: what fits a processor's cache.
    private static let bufferSize = 256 << 10
    private static let errorPosition = 4
    private static let cookiePosition = 8

    private let socket: Int32
    private let isWriteAndFlush: Bool
    private let replyPayload: Int
    private let depth: Int
    private var offsets: Offsets
    private var requests: Requests
    private var histogram = Histogram()
    private let buffer: UnsafeMutableRawPointer
    /// When each slot's request was sent, and whether that slot waits for a flush.
    private let sentAt: UnsafeMutablePointer<UInt64>
    private let isFlushing: UnsafeMutablePointer<Bool>

    private var buffered = 0
    /// Payload bytes still to be skipped, of the reply to this slot.
    private var toSkip = 0
    private var skippingSlot = 0
    private var underWay = 0
    private var toBegin: UInt64
    private var deadline: UInt64 = 0
    private var now: UInt64 = 0

    /// - Parameter requests: ends after so many, if not before.
    init(_ load: Load, connection: Int, socket: Int32, requests: UInt64) {
        self.socket = socket
        isWriteAndFlush = load.operation == .writeAndFlush
        replyPayload = load.operation.command == .read ? load.blockSize : 0
        depth = load.depth
        toBegin = requests
        offsets = Offsets(
            load.operation, size: load.size, blockSize: load.blockSize, connection: connection,
            connections: load.connections, seed: load.seed)
        self.requests = Requests(
            load.operation, blockSize: load.blockSize, depth: load.depth,
            seed: load.seed &+ UInt64(connection))
        buffer = .allocate(byteCount: Self.bufferSize, alignment: 4096)
        sentAt = .allocate(capacity: load.depth)
        sentAt.initialize(repeating: 0, count: load.depth)
        isFlushing = .allocate(capacity: load.depth)
        isFlushing.initialize(repeating: false, count: load.depth)
    }

    deinit {
        buffer.deallocate()
        sentAt.deallocate()
        isFlushing.deallocate()
    }

    /// Until the deadline or the number of requests is reached, and all are answered.
    /// - Returns: the latencies, one for each request.
    consuming func run(until deadline: UInt64) throws -> Histogram {
        self.deadline = deadline
        now = nanoseconds()
        for slot in 0..<depth {
            underWay += 1
            begin(slot)
        }
        while underWay > 0 {
            try requests.send(to: socket)
            try receive()
            now = nanoseconds()
            try takeReplies()
        }
        return histogram
    }

    /// Sends the slot's next request, or leaves the slot alone for good.
    @inline(__always)
    private mutating func begin(_ slot: Int) {
        guard toBegin > 0, now < deadline else {
            underWay -= 1
            return
        }
        toBegin -= 1
        sentAt[slot] = now
        requests.add(slot, offset: offsets.take())
    }

    @inline(__always)
    private mutating func end(_ slot: Int) {
        if isWriteAndFlush {
            isFlushing[slot].toggle()
            if isFlushing[slot] {
                requests.addFlush(slot)
                return
            }
        }
        histogram.record(nanoseconds: now - sentAt[slot])
        begin(slot)
    }

    private mutating func receive() throws {
        while true {
            var flags: Int32 = 0
            if !requests.isEmpty {
                flags = Int32(MSG_DONTWAIT)
                var event = pollfd(fd: socket, events: Int16(POLLIN | POLLOUT), revents: 0)
                poll(&event, 1, -1)
                if event.revents & Int16(POLLIN) == 0 {
                    try requests.send(to: socket)
                    continue
                }
            }
            let count = recv(socket, buffer + buffered, Self.bufferSize - buffered, flags)
            if count > 0 {
                buffered += count
                return
            }
            if count == 0 { throw LoadFailure("the server hung up") }
            guard errno == EINTR || errno == EAGAIN else {
                throw LoadFailure("cannot receive: \(String(cString: strerror(errno)))")
            }
        }
    }

    /// Takes what is whole out of the buffer, and keeps the beginning of a header.
    private mutating func takeReplies() throws {
        var at = 0
        if toSkip > 0 {
            at = min(toSkip, buffered)
            toSkip -= at
            if toSkip == 0 { end(skippingSlot) }
        }
        while toSkip == 0 && buffered - at >= SimpleReply.size {
            let slot = try slot(ofReply: buffer + at)
            at += SimpleReply.size
            let count = min(replyPayload, buffered - at)
            at += count
            if count < replyPayload {
                toSkip = replyPayload - count
                skippingSlot = slot
            } else {
                end(slot)
            }
        }
        buffered -= at
        if buffered > 0 { buffer.copyMemory(from: buffer + at, byteCount: buffered) }
    }

    @inline(__always)
    private func slot(ofReply reply: UnsafeMutableRawPointer) throws -> Int {
        let magic = UInt32(bigEndian: reply.loadUnaligned(as: UInt32.self))
        let error = reply.loadUnaligned(fromByteOffset: Self.errorPosition, as: UInt32.self)
        let cookie = reply.loadUnaligned(fromByteOffset: Self.cookiePosition, as: UInt64.self)
        guard magic == Magic.simpleReply, error == 0, cookie < UInt64(depth) else {
            throw broken(magic, UInt32(bigEndian: error), cookie)
        }
        return Int(cookie)
    }

    private func broken(_ magic: UInt32, _ error: UInt32, _ cookie: UInt64) -> LoadFailure {
        if magic != Magic.simpleReply {
            return LoadFailure("a reply begins with 0x\(String(magic, radix: 16))")
        }
        return error == 0
            ? LoadFailure("a reply to no request of this connection: cookie \(cookie)")
            : LoadFailure("the server answers with error \(error)")
    }
}
