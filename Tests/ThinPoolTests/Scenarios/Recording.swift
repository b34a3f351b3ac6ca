// The two devices of a scenario: every I/O that a pool does to them is kept, with its begin and its
// end, so that orders can be asserted and a power cut tried at any of them (`PowerCut.swift`).

import BlockIO
import Glibc

enum DeviceName: String { case metadata, data }

/// One I/O of a pool.
struct RecordedIO {
    enum Kind: String { case read, write, zero, discard, flush }
    enum Actor: Equatable {
        /// A reactor's engine.
        case engine(Int)
        case worker
        /// The pool itself, synchronously: reads of metadata, the needs_check flag.
        case pool
    }

    var device: DeviceName
    var kind: Kind
    var actor: Actor
    /// Bytes.
    var offset = 0
    var length = 0
    /// Of a write; it is as long as `length`.
    var contents: [UInt8] = []
    /// On the medium when it ends (FUA).
    var isDurable = false

    /// Times of the recording.
    var begin = 0
    var end: Int?
    /// errno.
    var error: Int32 = 0
    /// It is what reads see, and what a flush makes certain.
    var hasEffect = false

    var range: Range<Int> { offset..<(offset + length) }
    var changesDevice: Bool { kind != .read && kind != .flush }
    var isSuperblock: Bool { device == .metadata && kind == .write && offset == 0 }
    /// It ended well.
    var isDone: Bool { end != nil && error == 0 }
    /// What an error was injected into, in a message.
    var label: String { "\(device) \(kind) at \(offset)+\(length) by \(actor)" }
}

/// What a device does to one I/O instead of doing it right.
struct Fault {
    /// errno, or 0: the transfer is short.
    var error: Int32 = 0
    /// The I/O has its effect all the same: only the answer is bad.
    var hasEffect = false
    /// Bytes transferred.
    var transferred: Int?
}

final class Recording {
    private(set) var ios: [RecordedIO] = []
    /// Goes up by one with every begin, end and reply.
    private(set) var now = 0
    /// Asked at the end of every I/O.
    var fault: ((RecordedIO) -> Fault?)?

    func tick() -> Int {
        now += 1
        return now
    }

    func begin(_ io: RecordedIO) -> Int {
        var io = io
        io.begin = tick()
        ios.append(io)
        return ios.count - 1
    }

    func end(_ index: Int, error: Int32, hasEffect: Bool, transferred: Int? = nil) {
        ios[index].end = tick()
        ios[index].error = error
        ios[index].hasEffect = hasEffect
        if let transferred, ios[index].kind == .write, error == 0 {
            ios[index].length = transferred
            ios[index].contents = Array(ios[index].contents.prefix(transferred))
        }
    }

    /// What began in `times`.
    func begun(in times: PartialRangeFrom<Int>) -> [RecordedIO] {
        ios.filter { times.contains($0.begin) }
    }
}

/// The bytes of a device. Copies share their pages, so that keeping thousands of states is cheap.
struct Platter {
    static let pageBytes = 4096

    /// What a page that nobody wrote holds.
    let old: UInt8
    private var pages: [[UInt8]?]

    init(bytes: Int, old: UInt8) {
        precondition(bytes % Self.pageBytes == 0)
        self.old = old
        pages = Array(repeating: nil, count: bytes / Self.pageBytes)
    }

    var count: Int { pages.count * Self.pageBytes }

    mutating func grow(to bytes: Int) {
        precondition(bytes >= count && bytes % Self.pageBytes == 0)
        pages += Array(repeating: nil, count: bytes / Self.pageBytes - pages.count)
    }

    func page(_ index: Int) -> [UInt8] {
        pages[index] ?? [UInt8](repeating: old, count: Self.pageBytes)
    }

    func read(at offset: Int, into buffer: UnsafeMutableRawBufferPointer) {
        Self.forEachPiece(offset, buffer.count) { page, inPage, position, length in
            let target = buffer.baseAddress! + position
            if let bytes = pages[page] {
                bytes.withUnsafeBytes {
                    target.copyMemory(from: $0.baseAddress! + inPage, byteCount: length)
                }
            } else {
                memset(target, Int32(old), length)
            }
        }
    }

    mutating func write(at offset: Int, from buffer: UnsafeRawBufferPointer) {
        Self.forEachPiece(offset, buffer.count) { page, inPage, position, length in
            let source = UnsafeRawBufferPointer(
                rebasing: buffer[position..<(position + length)])
            if length == Self.pageBytes {
                pages[page] = [UInt8](source)
                return
            }
            if pages[page] == nil { pages[page] = [UInt8](repeating: old, count: Self.pageBytes) }
            pages[page]!.withUnsafeMutableBytes {
                UnsafeMutableRawBufferPointer(rebasing: $0[inPage..<(inPage + length)])
                    .copyMemory(from: source)
            }
        }
    }

    mutating func fill(_ range: Range<Int>, _ byte: UInt8) {
        let whole = [UInt8](repeating: byte, count: Self.pageBytes)
        Self.forEachPiece(range.lowerBound, range.count) { page, inPage, _, length in
            if length == Self.pageBytes {
                pages[page] = whole
                return
            }
            if pages[page] == nil { pages[page] = [UInt8](repeating: old, count: Self.pageBytes) }
            for i in inPage..<(inPage + length) { pages[page]![i] = byte }
        }
    }

    /// The part of an I/O's effect that lies in `range`.
    mutating func apply(_ io: RecordedIO, in range: Range<Int>) {
        switch io.kind {
        case .write:
            let part = range.clamped(to: io.range)
            io.contents.withUnsafeBytes {
                write(
                    at: part.lowerBound,
                    from: UnsafeRawBufferPointer(
                        rebasing: $0[
                            (part.lowerBound - io.offset)..<(part.upperBound - io.offset)]))
            }
        case .zero: fill(range.clamped(to: io.range), 0)
        case .discard: fill(range.clamped(to: io.range), RecordedDisk.discarded)
        case .read, .flush: break
        }
    }

    private static func forEachPiece(
        _ offset: Int, _ count: Int, _ body: (Int, Int, Int, Int) -> Void
    ) {
        var done = 0
        while done < count {
            let inPage = (offset + done) % pageBytes
            let length = min(pageBytes - inPage, count - done)
            body((offset + done) / pageBytes, inPage, done, length)
            done += length
        }
    }
}

/// One of the two devices.
final class RecordedDisk: BlockDevice {
    /// What a discarded sector holds: bytes that nobody ever wrote.
    static let discarded: UInt8 = 0xDD
    /// What a data device holds before it becomes a pool's: somebody's secret.
    static let secret: UInt8 = 0xEE

    let name: DeviceName
    let path: String
    let recording: Recording
    private(set) var platter: Platter
    /// What was on the medium when the recording began.
    private(set) var first: Platter
    private(set) var flushes = 0
    /// Called before each read that the pool does by itself.
    var onRead: (() -> Void)?

    init(_ name: DeviceName, _ platter: Platter, _ recording: Recording, path: String? = nil) {
        self.name = name
        self.path = path ?? name.rawValue
        self.platter = platter
        first = platter
        self.recording = recording
    }

    var size: UInt64 { UInt64(platter.count) }

    func grow(to bytes: Int) {
        platter.grow(to: bytes)
        first.grow(to: bytes)
    }

    // MARK: - Synchronous: the pool's own

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(DeviceError) {
        onRead?()
        try perform(.read, offset, buffer.count) {
            platter.read(at: Int(offset), into: buffer)
        }
    }

    func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        try perform(.write, offset, buffer.count, [UInt8](buffer)) {
            platter.write(at: Int(offset), from: buffer)
        }
    }

    func flush() throws(DeviceError) { try perform(.flush, 0, 0) { flushes += 1 } }

    private func perform(
        _ kind: RecordedIO.Kind, _ offset: UInt64, _ length: Int, _ contents: [UInt8] = [],
        _ effect: () -> Void
    ) throws(DeviceError) {
        guard offset + UInt64(length) <= size else {
            throw DeviceError(
                operation: kind.rawValue, path: path, offset: offset, code: EINVAL,
                reason: "it lies past the device's end")
        }
        let index = recording.begin(
            RecordedIO(
                device: name, kind: kind, actor: .pool, offset: Int(offset), length: length,
                contents: contents))
        let fault = recording.fault?(recording.ios[index])
        let error = fault?.error ?? 0
        let hasEffect = error == 0 || fault!.hasEffect
        if hasEffect { effect() }
        recording.end(index, error: error, hasEffect: hasEffect)
        if error != 0 {
            throw DeviceError(
                operation: kind.rawValue, path: path, offset: offset, code: error,
                reason: String(cString: strerror(error)))
        }
    }

    // MARK: - What a bench does for engine and worker

    /// The effect of an I/O that ends now, up to `transferred` bytes.
    func apply(_ io: RecordedIO, transferred: Int) {
        if io.kind == .flush { flushes += 1 }
        platter.apply(io, in: io.offset..<(io.offset + transferred))
    }
}
