// Sockets and other descriptors that wait, through both kinds of queue.

import Foundation
import Testing

@testable import BlockIO

@Suite struct QueueSocketTests {
    @Test(arguments: QueueKind.available)
    func pingPong(_ kind: QueueKind) throws {
        let rounds = 2000
        let pair = SocketPair()
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 16)
        let near = Message(buffer.pointer, 8)
        let far = Message(buffer.pointer + 8, 8)
        let sent: UInt64 = 1
        let arrived: UInt64 = 2
        for round in 0..<rounds {
            let toFar = round % 2 == 0
            let source = toFar ? buffer.pointer : buffer.pointer + 8
            let target = toFar ? buffer.pointer + 8 : buffer.pointer
            source.storeBytes(of: round, as: Int.self)
            harness.queue.receive(toFar ? pair.b : pair.a, into: target, length: 8, tag: arrived)
            harness.queue.send(
                toFar ? pair.a : pair.b, message: toFar ? near.header : far.header, tag: sent)
            try harness.wait(sent, arrived)
            try #require(harness.take(sent) == 8)
            try #require(harness.take(arrived) == 8)
            try #require(target.load(as: Int.self) == round)
        }
    }

    /// Both directions of both sockets at once, in pieces as the sockets take them.
    @Test(arguments: QueueKind.available)
    func muchDataBothWays(_ kind: QueueKind) throws {
        let total = 4 << 20
        let pair = SocketPair()
        let queue = try kind.make()
        let source = AlignedBuffer(count: total)
        for index in 0..<total / 8 {
            source.pointer.storeBytes(of: index &* 0x9E37, toByteOffset: index * 8, as: Int.self)
        }
        let target = AlignedBuffer(count: total * 2)
        memset(target.pointer, 0xff, target.count)
        var messages: [Message] = []
        var sent = [0, 0]
        var arrived = [0, 0]
        let ends = [pair.a, pair.b]
        func send(_ side: Int) {
            messages.append(Message(source.pointer + sent[side], total - sent[side]))
            queue.send(ends[side], message: messages.last!.header, tag: UInt64(side))
        }
        func receive(_ side: Int) {
            let place = target.pointer + side * total + arrived[side]
            queue.receive(
                ends[side], into: place, length: total - arrived[side], tag: UInt64(2 + side))
        }
        for side in 0...1 {
            send(side)
            receive(side)
        }
        let limit = monotonicSeconds() + 5
        while queue.outstanding > 0 && monotonicSeconds() < limit {
            try queue.run(wait: true) { tag, result in
                #expect(result > 0)
                let side = Int(tag & 1)
                if tag < 2 {
                    sent[side] += Int(result)
                    if sent[side] < total { send(side) }
                } else {
                    arrived[side] += Int(result)
                    if arrived[side] < total { receive(side) }
                }
            }
        }
        #expect(arrived == [total, total])
        #expect(memcmp(target.pointer, source.pointer, total) == 0)
        #expect(memcmp(target.pointer + total, source.pointer, total) == 0)
    }

    // MARK: - Accepting

    private func listening(_ scratch: Scratch, flags: Int32 = 0) -> (fd: Int32, sockaddr_un) {
        let fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | flags, 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let path = scratch.path("s")
        withUnsafeMutableBytes(of: &address.sun_path) { field in
            path.utf8CString.withUnsafeBytes { field.copyMemory(from: $0) }
        }
        withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                #expect(bind(fd, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) == 0)
            }
        }
        #expect(listen(fd, 8) == 0)
        return (fd, address)
    }

    private func connected(_ address: sockaddr_un) -> Int32 {
        let fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = address
        withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                #expect(connect(fd, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) == 0)
            }
        }
        return fd
    }

    @Test(arguments: QueueKind.available, [0, Int32(SOCK_NONBLOCK.rawValue)])
    func accepts(_ kind: QueueKind, flags: Int32) throws {
        let scratch = Scratch()
        let (listener, address) = listening(scratch, flags: flags)
        defer { close(listener) }
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 16)
        for round in UInt64(0)..<3 {
            harness.queue.accept(listener, tag: round * 10)
            // Nobody is there yet.
            try harness.queue.run(wait: false) { tag, result in
                Issue.record("accept \(tag) gave \(result) before anybody connected")
            }
            let client = connected(address)
            defer { close(client) }
            try harness.wait(round * 10)
            let server = try #require(harness.results[round * 10])
            try #require(server >= 0)
            defer { close(server) }
            #expect(fcntl(server, F_GETFD) & FD_CLOEXEC != 0)
            #expect(fcntl(server, F_GETFL) & O_NONBLOCK == 0)
            harness.queue.receive(server, into: buffer.pointer, length: 16, tag: round * 10 + 1)
            #expect(send(client, "hello", 5, 0) == 5)
            try harness.wait(round * 10 + 1)
            #expect(harness.results[round * 10 + 1] == 5)
        }
    }

    @Test(arguments: QueueKind.available)
    func shutdownEndsAPendingAccept(_ kind: QueueKind) throws {
        let scratch = Scratch()
        let (listener, _) = listening(scratch)
        let tcp = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        #expect(listen(tcp, 8) == 0)
        let harness = try Harness(kind)
        harness.queue.accept(listener, tag: 1)
        harness.queue.accept(tcp, tag: 2)
        try harness.queue.run(wait: false) { tag, result in
            Issue.record("accept \(tag) gave \(result) before anybody connected")
        }
        shutdown(listener, Int32(SHUT_RDWR))
        shutdown(tcp, Int32(SHUT_RDWR))
        try harness.wait(1, 2)
        #expect(harness.results == [1: -EINVAL, 2: -EINVAL])
        close(listener)
        close(tcp)
    }

    // MARK: - Closing

    /// The order that IOQueue documents: shutdown, completions, close.
    @Test(arguments: QueueKind.available)
    func shutdownEndsWhatIsPending(_ kind: QueueKind) throws {
        let pair = SocketPair()
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 8 << 20)
        // More than the socket takes: what it takes is sent, the rest waits.
        let message = Message(buffer.pointer, buffer.count)
        harness.queue.receive(pair.a, into: buffer.pointer, length: 512, tag: 1)
        harness.queue.send(pair.a, message: message.header, tag: 2)
        try harness.wait(2)
        let first = try #require(harness.results[2])
        #expect(first > 0 && first < buffer.count)
        harness.queue.send(pair.a, message: message.header, tag: 3)
        try harness.queue.run(wait: false) { tag, result in
            Issue.record("\(tag) gave \(result) though the socket is full")
        }
        #expect(harness.results[1] == nil)
        shutdown(pair.a, Int32(SHUT_RDWR))
        try harness.wait(1, 3)
        #expect(harness.results[1] == 0)
        #expect(harness.results[3] == -EPIPE)
        #expect(harness.queue.outstanding == 1, "only the harness's watchdog is left")
    }

    @Test(arguments: QueueKind.available)
    func theOtherSideEnds(_ kind: QueueKind) throws {
        var ends: [Int32] = [-1, -1]
        #expect(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 512)
        harness.queue.receive(ends[0], into: buffer.pointer, length: 512, tag: 1)
        try harness.queue.run(wait: false) { _, _ in }
        close(ends[1])
        try harness.wait(1)
        #expect(harness.results[1] == 0)
        let message = Message(buffer.pointer, 512)
        harness.queue.send(ends[0], message: message.header, tag: 2)
        try harness.wait(2)
        #expect(harness.results[2] == -EPIPE)
        close(ends[0])
    }

    /// A descriptor's number comes back for another socket; the queue must not mix them up.
    @Test(arguments: QueueKind.available)
    func descriptorNumbersAreReused(_ kind: QueueKind) throws {
        let harness = try Harness(kind)
        let buffer = AlignedBuffer(count: 512)
        for round in UInt64(0)..<50 {
            let pair = SocketPair()
            harness.queue.receive(pair.a, into: buffer.pointer, length: 512, tag: round)
            try harness.queue.run(wait: false) { _, _ in }
            #expect(send(pair.b, "x", 1, 0) == 1)
            try harness.wait(round)
            try #require(harness.results[round] == 1)
        }
    }

    // MARK: - Polling

    @Test(arguments: QueueKind.available)
    func anotherThreadWakes(_ kind: QueueKind) throws {
        let event = try WakeEvent()
        let harness = try Harness(kind)
        for round in UInt64(0)..<20 {
            harness.queue.poll(event.fileDescriptor, tag: round)
            let thread = Thread {
                usleep(1000)
                event.signal()
            }
            thread.start()
            try harness.wait(round)
            let result = try #require(harness.results[round])
            #expect(result > 0 && result & Int32(POLLIN) != 0)
            event.clear()
        }
    }
}
