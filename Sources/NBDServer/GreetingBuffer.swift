// The bytes of one handshake: what has been received and not yet taken, and the one message that is
// on its way to the client.

import Glibc

final class GreetingBuffer {
    /// Enough for any option that a client sends; longer ones arrive in pieces.
    private static let capacity = 4096

    private let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: capacity, alignment: 16)
    private var start = 0
    private var end = 0

    /// In place while the message is under way.
    private var output: UnsafeMutableRawBufferPointer?
    private let message = UnsafeMutablePointer<msghdr>.allocate(capacity: 1)
    private let vector = UnsafeMutablePointer<iovec>.allocate(capacity: 1)

    init() {
        vector.initialize(to: iovec())
        message.initialize(to: msghdr())
        message.pointee.msg_iov = vector
        message.pointee.msg_iovlen = 1
    }

    deinit {
        memory.deallocate()
        output?.deallocate()
        message.deallocate()
        vector.deallocate()
    }

    // MARK: - Received

    var input: UnsafeRawBufferPointer {
        UnsafeRawBufferPointer(rebasing: memory[start..<end])
    }

    /// Where more goes.
    var space: UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(rebasing: memory[end...])
    }

    func received(_ count: Int) { end += count }

    /// What another server had received, and not taken.
    func receive(_ bytes: [UInt8]) {
        precondition(bytes.count <= space.count, "more than a greeting's input")
        space.copyBytes(from: bytes)
        end += bytes.count
    }

    func take(_ count: Int) {
        start += count
        if start == end { (start, end) = (0, 0) }
    }

    func takeAll() { take(end - start) }

    // MARK: - Sent

    var isSending: Bool { output != nil }

    var nextMessage: UnsafePointer<msghdr>? { isSending ? UnsafePointer(message) : nil }

    /// - Precondition: nothing is under way.
    func send(_ bytes: [UInt8]) {
        precondition(!isSending, "two messages at once")
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 16)
        memory.copyBytes(from: bytes)
        output = memory
        vector.pointee = iovec(iov_base: memory.baseAddress, iov_len: memory.count)
    }

    /// True: the whole message has been sent.
    func sent(_ count: Int) -> Bool {
        vector.pointee.iov_base += count
        vector.pointee.iov_len -= count
        guard vector.pointee.iov_len == 0 else { return false }
        output!.deallocate()
        output = nil
        return true
    }
}
