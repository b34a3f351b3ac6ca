// IOQueue without io_uring: file operations are done when they are started, socket operations are
// tried and wait in epoll where they would block. Slower (a slow disk holds up the whole thread),
// with the same results.
//
// 1. `completed` holds what is done and not delivered. Nothing is delivered but from `run`.
// 2. An operation that would block is in its descriptor's list in `waiting`, and the descriptor is
//    armed in epoll, one shot, for the directions whose lists are not empty.
// 3. A descriptor's event is answered by trying its operations until one would block again, so a
//    descriptor is never armed for something that is not waited for: no busy loop.

import CLinux
import Glibc

public final class PollQueue: IOQueue {
    public let name = "poll"
    public private(set) var outstanding = 0

    private let epoll: OwnedDescriptor
    private let events: UnsafeMutablePointer<clinux_event>
    private var completed = CompletionList(capacity: 256)
    private var waiting = WaitingOperations()
    private var deadlines = DeadlineHeap()

    public init() throws(DeviceError) {
        let raw = clinux_epoll_create()
        guard raw >= 0 else {
            throw DeviceError(
                operation: "set up", path: "epoll", code: -raw, reason: SystemError.words(-raw))
        }
        epoll = OwnedDescriptor(raw)
        events = .allocate(capacity: Int(CLINUX_EVENTS_AT_MOST))
    }

    deinit {
        events.deallocate()
    }

    private func complete(_ tag: UInt64, _ result: Int32) {
        completed.append(tag, result)
    }

    // MARK: - Files: done at once

    public func read(
        _ fd: Int32, at offset: UInt64, into memory: UnsafeMutableRawPointer, length: Int,
        tag: UInt64
    ) {
        outstanding += 1
        complete(tag, FileIO.read(fd, at: offset, into: memory, length: length))
    }

    public func write(
        _ fd: Int32, at offset: UInt64, vectors: UnsafePointer<iovec>, count: Int, tag: UInt64
    ) {
        outstanding += 1
        complete(tag, FileIO.write(fd, at: offset, vectors: vectors, count: count))
    }

    public func flush(_ fd: Int32, tag: UInt64) {
        outstanding += 1
        complete(tag, FileIO.flush(fd))
    }

    public func allocate(_ fd: Int32, mode: Int32, at offset: UInt64, length: UInt64, tag: UInt64) {
        outstanding += 1
        complete(tag, clinux_allocate(fd, mode, offset, length))
    }

    // MARK: - Sockets: tried, and waited for where they would block

    public func accept(_ fd: Int32, tag: UInt64) {
        wait(WaitingOperation(kind: .accept, fd: fd, tag: tag))
    }

    public func receive(
        _ fd: Int32, into memory: UnsafeMutableRawPointer, length: Int, tag: UInt64
    ) {
        startOrWait(
            WaitingOperation(kind: .receive, fd: fd, tag: tag, memory: memory, length: length))
    }

    public func send(_ fd: Int32, message: UnsafePointer<msghdr>, tag: UInt64) {
        let memory = UnsafeMutableRawPointer(mutating: message)
        startOrWait(WaitingOperation(kind: .send, fd: fd, tag: tag, memory: memory))
    }

    public func poll(_ fd: Int32, tag: UInt64) {
        wait(WaitingOperation(kind: .poll, fd: fd, tag: tag))
    }

    public func cancel(_ fd: Int32, target: UInt64, tag: UInt64) {
        outstanding += 1
        // At most one operation reads a socket at a time.
        if let operation = waiting.first(fd, .input), operation.tag == target {
            waiting.removeFirst(fd, .input)
            complete(target, -ECANCELED)
        }
        complete(tag, 0)
    }

    private func startOrWait(_ operation: WaitingOperation) {
        let queued = waiting.first(operation.fd, operation.direction) != nil
        if !queued, let result = attempt(operation, events: 0) {
            outstanding += 1
            complete(operation.tag, result)
        } else {
            wait(operation)
        }
    }

    private func wait(_ operation: WaitingOperation) {
        outstanding += 1
        guard operation.fd >= 0 else {
            complete(operation.tag, -EBADF)
            return
        }
        waiting.append(operation)
        arm(operation.fd)
    }

    /// The result, or nil if the operation would block. `events`: what epoll said, 0 before.
    private func attempt(_ operation: WaitingOperation, events: UInt32) -> Int32? {
        var result: Int32
        repeat {
            switch operation.kind {
            case .receive:
                result = SocketIO.receive(
                    operation.fd, into: operation.memory!, length: operation.length)
            case .send:
                let message = operation.memory!.assumingMemoryBound(to: msghdr.self)
                result = SocketIO.send(operation.fd, message)
            case .accept:
                result = acceptNow(operation.fd)
                // A listening Unix socket that was shut down says EAGAIN to whoever does not wait,
                // and would be reported as ended for ever.
                if result == -EAGAIN && events & Self.endEvents != 0 { result = -EINVAL }
            case .poll:
                return events == 0 ? nil : Int32(events)
            }
        } while result == -EINTR
        return result == -EAGAIN ? nil : result
    }

    /// Another reactor may take the connection between epoll's answer and this call, which must
    /// not block then: there is no flag for that, so the socket itself is made so.
    private func acceptNow(_ fd: Int32) -> Int32 {
        let flags = fcntl(fd, F_GETFL)
        if flags >= 0 && flags & O_NONBLOCK == 0 {
            _ = fcntl(fd, F_SETFL, flags | O_NONBLOCK)
        }
        return clinux_accept(fd)
    }

    private static let inputEvents = UInt32(POLLIN)
    private static let outputEvents = UInt32(POLLOUT)
    private static let endEvents = UInt32(POLLERR) | UInt32(POLLHUP)

    /// Has epoll report the next event that the descriptor's lists wait for. The descriptor's
    /// number may have come to a new file since it was last armed, so the kernel's word counts.
    private func arm(_ fd: Int32) {
        var wanted: UInt32 = 0
        if waiting.first(fd, .input) != nil { wanted |= Self.inputEvents }
        if waiting.first(fd, .output) != nil { wanted |= Self.outputEvents }
        guard wanted != 0 else { return }
        let code = -clinux_epoll_arm(epoll.raw, fd, wanted)
        guard code != 0 else { return }
        // EPERM: a regular file, which poll(2) calls always readable.
        for direction in WaitingOperation.Direction.allCases {
            while let operation = waiting.first(fd, direction) {
                waiting.removeFirst(fd, direction)
                let isReady = code == EPERM && operation.kind == .poll
                complete(operation.tag, isReady ? Int32(Self.inputEvents) : -code)
            }
        }
    }

    private func answer(_ fd: Int32, _ events: UInt32) {
        if events & (Self.inputEvents | Self.endEvents) != 0 { tryWaiting(fd, .input, events) }
        if events & (Self.outputEvents | Self.endEvents) != 0 { tryWaiting(fd, .output, events) }
        arm(fd)
    }

    private func tryWaiting(
        _ fd: Int32, _ direction: WaitingOperation.Direction, _ events: UInt32
    ) {
        while let operation = waiting.first(fd, direction),
            let result = attempt(operation, events: events)
        {
            waiting.removeFirst(fd, direction)
            complete(operation.tag, result)
        }
    }

    // MARK: - Timeouts

    public func timeout(nanoseconds: UInt64, tag: UInt64) {
        outstanding += 1
        let (deadline, overflow) = monotonicNanoseconds().addingReportingOverflow(nanoseconds)
        deadlines.insert(overflow ? .max : deadline, tag)
    }

    private func expireTimeouts() {
        guard !deadlines.isEmpty else { return }
        let now = monotonicNanoseconds()
        while let first = deadlines.first, first.deadline <= now {
            deadlines.removeFirst()
            complete(first.tag, -ETIME)
        }
    }

    /// Milliseconds for epoll: rounded up, because waking too early would mean turning in circles
    /// until the deadline.
    private func patience() -> Int32 {
        guard let first = deadlines.first else { return -1 }
        let now = monotonicNanoseconds()
        guard first.deadline > now else { return 0 }
        let nanosecondsToMillisecond: UInt64 = 1_000_000
        return Int32(clamping: (first.deadline - now - 1) / nanosecondsToMillisecond + 1)
    }

    // MARK: - Running

    public func lookOut(nanoseconds: UInt64) -> Bool {
        let deadline = monotonicNanoseconds() + nanoseconds
        repeat {
            var readable = pollfd(fd: epoll.raw, events: Int16(POLLIN), revents: 0)
            if !completed.isEmpty || Glibc.poll(&readable, 1, 0) > 0 { return true }
        } while monotonicNanoseconds() < deadline
        return false
    }

    public func run(wait: Bool, _ body: (UInt64, Int32) -> Void) throws(DeviceError) {
        assert(!wait || outstanding > 0, "waits for ever: nothing is outstanding")
        if !waiting.isEmpty || wait && completed.isEmpty {
            let limit = wait && completed.isEmpty ? patience() : 0
            let count = clinux_epoll_wait(epoll.raw, events, limit)
            if count < 0 && count != -EINTR {
                throw DeviceError(
                    operation: "wait for", path: "epoll", code: -count,
                    reason: SystemError.words(-count))
            }
            for index in 0..<max(Int(count), 0) {
                answer(events[index].fd, events[index].events)
            }
        }
        expireTimeouts()
        // What completes by operations that `body` starts waits for the next turn.
        var left = completed.count
        while left > 0 {
            let completion = completed.removeFirst()
            left -= 1
            outstanding -= 1
            body(completion.tag, completion.result)
        }
    }
}
