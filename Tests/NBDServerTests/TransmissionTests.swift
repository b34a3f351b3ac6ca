// The transmission phase without sockets: any stream of requests, cut anywhere, finished in any
// order, sent in pieces of any size, gives each request exactly one right answer.

import Glibc
import NBDProtocol
import Testing
import ThinPool

@testable import NBDServer

/// Keeps requests until a test finishes them; answers them from a flat image.
final class TestSink: RequestSink {
    var waiting: [VolumeRequest] = []
    var image: [UInt8]
    init(size: Int) { image = [UInt8](repeating: 0, count: size) }

    func submit(_ request: VolumeRequest) { waiting.append(request) }

    /// - Parameter holes: which parts of a read to tell as holes; their bytes are garbage then.
    func perform(_ request: VolumeRequest, holes: [Range<UInt64>] = []) {
        let range = Int(request.offset)..<Int(request.offset + request.length)
        switch request.operation {
        case .read:
            image[range].withUnsafeBytes {
                request.buffer!.copyMemory(from: $0.baseAddress!, byteCount: $0.count)
            }
            guard let list = request.holes else { break }
            for hole in holes {
                let hole = hole.clamped(to: request.offset..<request.offset + request.length)
                guard !hole.isEmpty, list.pointee.append(hole.lowerBound, hole.upperBound) else {
                    continue
                }
                memset(request.buffer! + Int(hole.lowerBound - request.offset), 0xDB, hole.count)
            }
        case .write:
            let source = UnsafeRawBufferPointer(start: request.buffer, count: range.count)
            image.replaceSubrange(range, with: source)
        case .writeZeroes, .trim:
            image.replaceSubrange(range, with: repeatElement(0, count: range.count))
        case .flush, .cache, .extents: break
        }
    }
}

@Suite struct TransmissionTests {
    static let size = 4 << 20
    private let directory = TestDirectory()
    private let pool: TestPool
    private let volume: Volume
    private let buffers = BufferPool(capacity: 32 << 20)

    init() throws {
        pool = try TestPool(in: directory, volumes: [("v", UInt64(Self.size))], ring: false)
        volume = pool.pool.open(exportNamed: "v")!
    }

    private func makeTransmission(_ format: WireFormat = .simple) -> Transmission {
        let export = Export(
            name: "v", size: volume.size, isReadOnly: false, description: "")
        return Transmission(
            volume: volume, agreement: Agreement(export: export, format: format),
            contexts: VolumeContexts(),
            dataBlockSize: 64 << 10, buffers: buffers, owner: 5)
    }

    /// Moves as much of the stream as is wanted now, at most `limit` bytes; returns how much.
    private func feed(
        _ transmission: Transmission, _ stream: ArraySlice<UInt8>, _ sink: TestSink,
        limit: Int = .max
    ) -> Int {
        guard let space = transmission.receiveSpace() else { return 0 }
        let count = min(space.count, stream.count, limit)
        guard count > 0 else { return 0 }
        stream.prefix(count).withUnsafeBytes {
            space.baseAddress!.copyMemory(from: $0.baseAddress!, byteCount: count)
        }
        transmission.received(count, sink)
        return count
    }

    /// Takes everything that is to be sent, in pieces of at most `limit` bytes.
    private func drain(_ transmission: Transmission, _ sink: TestSink, limit: Int = .max) -> [UInt8]
    {
        var output: [UInt8] = []
        while let message = transmission.nextMessage() {
            var left = limit
            var taken = 0
            for index in 0..<Int(message.pointee.msg_iovlen) where left > 0 {
                let vector = message.pointee.msg_iov[index]
                let count = min(left, vector.iov_len)
                output += UnsafeRawBufferPointer(start: vector.iov_base, count: count)
                left -= count
                taken += count
            }
            transmission.sent(taken)
            transmission.resume(sink)
        }
        return output
    }

    private func finishAll(_ transmission: Transmission, _ sink: TestSink) {
        while !sink.waiting.isEmpty {
            let request = sink.waiting.removeFirst()
            sink.perform(request)
            let place = Transmission.place(of: request.cookie)
            #expect(place.owner == 5)
            transmission.finish(place.slot, code: 0)
        }
    }

    @Test func noMoreThanItsSlots() {
        let transmission = makeTransmission()
        let sink = TestSink(size: Self.size)
        let stream = (0..<UInt64(300)).flatMap { Client.request(.read, cookie: $0, length: 512) }
        var position = 0
        while true {
            let count = feed(transmission, stream[position...], sink)
            if count == 0 { break }
            position += count
        }
        #expect(sink.waiting.count == Transmission.slotCount)
        #expect(transmission.receiveSpace() == nil)
        var answered = 0
        while answered < 300 {
            finishAll(transmission, sink)
            answered += drain(transmission, sink).count / 528
        }
        #expect(answered == 300)
        #expect(transmission.occupied == 0)
        #expect(buffers.inUse == 0)
    }

    @Test func noMorePayloadThanItsShare() {
        let transmission = makeTransmission()
        let sink = TestSink(size: 0)
        let stream = (0..<UInt64(20)).flatMap { Client.request(.read, cookie: $0, length: 4 << 20) }
        #expect(feed(transmission, stream[...], sink) == stream.count)
        #expect(sink.waiting.count == Transmission.payloadLimit / (4 << 20))
        for request in sink.waiting {
            transmission.finish(Transmission.place(of: request.cookie).slot, code: EIO)
        }
        sink.waiting = []
        let replies = drain(transmission, sink)
        #expect(replies.count == 4 * 16)
        #expect(bigEndian(replies, 4, as: UInt32.self) == WireError.inputOutput.rawValue)
        #expect(sink.waiting.count == 4)
        transmission.breakOff(isSending: false)
        for request in sink.waiting {
            transmission.finish(Transmission.place(of: request.cookie).slot, code: 0)
        }
        #expect(transmission.occupied == 0)
        #expect(buffers.inUse == 0)
    }

    @Test func brokenOffWithAMessageUnderWay() {
        let transmission = makeTransmission()
        let sink = TestSink(size: Self.size)
        let stream = (0..<UInt64(4)).flatMap { Client.request(.read, cookie: $0, length: 65_536) }
        _ = feed(transmission, stream[...], sink)
        let last = sink.waiting.removeLast()
        finishAll(transmission, sink)
        #expect(transmission.nextMessage() != nil)
        transmission.breakOff(isSending: true)
        #expect(buffers.inUse == 4 * 65_536, "the kernel may still read them")
        #expect(transmission.nextMessage() == nil)
        transmission.sent(0)
        #expect(buffers.inUse == 65_536, "the engine may still fill it")
        transmission.finish(Transmission.place(of: last.cookie).slot, code: 0)
        #expect(buffers.inUse == 0)
        #expect(transmission.occupied == 0)
    }

    @Test func brokenOffWhileAPayloadIsReceivedInPlace() {
        let transmission = makeTransmission()
        let sink = TestSink(size: Self.size)
        _ = feed(
            transmission, (Client.request(.write, cookie: 1, length: 1 << 20) + [1, 2])[...], sink)
        #expect(transmission.receiveSpace()?.count == 512 << 10)
        #expect(transmission.isInsideWrite)
        transmission.breakOff(isSending: false)
        #expect(buffers.inUse == 1 << 20, "the kernel may still fill it")
        transmission.received(0, sink)
        #expect(buffers.inUse == 0)
        #expect(transmission.occupied == 0)
    }

    @Test func endsBetweenRequestsOrWithin() {
        let read = Client.request(.read, cookie: 1, length: 512)
        let write =
            Client.request(.write, cookie: 1, length: 512) + [UInt8](repeating: 1, count: 512)
        let refused =
            Client.request(.write, cookie: 1, offset: 1, length: 512)
            + [UInt8](repeating: 1, count: 512)
        for stream in [read, write, refused] {
            for end in 0...stream.count {
                let transmission = makeTransmission()
                let sink = TestSink(size: Self.size)
                _ = feed(transmission, stream[..<end], sink)
                #expect(transmission.endReading() == (end == 0 || end == stream.count))
                finishAll(transmission, sink)
                _ = drain(transmission, sink)
                #expect(transmission.occupied == 0)
            }
        }
        #expect(buffers.inUse == 0)
    }

    /// The heart of it: random requests, good and bad, against a model.
    @Test(arguments: 0..<12 as Range<UInt64>, [WireFormat.simple, .structured, .extended])
    func randomStreams(seed: UInt64, format: WireFormat) throws {
        try randomStream(seed, format, handsOver: false)
    }

    /// Now and then another server goes on with the connection.
    @Test(arguments: 0..<12 as Range<UInt64>, [WireFormat.simple, .structured, .extended])
    func randomStreamsOverSeveralServers(seed: UInt64, format: WireFormat) throws {
        try randomStream(seed ^ 0x0DDC_0FFE, format, handsOver: true)
    }

    /// What another transmission can go on with.
    private func carry(_ transmission: Transmission, _ sink: TestSink, _ output: inout [UInt8])
        -> [UInt8]
    {
        transmission.pause()
        // The kernel has filled nothing of what it was given.
        transmission.received(0, sink)
        finishAll(transmission, sink)
        output += drain(transmission, sink)
        return transmission.carriedInput()
    }

    private func randomStream(_ seed: UInt64, _ format: WireFormat, handsOver: Bool) throws {
        var random = SplitMix(state: seed)
        var transmission = makeTransmission(format)
        let sink = TestSink(size: Self.size)
        var model = [UInt8](repeating: 0, count: Self.size)
        var stream: [UInt8] = []
        var expected: [UInt64: Answer] = [:]
        var replies = ReplyStream(format: format)
        func ask(
            _ command: UInt16, _ cookie: UInt64, _ offset: Int = 0, _ length: Int = 0,
            _ error: WireError, payload: [UInt8] = [], data: [UInt8]? = nil,
            flags: CommandFlags = []
        ) {
            stream +=
                Client.request(
                    command, cookie: cookie, offset: UInt64(offset), length: UInt64(length),
                    flags: flags, format: format) + payload
            expected[cookie] = Answer(error: error.rawValue, data: data)
            replies.asked[cookie] = .init(offset: UInt64(offset), length: data.map(\.count))
        }
        // Writes go to places of their own, so that the order does not matter.
        var place = 0
        for cookie in 0..<UInt64(400) {
            let length = [0, 512, 512, 4096, 4096, 20_480, 131_072].randomElement(using: &random)!
            switch Int.random(in: 0..<12, using: &random) {
            case 0...4 where place + length <= Self.size:
                let bytes = random.bytes(length)
                ask(Command.write.rawValue, cookie, place, length, .none, payload: bytes)
                model.replaceSubrange(place..<place + length, with: bytes)
                place += length
            case 5:
                ask(
                    Command.write.rawValue, cookie, Self.size, length,
                    length == 0 ? .none : .noSpace,
                    payload: [UInt8](repeating: 0xEE, count: length))
            case 6:
                ask(
                    Command.write.rawValue, cookie, 3, length, .invalid,
                    payload: [UInt8](repeating: 0x25, count: length))
            case 7:
                ask(UInt16.random(in: 7..<100, using: &random), cookie, 0, 0, .invalid)
            case 8:
                ask(Command.flush.rawValue, cookie, 0, 0, .none)
            case 9 where format == .extended:
                // A payload where there is to be none is taken off the stream all the same.
                ask(
                    Command.trim.rawValue, cookie, 0, length, .invalid,
                    payload: random.bytes(length), flags: .payloadLength)
            default:
                // What will never be written: zeroes, whatever the order.
                ask(
                    Command.read.rawValue, cookie, Self.size - 131_072, length, .none,
                    data: [UInt8](repeating: 0, count: length))
            }
            if place > Self.size - 262_144 { place = Self.size }
        }
        // Random pieces in, random order of completion, random pieces out.
        var position = 0
        var output: [UInt8] = []
        var handedOver = 0
        while position < stream.count || !sink.waiting.isEmpty || transmission.hasReplies {
            if handsOver, Int.random(in: 0..<20, using: &random) == 0 {
                let input = carry(transmission, sink, &output)
                let refused = transmission.refused
                transmission.breakOff(isSending: false)
                #expect(transmission.occupied == 0)
                transmission = makeTransmission(format)
                if let refused { transmission.takeOver(refused) }
                // What it had received is received again, and no more than that.
                stream.replaceSubrange(position - input.count..<position, with: input)
                position -= input.count
                handedOver += 1
                continue
            }
            switch Int.random(in: 0..<3, using: &random) {
            case 0:
                let limit = [1, 7, 28, 100, 5000, 200_000].randomElement(using: &random)!
                position += feed(transmission, stream[position...], sink, limit: limit)
            case 1:
                for _ in 0..<Int.random(in: 0..<20, using: &random) where !sink.waiting.isEmpty {
                    let index = Int.random(in: 0..<sink.waiting.count, using: &random)
                    let request = sink.waiting.remove(at: index)
                    let holes = (0..<Int.random(in: 0..<20, using: &random)).map { _ in
                        let at = UInt64.random(in: 0..<256, using: &random) * 512
                        let start = UInt64(Self.size - 131_072) + at
                        return start..<start + 512
                    }
                    sink.perform(request, holes: Array(Set(holes)))
                    transmission.finish(Transmission.place(of: request.cookie).slot, code: 0)
                }
            default:
                output += drain(
                    transmission, sink,
                    limit: [1, 15, 16, 1000, 1 << 20].randomElement(using: &random)!)
            }
        }
        #expect(transmission.occupied == 0)
        #expect(buffers.inUse == 0)
        #expect(sink.image == model, "seed \(seed)")

        try replies.append(output)
        #expect(replies.isAtBoundary && replies.asked.isEmpty, "seed \(seed)")
        for (cookie, answer) in replies.answers {
            let wanted = try #require(expected[cookie])
            #expect(answer.error == wanted.error && answer.data == wanted.data, "seed \(seed)")
            #expect(answer.text.isEmpty == (answer.error == 0 || format == .simple))
        }
        #expect((handedOver > 0) == handsOver)
        let holes = replies.answers.values.reduce(0) { $0 + $1.holes }
        #expect((holes > 0) == (format != .simple))
    }

    /// Bytes of no meaning: no crash, and the memory comes back.
    @Test(arguments: 0..<12 as Range<UInt64>)
    func randomBytes(seed: UInt64) {
        var random = SplitMix(state: seed ^ 0xABCD)
        for _ in 0..<20 {
            let transmission = makeTransmission()
            let sink = TestSink(size: Self.size)
            var stream: [UInt8] = []
            for _ in 0..<30 {
                var header = random.bytes(32)
                header.removeLast(4)
                header.replaceSubrange(0..<4, with: bigEndianBytes(Magic.request))
                if Int.random(in: 0..<10, using: &random) > 0 {
                    header.replaceSubrange(
                        4..<8, with: [0, 0, 0, UInt8.random(in: 0..<8, using: &random)])
                    header.replaceSubrange(16..<22, with: [0, 0, 0, 0, 0, 0])
                    header.replaceSubrange(
                        24..<27, with: [0, 0, UInt8.random(in: 0..<8, using: &random)])
                }
                stream += header + random.bytes(Int.random(in: 0..<3000, using: &random))
            }
            var position = 0
            while position < stream.count {
                let count = feed(
                    transmission, stream[position...], sink,
                    limit: Int.random(in: 1..<4000, using: &random))
                position += count
                if Bool.random(using: &random) { finishAll(transmission, sink) }
                if Bool.random(using: &random) { _ = drain(transmission, sink) }
                if count == 0 && !transmission.isReading { break }
                if count == 0 {
                    finishAll(transmission, sink)
                    _ = drain(transmission, sink)
                }
            }
            transmission.breakOff(isSending: false)
            finishAll(transmission, sink)
            #expect(transmission.occupied == 0, "seed \(seed)")
        }
        #expect(buffers.inUse == 0, "seed \(seed)")
    }
}
