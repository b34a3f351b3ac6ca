// IOQueue on io_uring: starting an operation fills a submission entry; one system call a turn
// submits them all, waits, and collects the completions.
//
// 1. An operation in a submission entry is never dropped: when the entries are full they are
//    submitted at once.
// 2. Sends that are done at once, and completions that must be taken from the ring outside of `run`,
//    go to `stash`, and the next `run` delivers them first, without waiting.
// 3. An error of the ring that is not about one operation is kept in `failure`; every `run` from
//    then on throws it.

import CLinux
import Glibc

public final class RingQueue: IOQueue {
    public let name = "io_uring"
    public private(set) var outstanding = 0

    private let ring: OpaquePointer
    private var stash = CompletionList(capacity: 64)
    private var failure: DeviceError?
    /// The last `run` did not enter the kernel, though there may have been reason to.
    private var hasSkipped = false

    private static let entriesAtMost = 4096
    /// How long to wait when the kernel has no memory to take a submission.
    private static let shortagePause: UInt32 = 1000  // microseconds

    /// Throws what `isUnavailable` recognises where io_uring is missing, forbidden or too old.
    public init(entries: Int) throws(DeviceError) {
        var ring: OpaquePointer?
        let result = clinux_ring_open(UInt32(min(max(entries, 1), Self.entriesAtMost)), &ring)
        guard result == 0, let ring else { throw Self.opening(result) }
        self.ring = ring
    }

    deinit {
        clinux_ring_close(ring)
    }

    // MARK: - Availability

    private static func opening(_ result: Int32) -> DeviceError {
        let (code, reason): (Int32, String) =
            switch result {
            case Int32(CLINUX_RING_MISSING_FEATURES), Int32(CLINUX_RING_MISSING_OPERATIONS):
                (ENOSYS, "the kernel's io_uring is too old")
            case -ENOSYS: (ENOSYS, "the kernel has no io_uring")
            case -EPERM, -EACCES:
                (-result, "io_uring is forbidden here (kernel.io_uring_disabled, or a sandbox)")
            case -ENOMEM:
                (ENOMEM, "io_uring gets no memory; raise RLIMIT_MEMLOCK (ulimit -l)")
            default: (-result, SystemError.words(-result))
            }
        return DeviceError(operation: "set up", path: "io_uring", code: code, reason: reason)
    }

    /// Whether an error of `init` means that this system does not offer io_uring.
    static func isUnavailable(_ error: DeviceError) -> Bool {
        switch error.code {
        case ENOSYS, EPERM, EACCES, ENOMEM, EINVAL: true
        default: false
        }
    }

    // MARK: - Starting operations

    // Each tries until a submission entry is free; `makeRoom` gives up only after a failure.

    public func read(
        _ fd: Int32, at offset: UInt64, into memory: UnsafeMutableRawPointer, length: Int,
        tag: UInt64
    ) {
        outstanding += 1
        while !clinux_ring_read(ring, fd, memory, length, offset, tag), makeRoom() {}
    }

    public func write(
        _ fd: Int32, at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, tag: UInt64
    ) {
        outstanding += 1
        while !clinux_ring_write(ring, fd, vectors, count, offset, tag), makeRoom() {}
    }

    public func flush(_ fd: Int32, tag: UInt64) {
        outstanding += 1
        while !clinux_ring_flush(ring, fd, tag), makeRoom() {}
    }

    public func allocate(_ fd: Int32, mode: Int32, at offset: UInt64, length: UInt64, tag: UInt64) {
        outstanding += 1
        while !clinux_ring_allocate(ring, fd, mode, offset, length, tag), makeRoom() {}
    }

    public func accept(_ fd: Int32, tag: UInt64) {
        // The ring would answer -EAGAIN at once instead of waiting.
        let flags = fcntl(fd, F_GETFL)
        if flags >= 0 && flags & O_NONBLOCK != 0 {
            _ = fcntl(fd, F_SETFL, flags & ~O_NONBLOCK)
        }
        outstanding += 1
        while !clinux_ring_accept(ring, fd, tag), makeRoom() {}
    }

    public func receive(
        _ fd: Int32, into memory: UnsafeMutableRawPointer, length: Int, tag: UInt64
    ) {
        outstanding += 1
        while !clinux_ring_receive(ring, fd, memory, length, tag), makeRoom() {}
    }

    public func send(_ fd: Int32, message: UnsafePointer<msghdr>, tag: UInt64) {
        outstanding += 1
        // Nearly always there is room, and the message leaves now: its reader starts that much
        // earlier, and no entry into the kernel is needed to learn that it has gone.
        let result = SocketIO.send(fd, message)
        if result != -EAGAIN {
            stash.append(tag, result)
            return
        }
        while !clinux_ring_send(ring, fd, message, tag), makeRoom() {}
    }

    public func poll(_ fd: Int32, tag: UInt64) {
        outstanding += 1
        while !clinux_ring_poll(ring, fd, tag), makeRoom() {}
    }

    public func timeout(nanoseconds: UInt64, tag: UInt64) {
        outstanding += 1
        while !clinux_ring_timeout(ring, nanoseconds, tag), makeRoom() {}
    }

    public func cancel(_ fd: Int32, target: UInt64, tag: UInt64) {
        outstanding += 1
        while !clinux_ring_cancel(ring, target, tag), makeRoom() {}
    }

    /// The entries are full: submits them. False: the ring has failed, and `run` will say so.
    @inline(never)
    private func makeRoom() -> Bool {
        guard failure == nil else { return false }
        let result = clinux_ring_submit(ring)
        switch -result {
        case ..<0:
            break
        case 0, EINTR, EAGAIN, EBUSY:
            // Too many completions wait, or memory is short: take what is there.
            if !stashCompletions() { usleep(Self.shortagePause) }
        default:
            fail("submit to", -result)
        }
        return failure == nil
    }

    private func stashCompletions() -> Bool {
        let collected = clinux_ring_submit_and_collect(ring)
        var progress = collected > 0
        var tag: UInt64 = 0
        var result: Int32 = 0
        while clinux_ring_take(ring, &tag, &result) {
            stash.append(tag, result)
            progress = true
        }
        return progress
    }

    // MARK: - Running

    public func lookOut(nanoseconds: UInt64) -> Bool {
        !stash.isEmpty || clinux_ring_look_out(ring, nanoseconds)
    }

    public func run(wait: Bool, _ body: (UInt64, Int32) -> Void) throws(DeviceError) {
        // What is stashed may be delivered first; what was started since then can wait for one turn
        // (not for more: a busy connection has something stashed in every turn).
        let skips = !stash.isEmpty && !hasSkipped && failure == nil
        hasSkipped = skips
        let shortage = skips ? false : try enter(wait: wait && stash.isEmpty)
        var delivered = 0
        var tag: UInt64 = 0
        var result: Int32 = 0
        // What arrives by operations that `body` starts waits for the next turn.
        var stashed = stash.count
        while stashed > 0 {
            let completion = stash.removeFirst()
            stashed -= 1
            delivered += 1
            outstanding -= 1
            body(completion.tag, completion.result)
        }
        var ready = clinux_ring_ready(ring)
        while ready > 0, clinux_ring_take(ring, &tag, &result) {
            ready -= 1
            delivered += 1
            outstanding -= 1
            body(tag, result)
        }
        if shortage && delivered == 0 { usleep(Self.shortagePause) }
    }

    /// One system call, or none if it could do nothing. True: the kernel was short of something
    /// and took less than it was given; it is given again in the next turn.
    private func enter(wait: Bool) throws(DeviceError) -> Bool {
        if let failure { throw failure }
        let result: Int32
        if wait {
            assert(outstanding > 0, "waits for ever: nothing is outstanding")
            result = clinux_ring_submit_and_wait(ring)
        } else if clinux_ring_wants_entry(ring) {
            result = clinux_ring_submit_and_collect(ring)
        } else {
            return false
        }
        switch -result {
        case ...0, EINTR: return false
        case EAGAIN, EBUSY: return true
        default:
            throw fail("wait for", -result)
        }
    }

    @discardableResult
    private func fail(_ operation: String, _ code: Int32) -> DeviceError {
        let error = DeviceError(
            operation: operation, path: name, code: code, reason: SystemError.words(code))
        failure = error
        return error
    }
}
