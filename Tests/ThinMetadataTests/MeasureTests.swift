// How long the hot calls take. Prints; run in release with WAFER_MEASURE=1.

import Foundation
import Testing
import ThinMetadata

@Suite(.enabled(if: ProcessInfo.processInfo.environment["WAFER_MEASURE"] != nil), .serialized)
struct MeasureTests {
    /// The thread's CPU time: what else runs on the machine counts as little as possible.
    private func nanoseconds(_ body: () throws -> Void) rethrows -> Double {
        func now() -> Double {
            var time = timespec()
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
            return Double(time.tv_sec) * 1e9 + Double(time.tv_nsec)
        }
        let start = now()
        try body()
        return now() - start
    }

    private func time(_ what: String, _ count: Int, _ body: () throws -> Void) rethrows {
        let each = Int(try nanoseconds(body) / Double(count))
        print("MEASURE \(what): \(each) ns each, \(count) times")
    }

    private func write(_ pool: ThinMetadata, _ device: TestDevice) throws -> Int {
        let frozen = try pool.freeze()
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        defer { buffer.deallocate() }
        for index in 0..<frozen.blocks {
            let target = frozen.copyBlock(index, to: buffer)
            memcpy(device.block(target.rawValue), buffer, 4096)
        }
        frozen.copySuperblock(to: device.block(0))
        let freed = pool.committed(frozen)
        pool.makeAvailable(freed.discarded + freed.replaced)
        pool.trimCache()
        return frozen.blocks
    }

    @Test(arguments: [1_000, 300_000]) func hotCalls(mappings: Int) throws {
        let device = TestDevice(blocks: 60_000)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 4_000_000)
        let pool = try ThinMetadata(device, cacheBlocks: 30_000)
        let id = ThinDeviceID(1)
        try pool.createThin(id)
        print("MEASURE -- \(mappings) mappings")
        try time("insert, sequential", mappings) {
            for index in 0..<mappings {
                let block = try pool.allocateDataBlock()!
                _ = try pool.insert(id, VirtualBlock(UInt64(index)), block)
            }
        }
        var blocks = 0
        try time("freeze and copy out everything", 1) { blocks = try write(pool, device) }
        print("MEASURE    \(blocks) blocks")
        var random = Generator(seed: 1)
        let keys = (0..<1_000_000).map { _ in UInt64(random.below(mappings)) }
        var sum: UInt64 = 0
        try time("lookup, random", keys.count) {
            for key in keys { sum &+= try pool.lookup(id, VirtualBlock(key))!.rawValue }
        }
        try time("lookup, sequential", mappings) {
            for key in 0..<UInt64(mappings) {
                sum &+= try pool.lookup(id, VirtualBlock(key))!.rawValue
            }
        }
        try time("isExclusive", keys.count) {
            for key in keys { sum &+= try pool.isExclusive(id, VirtualBlock(key)) ? 1 : 0 }
        }
        for batch in [1, 100] {
            var durations: [Double] = []
            for _ in 0..<300 {
                for _ in 0..<batch {
                    let block = try pool.allocateDataBlock()!
                    _ = try pool.insert(id, VirtualBlock(keys[random.below(keys.count)]), block)
                }
                var frozen: FrozenTransaction?
                durations.append(try nanoseconds { frozen = try pool.freeze() } / 1000)
                blocks = frozen!.blocks
                let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
                defer { buffer.deallocate() }
                for index in 0..<frozen!.blocks {
                    let target = frozen!.copyBlock(index, to: buffer)
                    memcpy(device.block(target.rawValue), buffer, 4096)
                }
                frozen!.copySuperblock(to: device.block(0))
                let freed = pool.committed(frozen!)
                pool.makeAvailable(freed.discarded + freed.replaced)
                pool.trimCache()
            }
            durations.sort()
            print(
                "MEASURE freeze after \(batch) random overwrites: median \(durations[150]) us, "
                    + "\(blocks) blocks")
        }
        try pool.createSnapshot(ThinDeviceID(2), of: id)
        _ = try write(pool, device)
        let shuffled = (0..<UInt64(mappings)).shuffled(using: &random).prefix(50_000)
        try time("insert, breaking sharing at random", shuffled.count) {
            for key in shuffled {
                let block = try pool.allocateDataBlock()!
                _ = try pool.insert(id, VirtualBlock(key), block)
            }
        }
        _ = try write(pool, device)
        let again = shuffled.shuffled(using: &random)
        try time("insert, overwriting at random", again.count) {
            for key in again {
                let block = try pool.allocateDataBlock()!
                _ = try pool.insert(id, VirtualBlock(key), block)
            }
        }
        _ = try write(pool, device)
        try time("remove, in calls of 4096", mappings) {
            var from: UInt64? = 0
            while let start = from {
                from = try pool.remove(id, start..<UInt64.max, limit: 4096) { _, _ in }?.rawValue
            }
        }
        _ = try write(pool, device)
        try time("deleteDevice, a mapping", mappings) { try pool.deleteDevice(ThinDeviceID(2)) }
        _ = try write(pool, device)
        #expect(sum != 0)
        #expect(try readImage(device).dataAllocated == 0)
    }
}
