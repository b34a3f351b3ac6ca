// A reactor's payload buffers: page-aligned, in powers of two, bounded in sum, reused.
//
// 1. Buffers in use and buffers kept for reuse together never exceed `capacity`.
// 2. A buffer is for a whole payload and is taken before its first byte is received, so a write
//    that has begun never waits for memory to go on: taking cannot deadlock.
// 3. Whoever finds no room waits in a queue; until the first in it has been served nobody else
//    gets anything of this, so that a large request is not starved by small ones.
// 4. Beside it there are places for single small requests of connections that hold nothing: whoever
//    hoards all the rest does not keep others from being served.

import BlockIO
import Glibc
import NBDProtocol

package final class BufferPool {
    /// Bytes that may be allocated at any time.
    let capacity: Int
    /// Kept buffers are freed above this.
    private let keptLimit: Int

    /// In use and kept, by size class.
    private(set) var allocated = 0
    private var kept = 0
    /// Kept buffers, linked through their first word.
    private let free: UnsafeMutablePointer<UnsafeMutableRawPointer?>
    private var waiters = WaitQueue()
    /// Memory that is touched only where the rest does not suffice.
    private let places: UnsafeMutableRawPointer
    private var freePlaces = Array(0..<placeCount)

    static let smallest = 4096
    /// What one place holds: the requests of file systems and any block status, but not what copying
    /// programs read and write.
    static let placeSize = 256 << 10
    static let placeCount = 32
    package static let largest = Int(Limits.maximumPayload)
    private static let classCount = 14
    private static let defaultKeptLimit = 64 << 20

    /// - Precondition: `capacity` holds a buffer of the largest size.
    package init(capacity: Int) {
        precondition(capacity >= Self.largest)
        self.capacity = capacity
        keptLimit = min(capacity, Self.defaultKeptLimit)
        free = .allocate(capacity: Self.classCount)
        free.initialize(repeating: nil, count: Self.classCount)
        places = .allocate(
            byteCount: Self.placeCount * Self.placeSize, alignment: AlignedBuffer.alignment)
    }

    deinit {
        for index in 0..<Self.classCount { releaseKept(in: index) }
        free.deallocate()
        places.deallocate()
    }

    package var inUse: Int { shared + (Self.placeCount - freePlaces.count) * Self.placeSize }
    /// In use of what all share, which is what the capacity is for.
    private var shared: Int { allocated - kept }
    var hasWaiters: Bool { !waiters.isEmpty }
    /// Somebody found no room since `takeShortage`, even if there was a place then.
    private var wasShort = false
    var isShort: Bool { wasShort || hasWaiters }

    /// `isShort`, from one look to the next.
    func takeShortage() -> Bool {
        defer { wasShort = false }
        return isShort
    }

    /// The size class that holds `length` bytes.
    @inline(__always)
    static func sizeClass(_ length: Int) -> Int {
        assert(length > 0 && length <= largest)
        let pages = (length - 1) >> 12
        return Int.bitWidth - pages.leadingZeroBitCount
    }

    /// A buffer of at least `length` bytes, or nil: then `owner` waits, and tries again when
    /// `nextServed` names it.
    /// - Parameter holdsNothing: the owner has no other buffer.
    func take(
        _ length: Int, for owner: Int, holdsNothing: Bool = false
    ) -> UnsafeMutableRawPointer? {
        let fitsPlace = holdsNothing && length <= Self.placeSize
        let waiter = WaitQueue.Waiter(owner: owner, length: length, fitsPlace: fitsPlace)
        if let buffer = take(inTurn: waiter) { return buffer }
        wasShort = true
        guard fitsPlace, let place = freePlaces.popLast() else { return nil }
        waiters.remove(owner)
        return places + place * Self.placeSize
    }

    private func take(inTurn waiter: WaitQueue.Waiter) -> UnsafeMutableRawPointer? {
        let (owner, length) = (waiter.owner, waiter.length)
        if !waiters.isEmpty {
            guard let first = waiters.first, first.owner == owner else {
                waiters.append(waiter)
                return nil
            }
        }
        let index = Self.sizeClass(length)
        if let buffer = free[index] {
            free[index] = buffer.load(as: UnsafeMutableRawPointer?.self)
            kept -= Self.smallest << index
            waiters.remove(owner)
            return buffer
        }
        guard makeRoom(for: Self.smallest << index) else {
            waiters.append(waiter)
            return nil
        }
        waiters.remove(owner)
        return allocate(Self.smallest << index)
    }

    /// Gives back a buffer that was taken for `length` bytes.
    func give(_ buffer: UnsafeMutableRawPointer, length: Int) {
        if buffer >= places && buffer < places + Self.placeCount * Self.placeSize {
            freePlaces.append((buffer - places) / Self.placeSize)
            return
        }
        let index = Self.sizeClass(length)
        let size = Self.smallest << index
        if kept + size > keptLimit {
            allocated -= size
            Glibc.free(buffer)
            return
        }
        buffer.storeBytes(of: free[index], as: UnsafeMutableRawPointer?.self)
        free[index] = buffer
        kept += size
    }

    /// The first that waits, if there is room for it now; else the first that there is a place for.
    package var nextServed: Int? {
        guard let first = waiters.first else { return nil }
        let size = Self.smallest << Self.sizeClass(first.length)
        if shared + size <= capacity { return first.owner }
        return freePlaces.isEmpty ? nil : waiters.firstThatFitsPlace?.owner
    }

    /// `owner` needs nothing any more.
    func stopWaiting(_ owner: Int) {
        waiters.remove(owner)
    }

    /// Frees kept buffers, the largest first, until `size` more bytes fit.
    private func makeRoom(for size: Int) -> Bool {
        guard shared + size <= capacity else { return false }
        var index = Self.classCount - 1
        while allocated + size > capacity && index >= 0 {
            releaseKept(in: index)
            index -= 1
        }
        return true
    }

    private func releaseKept(in index: Int) {
        while let buffer = free[index] {
            free[index] = buffer.load(as: UnsafeMutableRawPointer?.self)
            kept -= Self.smallest << index
            allocated -= Self.smallest << index
            Glibc.free(buffer)
        }
    }

    private func allocate(_ size: Int) -> UnsafeMutableRawPointer {
        var memory: UnsafeMutableRawPointer?
        guard posix_memalign(&memory, AlignedBuffer.alignment, size) == 0, let memory else {
            fatalError("out of memory for a payload of \(size) bytes")
        }
        allocated += size
        return memory
    }
}

/// Who waits for memory, first come first served; each owner at most once.
private struct WaitQueue {
    struct Waiter {
        var owner: Int
        var length: Int
        var fitsPlace: Bool
    }

    // Short, and only used when memory has run out: an array is good enough.
    private var waiters: [Waiter] = []

    var isEmpty: Bool { waiters.isEmpty }
    var first: Waiter? { waiters.first }

    var firstThatFitsPlace: Waiter? { waiters.first { $0.fitsPlace } }

    mutating func append(_ waiter: Waiter) {
        if let index = waiters.firstIndex(where: { $0.owner == waiter.owner }) {
            waiters[index] = waiter
        } else {
            waiters.append(waiter)
        }
    }

    mutating func remove(_ owner: Int) {
        if waiters.isEmpty { return }
        waiters.removeAll { $0.owner == owner }
    }
}
