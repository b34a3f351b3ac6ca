// What one connection has to send: replies are gathered while a message is under way and leave
// together in the next one.
//
// 1. Two batches: one is filled, the other belongs to the kernel until it has been sent whole.
// 2. A reply's header and its payload are in the same message.
// 3. Each reply in a batch is a slot of the connection, in order; its payload lives until the last
//    of its bytes has been sent.

import Glibc
import NBDProtocol

/// A message in the making or under way.
private struct Batch {
    var headers: UnsafeMutableRawPointer
    var vectors: UnsafeMutablePointer<iovec>
    var replyCount = 0
    var vectorCount = 0
    /// Where the first unsent vector is.
    var firstVector = 0
    /// The last vector is a run of headers, which the next header extends.
    var endsWithHeader = false

    init(replies: Int) {
        headers = .allocate(byteCount: replies * SimpleReply.size, alignment: 16)
        vectors = .allocate(capacity: replies * 2)
    }

    mutating func clear() {
        replyCount = 0
        vectorCount = 0
        firstVector = 0
        endsWithHeader = false
    }
}

struct ReplyQueue: ~Copyable {
    private var filling: Batch
    private var sending: Batch
    private let message: UnsafeMutablePointer<msghdr>
    private let capacity: Int

    init(capacity: Int) {
        self.capacity = capacity
        filling = Batch(replies: capacity)
        sending = Batch(replies: capacity)
        message = .allocate(capacity: 1)
        message.initialize(to: msghdr())
    }

    deinit {
        filling.headers.deallocate()
        filling.vectors.deallocate()
        sending.headers.deallocate()
        sending.vectors.deallocate()
        message.deallocate()
    }

    var isEmpty: Bool { filling.replyCount == 0 && sending.replyCount == 0 }

    /// - Precondition: fewer than `capacity` replies are in the queue.
    mutating func append(
        error: WireError, cookie: UInt64, payload: UnsafeMutableRawPointer?, length: Int
    ) {
        precondition(filling.replyCount < capacity)
        let header = filling.headers + filling.replyCount * SimpleReply.size
        SimpleReply.write(to: header, error: error, cookie: cookie)
        filling.replyCount += 1
        // Headers without payload are neighbours in memory: one vector for a run of them.
        if filling.endsWithHeader {
            filling.vectors[filling.vectorCount - 1].iov_len += SimpleReply.size
        } else {
            filling.vectors[filling.vectorCount] = iovec(
                iov_base: header, iov_len: SimpleReply.size)
            filling.vectorCount += 1
            filling.endsWithHeader = true
        }
        if let payload {
            filling.vectors[filling.vectorCount] = iovec(iov_base: payload, iov_len: length)
            filling.vectorCount += 1
            filling.endsWithHeader = false
        }
    }

    /// The message to send next: the rest of the one under way, else what was gathered; nil:
    /// nothing. Valid until `advance`.
    mutating func next() -> UnsafePointer<msghdr>? {
        if sending.replyCount == 0 {
            guard filling.replyCount > 0 else { return nil }
            swap(&filling, &sending)
        }
        message.pointee.msg_iov = sending.vectors + sending.firstVector
        message.pointee.msg_iovlen = sending.vectorCount - sending.firstVector
        return UnsafePointer(message)
    }

    /// `count` bytes of the message have been sent.
    mutating func advance(_ count: Int) {
        var count = count
        while count > 0 {
            precondition(sending.firstVector < sending.vectorCount, "more sent than there was")
            let vector = sending.vectors + sending.firstVector
            let part = min(count, vector.pointee.iov_len)
            vector.pointee.iov_base += part
            vector.pointee.iov_len -= part
            count -= part
            if vector.pointee.iov_len == 0 { sending.firstVector += 1 }
        }
        if sending.firstVector == sending.vectorCount { sending.clear() }
    }
}
