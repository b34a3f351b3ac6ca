// What one connection has to send: replies are gathered while a message is under way and leave
// together in the next one.
//
// 1. Two batches: one is filled, the other belongs to the kernel until it has been sent whole.
// 2. The bytes of a reply follow each other in one batch.
// 3. Each reply in a batch is a slot of the connection, in order; its memory lives until the last
//    of its bytes has been sent.
// 4. A message has a bounded length, whatever is there to send: a reader that keeps up with the
//    copying would otherwise keep the reactor at it for as long as that lasts.

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
    /// Bytes of all vectors that have not been sent.
    var unsent = 0

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
        unsent += length
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
        unsent = 0
    }
}

struct ReplyQueue: ~Copyable {
    private var filling: Batch
    private var sending: Batch
    private let message: UnsafeMutablePointer<msghdr>
    /// The vectors of a message that ends within a long one.
    private let cut: UnsafeMutablePointer<iovec>
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
        cut = .allocate(capacity: 2)
        cut.initialize(repeating: iovec(), count: 2)
    }

    deinit {
        filling.headers.deallocate()
        filling.vectors.deallocate()
        sending.headers.deallocate()
        sending.vectors.deallocate()
        message.deallocate()
        cut.deallocate()
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
            filling.unsent += size
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

    /// The message to send next: the rest of the one under way, else what was gathered, of either no
    /// more than `longest` bytes; nil: nothing. Valid until `advance`.
    mutating func next(atMost longest: Int) -> UnsafePointer<msghdr>? {
        if sending.vectorCount == 0 {
            guard filling.vectorCount > 0 else { return nil }
            swap(&filling, &sending)
        }
        message.pointee.msg_iov = sending.vectors + sending.firstVector
        message.pointee.msg_iovlen = min(
            sending.vectorCount - sending.firstVector, Self.mostVectors)
        if sending.unsent > longest { shorten(to: longest) }
        return UnsafePointer(message)
    }

    /// Leaves of the message what is not too long: whole vectors, or a part of the first or, so
    /// that its header does not leave alone, of the second.
    private func shorten(to longest: Int) {
        let vectors = message.pointee.msg_iov!
        var room = longest
        var count = 0
        while count < message.pointee.msg_iovlen, vectors[count].iov_len <= room {
            room -= vectors[count].iov_len
            count += 1
        }
        if count < 2, room > 0 {
            cut.update(from: vectors, count: count + 1)
            cut[count].iov_len = room
            message.pointee.msg_iov = cut
            count += 1
        }
        message.pointee.msg_iovlen = count
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
            sending.unsent -= part
            if vector.pointee.iov_len == 0 { sending.firstVector += 1 }
        }
        if sending.firstVector == sending.vectorCount { sending.clear() }
    }
}
