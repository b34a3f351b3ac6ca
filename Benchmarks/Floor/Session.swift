// The transmission of one connection: receive what there is, carry out every request in it, and
// send all replies at once. Data goes straight from the memory to the socket; the payload of a long
// write goes straight from the socket to the memory.

import Foundation
import NBDProtocol

struct Session: ~Copyable {
    private static let bufferSize = 256 << 10
    /// After a write of this length the next receives into the memory and, behind it, one header.
    private static let longWrite = 32 << 10

    private let socket: Int32
    private let memory: Memory
    private let buffer: UnsafeMutableRawPointer
    private var buffered = 0
    private var replies: Replies
    /// The part of a write's payload that has not arrived.
    private var missing = 0
    private var missingAt: UnsafeMutableRawPointer
    private let rules: RequestRules
    private var writing: RequestHeader?
    private var isLong = false

    init(socket: Int32, memory: Memory) {
        self.socket = socket
        self.memory = memory
        rules = RequestRules(exportSize: UInt64(memory.size), isReadOnly: false)
        buffer = .allocate(byteCount: Self.bufferSize, alignment: 4096)
        missingAt = buffer
        replies = Replies(socket: socket)
    }

    deinit { buffer.deallocate() }

    /// Until the client leaves.
    consuming func run() throws {
        while try receive() {
            guard try takeRequests() else { return }
            try replies.send()
        }
    }

    /// What is missing of a write, and what follows; false at the end of the connection.
    private mutating func receive() throws -> Bool {
        let room = missing > 0 && isLong ? RequestHeader.size : Self.bufferSize - buffered
        var parts = (
            iovec(iov_base: missingAt, iov_len: missing),
            iovec(iov_base: buffer + buffered, iov_len: room)
        )
        let count = withUnsafeMutableBytes(of: &parts) { parts in
            var message = msghdr()
            message.msg_iov = parts.baseAddress!.assumingMemoryBound(to: iovec.self)
            message.msg_iovlen = 2
            return recvmsg(socket, &message, 0)
        }
        if count < 0 {
            if errno == EINTR { return true }
            throw FloorFailure("cannot receive: \(String(cString: strerror(errno)))")
        }
        let arrived = min(count, missing)
        missing -= arrived
        missingAt += arrived
        buffered += count - arrived
        return count > 0
    }

    /// Carries out what is whole in the buffer; false if the client leaves.
    private mutating func takeRequests() throws -> Bool {
        guard missing == 0 else { return true }
        if let header = writing {
            replies.add(cookie: header.cookie)
            writing = nil
        }
        var at = 0
        while buffered - at >= RequestHeader.size {
            guard let header = RequestHeader.parse(buffer + at),
                case .perform(let command) = rules.verdict(header)
            else { throw FloorFailure("a request that is not valid") }
            at += RequestHeader.size
            let place = memory.place(of: header.offset)
            let length = Int(header.length)
            switch command {
            case .read:
                if replies.isFull { try replies.send() }
                replies.add(cookie: header.cookie, data: place, length)
                continue
            case .write:
                let count = min(length, buffered - at)
                place.copyMemory(from: buffer + at, byteCount: count)
                at += count
                isLong = length >= Self.longWrite
                if count < length {
                    missing = length - count
                    missingAt = place + count
                    writing = header
                    buffered = 0
                    return true
                }
            case .writeZeroes: memory.zero(header.offset, length)
            case .flush, .trim, .cache, .blockStatus: break
            case .disconnect: return false
            }
            if replies.isFull { try replies.send() }
            replies.add(cookie: header.cookie)
        }
        buffered -= at
        if buffered > 0 { buffer.copyMemory(from: buffer + at, byteCount: buffered) }
        return true
    }
}
