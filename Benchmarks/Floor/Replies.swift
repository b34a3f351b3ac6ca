// The replies to a batch of requests, sent with one sendmsg.

import Foundation
import NBDProtocol

struct Replies: ~Copyable {
    /// Two pieces each, a header and data, and 1024 are the most that one sendmsg takes.
    private static let atMost = 512

    private let socket: Int32
    private let headers: UnsafeMutableRawPointer
    private let pieces: UnsafeMutablePointer<iovec>
    private var count = 0
    private var pieceCount = 0

    init(socket: Int32) {
        self.socket = socket
        headers = .allocate(byteCount: Self.atMost * SimpleReply.size, alignment: 16)
        pieces = .allocate(capacity: 2 * Self.atMost)
    }

    deinit {
        headers.deallocate()
        pieces.deallocate()
    }

    var isFull: Bool { count == Self.atMost }

    /// Headers that follow one another are one piece.
    @inline(__always)
    mutating func add(cookie: UInt64) {
        let header = headers + count * SimpleReply.size
        count += 1
        SimpleReply.write(to: header, error: .none, cookie: cookie)
        if pieceCount > 0 {
            let last = pieces[pieceCount - 1]
            if last.iov_base + last.iov_len == header {
                pieces[pieceCount - 1].iov_len += SimpleReply.size
                return
            }
        }
        add(header, SimpleReply.size)
    }

    @inline(__always)
    mutating func add(cookie: UInt64, data: UnsafeMutableRawPointer, _ length: Int) {
        add(cookie: cookie)
        add(data, length)
    }

    @inline(__always)
    private mutating func add(_ bytes: UnsafeMutableRawPointer, _ length: Int) {
        pieces[pieceCount] = iovec(iov_base: bytes, iov_len: length)
        pieceCount += 1
    }

    mutating func send() throws {
        var first = 0
        while first < pieceCount {
            var message = msghdr()
            message.msg_iov = pieces + first
            message.msg_iovlen = pieceCount - first
            var sent = sendmsg(socket, &message, Int32(MSG_NOSIGNAL))
            if sent < 0 {
                if errno == EINTR { continue }
                throw FloorFailure("cannot send: \(String(cString: strerror(errno)))")
            }
            while first < pieceCount && sent >= pieces[first].iov_len {
                sent -= pieces[first].iov_len
                first += 1
            }
            if first < pieceCount {
                pieces[first].iov_base += sent
                pieces[first].iov_len -= sent
            }
        }
        count = 0
        pieceCount = 0
    }
}
