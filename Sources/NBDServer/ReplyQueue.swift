// What one connection has to send: replies are gathered while a message is under way and leave
// together in the next one.
//
// 1. Two batches: one is filled, the other belongs to the kernel until it has been sent whole.
// 2. The bytes of a reply follow each other in one batch.
// 3. Each reply in a batch is a slot of the connection, in order; its memory lives until the last
//    of its bytes has been sent.

import Glibc

/// A message in the making or under way.
private struct Batch {
    let headers: UnsafeMutableRawPointer
    var headerBytes = 0
    var vectors: UnsafeMutablePointer<iovec>
    var vectorCount = 0
    var vectorCapacity: Int
    /// Where the first unsent vector is.
    var firstVector = 0
    /// The last vector is a run of headers, which the next header extends.
    var endsWithHeader = false

    init(headerCapacity: Int, vectorCapacity: Int) {
        headers = .allocate(byteCount: headerCapacity, alignment: 16)
        self.vectorCapacity = vectorCapacity
        vectors = .allocate(capacity: vectorCapacity)
    }

    mutating func append(_ memory: UnsafeMutableRawPointer, _ length: Int) {
        if vectorCount == vectorCapacity { grow() }
        vectors[vectorCount] = iovec(iov_base: memory, iov_len: length)
        vectorCount += 1
        endsWithHeader = false
    }

    /// Only replies of many pieces come here.
    private mutating func grow() {
        let larger = UnsafeMutablePointer<iovec>.allocate(capacity: vectorCapacity * 2)
        larger.update(from: vectors, count: vectorCount)
        vectors.deallocate()
        vectors = larger
        vectorCapacity *= 2
    }

    mutating func clear() {
        headerBytes = 0
        vectorCount = 0
        firstVector = 0
        endsWithHeader = false
    }
}

struct ReplyQueue: ~Copyable {
    private var filling: Batch
    private var sending: Batch
    private let message: UnsafeMutablePointer<msghdr>
    private let headerCapacity: Int

    /// The longest header that `appendHeader` has room for.
    static let longestHeader = 40
    /// Linux takes no more vectors at once (UIO_MAXIOV).
    private static let mostVectors = 1024

    init(capacity: Int) {
        headerCapacity = capacity * Self.longestHeader
        filling = Batch(headerCapacity: headerCapacity, vectorCapacity: capacity * 2)
        sending = Batch(headerCapacity: headerCapacity, vectorCapacity: capacity * 2)
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

    var isEmpty: Bool { filling.vectorCount == 0 && sending.vectorCount == 0 }

    /// Memory for a header, which the caller fills at once.
    /// - Precondition: fewer than `capacity` replies are in the queue; this is the reply's only one.
    mutating func appendHeader(_ size: Int) -> UnsafeMutableRawPointer {
        precondition(filling.headerBytes + size <= headerCapacity, "more replies than slots")
        let header = filling.headers + filling.headerBytes
        filling.headerBytes += size
        // Headers without payload are neighbours in memory: one vector for a run of them.
        if filling.endsWithHeader {
            filling.vectors[filling.vectorCount - 1].iov_len += size
        } else {
            filling.append(header, size)
            filling.endsWithHeader = true
        }
        return header
    }

    /// Bytes that stay where they are until they have been sent.
    mutating func append(_ memory: UnsafeMutableRawPointer, length: Int) {
        filling.append(memory, length)
    }

    /// The message to send next: the rest of the one under way, else what was gathered; nil:
    /// nothing. Valid until `advance`.
    mutating func next() -> UnsafePointer<msghdr>? {
        if sending.vectorCount == 0 {
            guard filling.vectorCount > 0 else { return nil }
            swap(&filling, &sending)
        }
        message.pointee.msg_iov = sending.vectors + sending.firstVector
        message.pointee.msg_iovlen = min(
            sending.vectorCount - sending.firstVector, Self.mostVectors)
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
