// The completion queue of one thread, for sockets and files alike, and the choice between its two
// implementations: RingQueue (io_uring) and PollQueue (epoll, with file I/O done at submission).

import CLinux
import Glibc

/// Starts operations and delivers their completions, on one thread.
///
/// 1. A queue belongs to the thread that made it: every call, and the release, is made there.
/// 2. Every operation is delivered exactly once, by a later `run`, never from within the call that
///    started it. Any number may be outstanding, whatever the queue's number of entries.
/// 3. Operations are independent: they complete in any order. At most one receive and one send at
///    a time on a socket keep its bytes in order.
/// 4. Memory given to an operation (buffers, iovec arrays, msghdr and all it points to) stays in
///    place until its completion has been delivered.
///
/// **Descriptors** are in blocking mode (`O_NONBLOCK` off), as `accept` here makes them; listening
/// sockets may come in either. Different kinds of queue do not share a listening socket.
///
/// **Closing.** Closing a descriptor does not end what is outstanding on it. So: `shutdown(2)`
/// with SHUT_RDWR first; then the outstanding operations complete (a receive with 0 or what was
/// still in the socket, a send with -EPIPE, an accept with -EINVAL); when the last one has been
/// delivered, `close(2)`. What waits on an eventfd ends by making that readable.
///
/// **Releasing** a queue gives up what is outstanding without delivering it. That is safe for
/// accepts, polls and timeouts only: the kernel might still use the memory of the others.
public protocol IOQueue: AnyObject {
    /// "io_uring" or "poll", for the log.
    var name: String { get }
    /// Operations started and not yet delivered.
    var outstanding: Int { get }

    /// Reads a file or block device. Result: bytes, fewer at the end of the file.
    func read(
        _ fd: Int32, at offset: UInt64, into memory: UnsafeMutableRawPointer, length: Int,
        tag: UInt64)
    /// Writes a file or block device, at most 1024 vectors. Result: bytes; fewer than given only if
    /// the rest did not fit.
    func write(
        _ fd: Int32, at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, tag: UInt64)
    /// fdatasync. Covers the writes delivered before it was started, no others.
    func flush(_ fd: Int32, tag: UInt64)
    /// fallocate with one of `AllocateMode`.
    func allocate(_ fd: Int32, mode: Int32, at offset: UInt64, length: UInt64, tag: UInt64)
    /// Result: a new descriptor, closed on exec. May be -EAGAIN or -ECONNABORTED: ask again.
    func accept(_ fd: Int32, tag: UInt64)
    /// Result: bytes, 0 when the other side has ended.
    func receive(
        _ fd: Int32, into memory: UnsafeMutableRawPointer, length: Int, tag: UInt64)
    /// Result: bytes, which may be fewer than given. Never raises SIGPIPE.
    func send(_ fd: Int32, message: UnsafePointer<msghdr>, tag: UInt64)
    /// Waits until a descriptor is readable, once. Result: the poll(2) events.
    func poll(_ fd: Int32, tag: UInt64)
    /// Result: -ETIME, not earlier than asked for; PollQueue up to a millisecond later.
    func timeout(nanoseconds: UInt64, tag: UInt64)

    /// Ends the receive or accept of tag `target` on the descriptor, if it still waits: it is then
    /// delivered with -ECANCELED, with nothing taken from the descriptor. If it has its result
    /// already, that is delivered. Result: 0, or an error that says nothing.
    func cancel(_ fd: Int32, target: UInt64, tag: UInt64)

    /// Looks for completions for at most so long, without sleeping. True if `run` would deliver
    /// something, or something has happened that it has to look at. Submits nothing.
    func lookOut(nanoseconds: UInt64) -> Bool

    /// Submits what was started, waits until there is a completion (if `wait`), and calls `body`
    /// with the tag and result (bytes or -errno) of everything that has completed. `body` may
    /// start operations, and may not call `run`. May return without a completion (a signal). What
    /// is known to have completed already may be delivered first; the next call submits then.
    /// With `wait` and nothing outstanding it would wait for ever.
    ///
    /// An error is final: the queue itself does not work any more.
    func run(wait: Bool, _ body: (UInt64, Int32) -> Void) throws(DeviceError)
}

/// The environment variable that forces PollQueue when its value is "poll": for containers that
/// forbid io_uring in unusual ways, and for tests.
private let queueVariable = "WAFER_IO"

/// Makes a queue for the calling thread: io_uring where the kernel has and allows it, else epoll,
/// with the reason in words. `entries`: operations that are submitted at once, a power of two.
public func makeIOQueue(
    entries: Int, allowRing: Bool = true
) throws(DeviceError) -> (any IOQueue, fallbackReason: String?) {
    if !allowRing {
        return (try PollQueue(), fallbackReason: "io_uring is turned off")
    }
    if let choice = getenv(queueVariable), String(cString: choice) == "poll" {
        return (try PollQueue(), fallbackReason: "\(queueVariable)=poll is set")
    }
    do throws(DeviceError) {
        return (try RingQueue(entries: entries), fallbackReason: nil)
    } catch {
        guard RingQueue.isUnavailable(error) else { throw error }
        return (try PollQueue(), fallbackReason: error.description)
    }
}
