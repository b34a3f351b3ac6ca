// Payload buffers: sizes, bounds, reuse and turns.

import Testing

@testable import NBDServer

private let megabyte = 1 << 20

@Suite struct BufferPoolTests {
    @Test func sizeClasses() {
        #expect(BufferPool.sizeClass(1) == 0)
        #expect(BufferPool.sizeClass(512) == 0)
        #expect(BufferPool.sizeClass(4096) == 0)
        #expect(BufferPool.sizeClass(4097) == 1)
        #expect(BufferPool.sizeClass(8192) == 1)
        #expect(BufferPool.sizeClass(8193) == 2)
        #expect(BufferPool.sizeClass(32 * megabyte) == 13)
        for length in stride(from: 512, through: 32 * megabyte, by: 100_352) {
            let size = BufferPool.smallest << BufferPool.sizeClass(length)
            #expect(size >= length && (size / 2 < length || size == BufferPool.smallest))
        }
    }

    @Test func buffersAreReusedAndAligned() throws {
        let pool = BufferPool(capacity: 64 * megabyte)
        let first = try #require(pool.take(5000, for: 1))
        #expect(UInt(bitPattern: first) % 4096 == 0)
        pool.give(first, length: 5000)
        #expect(pool.take(8192, for: 2) == first)
        pool.give(first, length: 8192)
        #expect(pool.inUse == 0)
        #expect(pool.allocated == 8192)
    }

    @Test func keptBuffersMakeRoomForOtherSizes() throws {
        let pool = BufferPool(capacity: 32 * megabyte)
        let small = try (0..<8192).map { _ in try #require(pool.take(4096, for: 1)) }
        #expect(pool.inUse == 32 * megabyte)
        #expect(pool.take(512, for: 1) == nil)
        for buffer in small { pool.give(buffer, length: 4096) }
        #expect(pool.nextServed == 1)
        let large = try #require(pool.take(32 * megabyte, for: 1))
        #expect(pool.allocated == 32 * megabyte)
        #expect(!pool.hasWaiters)
        pool.give(large, length: 32 * megabyte)
    }

    @Test func firstComeFirstServed() throws {
        let pool = BufferPool(capacity: 32 * megabyte)
        let held = try (0..<8).map { _ in try #require(pool.take(4 * megabyte, for: 9)) }
        #expect(pool.take(16 * megabyte, for: 1) == nil)
        #expect(pool.take(4096, for: 2) == nil)
        #expect(pool.take(16 * megabyte, for: 1) == nil)  // waits once, however often it asks
        pool.give(held[0], length: 4 * megabyte)
        #expect(pool.nextServed == nil)
        #expect(pool.take(4096, for: 2) == nil)  // there is room, but 1 was first
        #expect(pool.take(4096, for: 3) == nil)
        for buffer in held[1..<4] { pool.give(buffer, length: 4 * megabyte) }
        #expect(pool.nextServed == 1)
        let large = try #require(pool.take(16 * megabyte, for: 1))
        #expect(pool.nextServed == nil)
        pool.stopWaiting(2)
        pool.give(large, length: 16 * megabyte)
        #expect(pool.nextServed == 3)
        let small = try #require(pool.take(4096, for: 3))
        #expect(!pool.hasWaiters)
        pool.give(small, length: 4096)
        for buffer in held[4...] { pool.give(buffer, length: 4 * megabyte) }
        #expect(pool.inUse == 0)
    }

    /// All memory is held, and many wait for more: small requests go on, one for each who has none.
    @Test func placesForSmallRequests() throws {
        let pool = BufferPool(capacity: 32 * megabyte)
        let hoarded = try #require(pool.take(32 * megabyte, for: 1))
        #expect(pool.take(32 * megabyte, for: 2, holdsNothing: true) == nil)
        #expect(pool.take(BufferPool.placeSize + 1, for: 3, holdsNothing: true) == nil)
        #expect(pool.take(4096, for: 4) == nil)
        var places: [UnsafeMutableRawPointer] = []
        for owner in 0..<BufferPool.placeCount {
            let length = owner % 2 == 0 ? BufferPool.placeSize : 512
            places.append(try #require(pool.take(length, for: 100 + owner, holdsNothing: true)))
        }
        for (index, place) in places.sorted(by: <).enumerated() where index > 0 {
            #expect(place - places.min()! == index * BufferPool.placeSize)
        }
        // It holds something, and then no more.
        #expect(pool.take(512, for: 5) == nil)
        #expect(pool.take(512, for: 5, holdsNothing: true) == nil)
        #expect(pool.nextServed == nil)
        pool.give(places.removeLast(), length: 512)
        #expect(pool.nextServed == 5)
        places.append(try #require(pool.take(512, for: 5, holdsNothing: true)))
        // Who was first for the rest still is.
        pool.give(hoarded, length: 32 * megabyte)
        #expect(pool.nextServed == 2)
        for place in places { pool.give(place, length: 512) }
        #expect(pool.nextServed == 2 && pool.inUse == 0)
    }
}
