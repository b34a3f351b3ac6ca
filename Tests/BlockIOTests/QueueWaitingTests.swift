// Time, signals and idleness of both kinds of queue, and the choice between them.

import Foundation
import Testing

@testable import BlockIO

@Suite struct QueueWaitingTests {
    private static let millisecond: UInt64 = 1_000_000

    @Test(arguments: QueueKind.available)
    func timeoutsComeInOrderAndNotEarly(_ kind: QueueKind) throws {
        let harness = try Harness(kind)
        let begin = monotonicSeconds()
        for delay in [60, 0, 20, 40, 20] as [UInt64] {
            let tag = delay == 20 && harness.queue.outstanding > 4 ? 21 : delay
            harness.queue.timeout(nanoseconds: delay * Self.millisecond, tag: tag)
        }
        try harness.wait(0, 20, 21, 40, 60)
        #expect(monotonicSeconds() - begin >= 0.060)
        #expect(monotonicSeconds() - begin < 2)
        #expect(harness.results.values.allSatisfy { $0 == -ETIME })
        #expect(harness.order.first == 0)
        #expect(Array(harness.order.suffix(2)) == [40, 60])
    }

    /// More timeouts than entries, in an order that exercises the heap.
    @Test(arguments: QueueKind.available)
    func manyTimeouts(_ kind: QueueKind) throws {
        let count: UInt64 = 500
        let harness = try Harness(kind, entries: 64)
        for tag in 0..<count {
            harness.queue.timeout(
                nanoseconds: (tag &* 7919 % count) * Self.millisecond / 10, tag: tag)
        }
        try harness.wait { harness.results.count == Int(count) }
        #expect(harness.results.values.allSatisfy { $0 == -ETIME })
    }

    /// A turn without waiting returns at once with nothing, and does no work that costs anything.
    @Test(arguments: QueueKind.available)
    func doesNotWaitWhenToldSo(_ kind: QueueKind) throws {
        let queue = try kind.make()
        queue.timeout(nanoseconds: 3_600_000 * Self.millisecond, tag: 1)
        let begin = monotonicSeconds()
        for _ in 0..<100 {
            try queue.run(wait: false) { tag, _ in Issue.record("\(tag) was delivered") }
        }
        #expect(monotonicSeconds() - begin < 1)
    }

    /// With everything pending that a server has pending, waiting takes no CPU and few turns.
    @Test(arguments: QueueKind.available)
    func waitingIsIdle(_ kind: QueueKind) throws {
        let pair = SocketPair()
        let full = SocketPair()
        let event = try WakeEvent()
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 8 << 20)
        let message = Message(buffer.pointer, buffer.count)
        harness.queue.receive(pair.a, into: buffer.pointer, length: 512, tag: 1)
        harness.queue.poll(event.fileDescriptor, tag: 2)
        harness.queue.send(full.a, message: message.header, tag: 3)
        try harness.wait(3)
        harness.queue.send(full.a, message: message.header, tag: 4)
        // Half-closed: readable for ever as far as epoll is concerned, with nobody receiving.
        shutdown(full.b, Int32(SHUT_WR))
        let turns = harness.turns
        let seconds = threadSeconds()
        harness.queue.timeout(nanoseconds: 300 * Self.millisecond, tag: 5)
        try harness.wait(5)
        #expect(threadSeconds() - seconds < 0.05)
        #expect(harness.turns - turns <= 5)
        #expect(harness.results[1] == nil && harness.results[2] == nil)
        #expect(harness.results[4] == nil)
        shutdown(pair.a, Int32(SHUT_RDWR))
        shutdown(full.a, Int32(SHUT_RDWR))
        try harness.wait(1, 4)
    }

    @Test(arguments: QueueKind.available)
    func signalsInterruptTheWait(_ kind: QueueKind) throws {
        var action = sigaction()
        action.__sigaction_handler.sa_handler = { _ in }
        #expect(sigaction(SIGUSR2, &action, nil) == 0)
        // The threads that tests run on block signals.
        var signals = sigset_t()
        var before = sigset_t()
        sigemptyset(&signals)
        sigaddset(&signals, SIGUSR2)
        pthread_sigmask(SIG_UNBLOCK, &signals, &before)
        defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
        let queue = try kind.make()
        queue.timeout(nanoseconds: 2000 * Self.millisecond, tag: 1)
        let waiter = pthread_self()
        let thread = Thread {
            usleep(100_000)
            pthread_kill(waiter, SIGUSR2)
        }
        thread.start()
        let begin = monotonicSeconds()
        try queue.run(wait: true) { tag, _ in Issue.record("\(tag) was delivered") }
        #expect(monotonicSeconds() - begin < 1.5, "the signal did not end the wait")
        #expect(queue.outstanding == 1)
    }
}
