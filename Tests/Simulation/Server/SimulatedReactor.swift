// A reactor as the server has it: engine, payload buffers and the real connections, but with a
// simulated data device and simulated sockets, and with the scheduler in the place of the kernel.

import Glibc
import NBDProtocol
import NBDServer
import ThinPool

final class SimulatedReactor {
    /// One connection, and what the kernel would have of it.
    final class Place {
        let connection: Connection
        let wire: Wire
        var receiving: UnsafeMutableRawBufferPointer?
        var sending: UnsafePointer<msghdr>?
        /// How often the end of a receive is still passed over, after the server has shut its end
        /// down: until then the kernel may write to the buffer.
        var patience = 0

        init(connection: Connection, wire: Wire) {
            self.connection = connection
            self.wire = wire
        }

        var canReceive: Bool {
            receiving != nil && patience == 0
                && (!wire.toServer.isEmpty || wire.isClosedByClient || wire.isClosedByServer)
        }
    }

    func passTime() {
        for case let place? in places where place.patience > 0 { place.patience -= 1 }
    }

    let io: SimulatedDataIO
    private(set) var engine: VolumeIO!
    private let pool: Pool
    private let buffers = BufferPool(capacity: BufferPool.largest)
    private(set) var places: [Place?] = []
    private(set) var isAwake = false
    /// What it leaves to the next server.
    private(set) var carried: [(state: Carried, wire: Wire)] = []
    typealias Carried = (connection: CarriedConnection, input: [UInt8])
    /// Some volume may be opened again: all reactors are to be woken.
    var hasUnfenced = false
    /// Told of every write that the engine has done, in a turn that began after the pool's failure.
    var wroteAfterFailure: ((VolumeRequest) -> Void)?
    private let isReadOnly: Bool
    private var submitted: [UInt64: VolumeRequest] = [:]
    /// Queries that no connection has sent, by cookie.
    private var queries: [UInt64: (ExtentQuery, (Int32) -> Void)] = [:]
    /// No connection's cookie has this bit.
    private static let queryCookie: UInt64 = 1 << 62
    private var nextQuery = SimulatedReactor.queryCookie

    init(pool: Pool, io: SimulatedDataIO, isReadOnly: Bool = false) {
        self.pool = pool
        self.io = io
        self.isReadOnly = isReadOnly
        nonisolated(unsafe) weak let box = self
        engine = VolumeIO(pool: pool, io: io) { box?.isAwake = true }
    }

    var isBusy: Bool { places.contains { $0 != nil } || engine.inFlight > 0 }

    /// A turn in which `body` says what has come.
    func turn(_ body: () -> Void) {
        isAwake = false
        let hasFailed = pool.status().mode == .failed
        engine.isShared = places.count { $0 != nil } > 1
        engine.beginTurn()
        body()
        while let owner = buffers.nextServed {
            places[owner]!.connection.resume(self)
            if buffers.nextServed == owner { break }
        }
        for case let place? in places where place.connection.isWaiting {
            place.connection.resume(self)
        }
        engine.endTurn()
        var answers: [() -> Void] = []
        engine.takeFinished { cookie, error in
            if let (_, answer) = queries.removeValue(forKey: cookie) {
                answers.append { answer(error) }
                return
            }
            if let request = submitted.removeValue(forKey: cookie), hasFailed, error == 0 {
                wroteAfterFailure?(request)
            }
            let (owner, slot) = Transmission.place(of: cookie)
            if places[owner]!.connection.finish(slot: slot, code: error) { hasUnfenced = true }
        }
        for index in places.indices { settle(index) }
        for answer in answers { answer() }
    }

    /// Asks for the extents of a volume, which has to stay open until the answer comes.
    func ask(
        _ query: ExtentQuery, _ volume: Volume, sectors: Range<Int>,
        answer: @escaping (Int32) -> Void
    ) {
        nextQuery += 1
        queries[nextQuery] = (query, answer)
        turn {
            engine.submit(
                VolumeRequest(
                    operation: .extents, volume: volume, offset: UInt64(sectors.lowerBound) * 512,
                    length: UInt64(sectors.count) * 512, query: query, cookie: nextQuery))
        }
    }

    func wake() { isAwake = true }

    func adopt(_ wire: Wire, _ carried: Carried? = nil) {
        let index = places.firstIndex { $0 == nil } ?? places.count
        if index == places.count { places.append(nil) }
        let connection = Connection(
            socket: -1, index: index, generation: 0, peer: "a simulated client",
            exports: PoolExports(pool: pool, settings: .init(), isReadOnly: isReadOnly),
            buffers: buffers, tick: 0,
            handshakeDeadline: .max)
        places[index] = Place(connection: connection, wire: wire)
        if let carried {
            connection.begin(with: carried.connection, input: carried.input, self)
        } else {
            connection.begin(self)
        }
    }

    func complete(_ tag: UInt64, _ result: Int32) { engine.complete(tag: tag, result: result) }

    /// The kernel has `limit` bytes at most for the receive that is outstanding.
    func receive(_ place: Place, limit: Int) {
        guard let space = place.receiving else { return }
        place.receiving = nil
        place.connection.isReceiving = false
        let wire = place.wire
        // What had arrived before the server shut its end down is still received.
        if wire.isClosedByServer && wire.toServer.isEmpty {
            return place.connection.received(0, self)
        }
        if wire.isReset { return place.connection.received(-ECONNRESET, self) }
        let count = min(limit, wire.toServer.count, space.count)
        wire.toServer.withUnsafeBytes {
            space.copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[..<count]))
        }
        wire.toServer.removeFirst(count)
        place.connection.received(Int32(count), self)
    }

    /// `limit` bytes at most of the message under way are taken.
    func send(_ place: Place, limit: Int) {
        guard let message = place.sending else { return }
        place.sending = nil
        place.connection.isSending = false
        let wire = place.wire
        if wire.isClosedByClient || wire.isClosedByServer {
            return place.connection.sent(-EPIPE, self)
        }
        var left = limit
        for index in 0..<Int(message.pointee.msg_iovlen) where left > 0 {
            let vector = message.pointee.msg_iov[index]
            let count = min(left, vector.iov_len)
            wire.toClient.append(
                contentsOf: UnsafeRawBufferPointer(start: vector.iov_base, count: count))
            left -= count
        }
        place.connection.sent(Int32(limit - left), self)
    }

    /// Bytes of the message that a place is sending.
    func unsent(_ place: Place) -> Int {
        guard let message = place.sending else { return 0 }
        return (0..<Int(message.pointee.msg_iovlen)).reduce(0) {
            $0 + message.pointee.msg_iov[$1].iov_len
        }
    }

    /// Starts what a connection wants to be done next, or lets it go.
    private func settle(_ index: Int) {
        guard let place = places[index] else { return }
        let connection = place.connection
        if connection.isDrained { connection.breakOff(nil) }
        if connection.canBeCarried {
            carried.append((connection.carried(), place.wire))
            connection.breakOff(nil)
            places[index] = nil
            return
        }
        if connection.phase == .closed {
            if !place.wire.isClosedByServer, place.receiving != nil { place.patience = 30 }
            place.wire.isClosedByServer = true
            if connection.isGone {
                connection.closeVolume()
                places[index] = nil
            }
            return
        }
        connection.transmission?.isShared = engine.isShared
        if place.sending == nil, let message = connection.nextMessage() {
            place.sending = message
            connection.isSending = true
        }
        if place.receiving == nil, let space = connection.receiveSpace() {
            place.receiving = space
            connection.isReceiving = true
        }
    }

    /// The server is told to stop.
    func stop() {
        turn { for place in places { place?.connection.stop() } }
    }

    /// The server is told to give its place to another.
    func pause() {
        turn {
            for case let place? in places {
                place.connection.pause()
                guard place.receiving != nil else { continue }
                place.receiving = nil
                place.connection.isReceiving = false
                place.connection.receivingCancelled(self)
            }
        }
    }

    /// It ends without having done so.
    func breakOff() {
        turn { for place in places { place?.connection.breakOff(nil) } }
        for (_, wire) in carried { wire.isClosedByServer = true }
        carried = []
    }

    func close() { engine.close() }
}

extension SimulatedReactor: RequestSink {
    func submit(_ request: VolumeRequest) {
        if request.operation == .write { submitted[request.cookie] = request }
        engine.submit(request)
    }
}
