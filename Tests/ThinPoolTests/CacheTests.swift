// CACHE: the map of a range is in memory afterwards, within bounds, and nothing fails for it.

import Glibc
import Testing
import ThinMetadata

@testable import ThinPool

@Suite struct CacheTests {
    private static let block = Bench.blockSize
    private static let page = 512 * block
    private static let pages = 6

    /// A volume of some pages with a mapping in each, just opened.
    private func bench(_ options: PoolOptions) throws -> (Bench, Volume) {
        let bench = try Bench(options: options)
        try bench.change(.create(name: "v", size: UInt64(Self.pages * Self.page)))
        let volume = try bench.volume("v")
        for page in 0..<Self.pages {
            #expect(try bench.write(1, volume, at: page * Self.page, length: Self.block) == 0)
        }
        try bench.rest()
        try bench.reopen()
        return (bench, try bench.volume("v"))
    }

    private func known(_ volume: Volume) -> [Bool] {
        (0..<Self.pages).map { volume.table.lookup(UInt64($0 * 512)) != .unknown }
    }

    @Test func whatIsCachedIsNotReadAgain() throws {
        var options = PoolOptions()
        options.bounds.cachedPages = 3
        let (bench, volume) = try bench(options)
        #expect(known(volume) == Array(repeating: false, count: Self.pages))
        // From inside the second page on: three pages, and the rest is not looked at.
        let start = Self.page + 5 * Self.block
        #expect(
            try bench.perform(.cache, volume, at: start, length: Self.pages * Self.page - start)
                == 0)
        #expect(known(volume) == [false, true, true, true, true, false])
        #expect(volume.table.lookup(512) != .unmapped && volume.table.lookup(513) == .unmapped)
        let before = bench.recording.now
        #expect(try bench.read(volume, at: 2 * Self.page, length: 512)[0] == 1)
        #expect(
            !bench.recording.ios.contains {
                $0.begin >= before && $0.device == .metadata && $0.kind == .read
            })
    }

    @Test func aHintIsNeverAnError() throws {
        var options = PoolOptions()
        options.cacheBlocks = 4
        let (bench, volume) = try bench(options)
        bench.recording.fault = {
            $0.device == .metadata && $0.kind == .read ? Fault(error: EIO) : nil
        }
        #expect(try bench.perform(.cache, volume, length: Self.pages * Self.page) == 0)
        #expect(try bench.perform(.cache, volume, length: 0) == 0)
        bench.recording.fault = nil
        #expect(try bench.perform(.cache, volume, length: Self.pages * Self.page) == 0)
        #expect(known(volume) == Array(repeating: true, count: Self.pages))
        #expect(try bench.read(volume, at: 0, length: 512)[0] == 1)
    }
}
