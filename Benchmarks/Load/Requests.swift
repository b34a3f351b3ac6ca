// A connection's requests, prepared in memory: each slot holds a whole request, payload included,
// of which only the offset changes. What is to be sent is a list of pieces of that memory, and
// slots that follow one another are one piece.

import Glibc
import NBDProtocol

struct Requests: ~Copyable {
    /// Pieces that one sendmsg takes at most.
    private static let piecesAtOnce = 1024
    private static let offsetPosition = 16

    private let memory: UnsafeMutableRawPointer
    private let stride: Int
    private let requestLength: Int
    private let pieces: UnsafeMutablePointer<iovec>
    private let capacity: Int
    private var first = 0
    private var count = 0

    init(_ operation: Operation, blockSize: Int, depth: Int, seed: UInt64) {
        requestLength = RequestHeader.size + (operation.command == .write ? blockSize : 0)
        stride = requestLength + (operation == .writeAndFlush ? RequestHeader.size : 0)
        memory = .allocate(byteCount: stride * depth, alignment: 4096)
        capacity = 2 * depth
        pieces = .allocate(capacity: capacity)

        var random = SplitMix64(seed: seed)
        for slot in 0..<depth {
            let request = memory + slot * stride
            Self.write(operation.command, length: blockSize, cookie: slot, to: request)
            var at = RequestHeader.size
            while at < requestLength {  // no zeroes: some servers would not store them
                var word = random.next()
                let length = min(8, requestLength - at)
                (request + at).copyMemory(from: &word, byteCount: length)
                at += length
            }
            if operation == .writeAndFlush {
                Self.write(.flush, length: 0, cookie: slot, to: request + requestLength)
            }
        }
    }

    deinit {
        memory.deallocate()
        pieces.deallocate()
    }

    private static func write(
        _ command: Command, length: Int, cookie: Int, to bytes: UnsafeMutableRawPointer
    ) {
        func put(_ word: some FixedWidthInteger, at offset: Int) {
            withUnsafeBytes(of: word) {
                (bytes + offset).copyMemory(from: $0.baseAddress!, byteCount: $0.count)
            }
        }
        put(Magic.request.bigEndian, at: 0)
        put(UInt16(0), at: 4)
        put(command.rawValue.bigEndian, at: 6)
        put(UInt64(cookie), at: 8)
        put(UInt64(0), at: offsetPosition)
        put(UInt32(length).bigEndian, at: 24)
    }

    // MARK: - Sending

    var isEmpty: Bool { first == count }

    /// Queues the slot's request.
    @inline(__always)
    mutating func add(_ slot: Int, offset: UInt64) {
        let request = memory + slot * stride
        request.storeBytes(
            of: offset.bigEndian, toByteOffset: Self.offsetPosition, as: UInt64.self)
        add(request, requestLength)
    }

    /// Queues the flush that follows the slot's write.
    mutating func addFlush(_ slot: Int) {
        add(memory + slot * stride + requestLength, RequestHeader.size)
    }

    @inline(__always)
    private mutating func add(_ bytes: UnsafeMutableRawPointer, _ length: Int) {
        if count > first {
            let last = pieces[count - 1]
            if last.iov_base + last.iov_len == bytes {
                pieces[count - 1].iov_len += length
                return
            }
        }
        if count == capacity { makeRoom() }
        pieces[count] = iovec(iov_base: bytes, iov_len: length)
        count += 1
    }

    private mutating func makeRoom() {
        pieces.update(from: pieces + first, count: count - first)
        count -= first
        first = 0
    }

    /// Sends as much as the socket takes now.
    mutating func send(to socket: Int32) throws {
        while !isEmpty {
            var message = msghdr()
            message.msg_iov = pieces + first
            message.msg_iovlen = min(count - first, Self.piecesAtOnce)
            let flags = Int32(MSG_NOSIGNAL | MSG_DONTWAIT)
            let sent = sendmsg(socket, &message, flags)
            if sent < 0 {
                if errno == EINTR { continue }
                if errno == EAGAIN { return }
                throw LoadFailure("cannot send: \(String(cString: strerror(errno)))")
            }
            advance(by: sent)
        }
        first = 0
        count = 0
    }

    private mutating func advance(by sent: Int) {
        var sent = sent
        while sent > 0 {
            let length = min(sent, pieces[first].iov_len)
            sent -= length
            pieces[first].iov_base += length
            pieces[first].iov_len -= length
            if pieces[first].iov_len == 0 { first += 1 }
        }
    }
}
