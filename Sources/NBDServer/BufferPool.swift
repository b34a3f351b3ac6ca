// A reactor's payload buffers: page-aligned, in powers of two, bounded in sum, reused.
//
// 1. Buffers in use and buffers kept for reuse together never exceed `capacity`.
// 2. A buffer is for a whole payload and is taken before its first byte is received, so a write
//    that has begun never waits for memory to go on: taking cannot deadlock.
// 3. Whoever finds no room waits in a queue; until the first in it has been served nobody else
//    gets anything, so that a large request is not starved by small ones.

import BlockIO
import Glibc

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

    static let smallest = 4096
    package static let largest = 32 << 20
    private static let classCount = 14
    private static let defaultKeptLimit = 64 << 20

    /// - Precondition: `capacity` holds a buffer of the largest size.
    package init(capacity: Int) {
        precondition(capacity >= Self.largest)
        self.capacity = capacity
        keptLimit = min(capacity, Self.defaultKeptLimit)
        free = .allocate(capacity: Self.classCount)
        free.initialize(repeating: nil, count: Self.classCount)
    }

    deinit {
        for index in 0..<Self.classCount { releaseKept(in: index) }
        free.deallocate()
    }

    package var inUse: Int { allocated - kept }
    var hasWaiters: Bool { !waiters.isEmpty }

    /// The size class that holds `length` bytes.
    @inline(__always)
    static func sizeClass(_ length: Int) -> Int {
        assert(length > 0 && length <= largest)
        let pages = (length - 1) >> 12
        return Int.bitWidth - pages.leadingZeroBitCount
    }

    /// A buffer of at least `length` bytes, or nil: then `owner` waits, and tries again when
    /// `nextServed` names it.
    func take(_ length: Int, for owner: Int) -> UnsafeMutableRawPointer? {
        if !waiters.isEmpty {
            guard let first = waiters.first, first.owner == owner else {
                waiters.append(owner: owner, length: length)
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
            waiters.append(owner: owner, length: length)
            return nil
        }
        waiters.remove(owner)
        return allocate(Self.smallest << index)
    }

    /// Gives back a buffer that was taken for `length` bytes.
    func give(_ buffer: UnsafeMutableRawPointer, length: Int) {
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

    /// The first that waits, if there is room for it now.
    package var nextServed: Int? {
        guard let first = waiters.first else { return nil }
        let size = Self.smallest << Self.sizeClass(first.length)
        return inUse + size <= capacity ? first.owner : nil
    }

    /// `owner` needs nothing any more.
    func stopWaiting(_ owner: Int) {
        waiters.remove(owner)
    }

    /// Frees kept buffers, the largest first, until `size` more bytes fit.
    private func makeRoom(for size: Int) -> Bool {
        guard inUse + size <= capacity else { return false }
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
    }

    // Short, and only used when memory has run out: an array is good enough.
    private var waiters: [Waiter] = []

    var isEmpty: Bool { waiters.isEmpty }
    var first: Waiter? { waiters.first }

    mutating func append(owner: Int, length: Int) {
        if waiters.contains(where: { $0.owner == owner }) { return }
        waiters.append(Waiter(owner: owner, length: length))
    }

    mutating func remove(_ owner: Int) {
        if waiters.isEmpty { return }
        waiters.removeAll { $0.owner == owner }
    }
}
