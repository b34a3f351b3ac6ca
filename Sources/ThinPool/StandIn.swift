// STAND-IN, deleted when the pool is there: volumes that are plain ranges of the data device.

import BlockIO
import Glibc

public protocol DataIO: AnyObject {
    func read(at: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64)
    func write(
        at: UInt64, vectors: UnsafePointer<iovec>, count: Int, durable: Bool, tag: UInt64)
    func flush(tag: UInt64)
    func zero(at: UInt64, length: UInt64, tag: UInt64)
}

public enum VolumeOperation: Sendable { case read, write, flush, trim, writeZeroes, cache }

public struct VolumeRequest {
    public var operation: VolumeOperation
    public var volume: Volume
    public var offset: UInt64
    public var length: UInt64
    public var buffer: UnsafeMutableRawPointer?
    public var fua: Bool
    public var noHole: Bool
    public var cookie: UInt64
    public init(
        operation: VolumeOperation, volume: Volume, offset: UInt64, length: UInt64,
        buffer: UnsafeMutableRawPointer?, fua: Bool, noHole: Bool, cookie: UInt64
    ) {
        self.operation = operation
        self.volume = volume
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.fua = fua
        self.noHole = noHole
        self.cookie = cookie
    }
}

public final class Volume: @unchecked Sendable {
    public let name: String
    public let size: UInt64
    public let isReadOnly = false
    let start: UInt64
    init(name: String, size: UInt64, start: UInt64) {
        self.name = name
        self.size = size
        self.start = start
    }
}

public final class Pool: @unchecked Sendable {
    let volumes: [Volume]
    public init(standIn volumes: [(String, UInt64)]) {
        var start: UInt64 = 0
        var made: [Volume] = []
        for (name, size) in volumes {
            made.append(Volume(name: name, size: size, start: start))
            start += size
        }
        self.volumes = made
    }
    public func open(exportNamed name: String) -> Volume? { volumes.first { $0.name == name } }
    public func close(_ v: Volume) {}
    public func volumeNames() -> [String] { volumes.map(\.name).sorted() }
    public func volumeSize(_ name: String) -> UInt64? { open(exportNamed: name)?.size }
}

public final class VolumeIO {
    let io: any DataIO
    public private(set) var inFlight = 0
    struct Operation {
        var vector = iovec()
        var cookie: UInt64 = 0
        var length: Int32 = 0
        var next = -1
    }
    let operations = UnsafeMutablePointer<Operation>.allocate(capacity: 1 << 16)
    var free = 0
    var finished: [(UInt64, Int32)] = []

    public init(pool: Pool, io: any DataIO, wake: @escaping @Sendable () -> Void) {
        self.io = io
        for i in 0..<1 << 16 {
            (operations + i).initialize(to: Operation(next: i + 1))
        }
    }
    public func beginTurn() {}
    public func submit(_ r: VolumeRequest) {
        inFlight += 1
        let tag = free
        free = operations[tag].next
        operations[tag].cookie = r.cookie
        operations[tag].length = 0
        let at = r.volume.start + r.offset
        switch r.operation {
        case .read:
            operations[tag].length = Int32(r.length)
            io.read(at: at, into: r.buffer!, length: Int(r.length), tag: UInt64(tag))
        case .write:
            operations[tag].length = Int32(r.length)
            operations[tag].vector = iovec(iov_base: r.buffer, iov_len: Int(r.length))
            let vector = UnsafeMutableRawPointer(operations + tag).assumingMemoryBound(to: iovec.self)
            io.write(at: at, vectors: vector, count: 1, durable: r.fua, tag: UInt64(tag))
        case .flush: io.flush(tag: UInt64(tag))
        case .writeZeroes, .trim: io.zero(at: at, length: r.length, tag: UInt64(tag))
        case .cache: complete(tag: UInt64(tag), result: 0)
        }
    }
    public func complete(tag: UInt64, result: Int32) {
        let tag = Int(tag)
        let short = result >= 0 && result != operations[tag].length
        finished.append((operations[tag].cookie, result < 0 ? -result : short ? EIO : 0))
        operations[tag].next = free
        free = tag
    }
    public func endTurn() {}
    public func takeFinished(_ body: (_ cookie: UInt64, _ error: Int32) -> Void) {
        inFlight -= finished.count
        for (cookie, error) in finished { body(cookie, error) }
        finished.removeAll(keepingCapacity: true)
    }
    public func close() { precondition(inFlight == 0) }
}
