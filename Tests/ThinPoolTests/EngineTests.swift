// Engines of several reactors on one pool.

import BlockIO
import Glibc
import Synchronization
import Testing
import ThinMetadata

@testable import ThinPool

/// No request is made of these engines.
private final class NoDataIO: DataIO {
    func read(at: UInt64, into: UnsafeMutableRawPointer, length: Int, tag: UInt64) -> Int32? {
        nil
    }
    func write(
        at: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool, tag: UInt64
    ) -> Int32? { nil }
    func flush(tag: UInt64) -> Int32? { nil }
    func isHole(at: UInt64, length: UInt64) -> Bool { false }
    func contents(at: UInt64, length: Int) -> UnsafeMutableRawPointer? { nil }
    func zero(at: UInt64, length: UInt64, tag: UInt64) -> Bool { true }
}

@Suite struct EngineTests {
    private final class Start: Sendable {
        private static let threads = 4
        private let waiting = Atomic<Int>(threads)
        private let engines = Mutex<[VolumeIO]>([])
        private let pool: Pool

        init(_ pool: Pool) { self.pool = pool }

        /// Makes an engine on each of some threads, as nearly at once as can be.
        func run() -> [VolumeIO] {
            var threads = [pthread_t](repeating: pthread_t(), count: Self.threads)
            for index in threads.indices {
                pthread_create(
                    &threads[index], nil,
                    { argument in
                        Unmanaged<Start>.fromOpaque(argument!).takeRetainedValue().make()
                        return nil
                    }, Unmanaged.passRetained(self).toOpaque())
            }
            for thread in threads { pthread_join(thread, nil) }
            return engines.withLock { $0 }
        }

        private func make() {
            waiting.wrappingSubtract(1, ordering: .sequentiallyConsistent)
            while waiting.load(ordering: .sequentiallyConsistent) > 0 { sched_yield() }
            let engine = VolumeIO(pool: pool, io: NoDataIO()) {}
            engines.withLock { $0.append(engine) }
        }
    }

    /// What is posted to an engine goes by its index: two with the same would get each other's.
    @Test func enginesThatStartTogetherAreToldApart() throws {
        let metadata = try MemoryDevice(size: 2 << 20)
        let data = try MemoryDevice(size: 2 << 20)
        try ThinMetadata.format(metadata, dataBlockSectors: 128, dataBlocks: 32)
        let pool = try Pool(metadata: metadata, data: data)
        for _ in 0..<500 {
            let engines = Start(pool).run()
            try #require(Set(engines.map(\.index)).count == engines.count)
            try #require(Set(engines.map(\.reader)).count == engines.count)
            for engine in engines {
                try #require(pool.engine(engine.index) === engine)
            }
            for engine in engines { engine.close() }
        }
    }

    /// What is done on the spot is shared out, whether the map is known or has to be asked first.
    @Test(arguments: [false, true])
    func aLongHoleKeepsNobodyWaiting(isMapKnown: Bool) throws {
        let length = 32 << 20
        let bench = try Bench()
        try bench.change(.create(name: "v", size: 1 << 30))
        let v = try bench.volume("v")
        bench.reactors[0].engine.isShared = true
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: length, alignment: 4096)
        defer { memory.deallocate() }
        memset(memory.baseAddress!, 1, length)
        if isMapKnown { _ = try bench.read(v, at: 0, length: 512) }

        let long = bench.send(.read, v, at: 512, length: length, buffer: memory.baseAddress)
        for block in 0..<20 {
            let bytes = try bench.read(v, at: (600 + block) * Bench.blockSize, length: 4096)
            #expect(bytes.allSatisfy { $0 == 0 })
        }
        #expect(bench.answer(long) == nil)
        try bench.settle { bench.answer(long) != nil }
        #expect(bench.answer(long) == 0)
        #expect(memory.allSatisfy { $0 == 0 })
    }

    /// A bench with a volume "v" whose blocks are all mapped.
    private func mapped(
        blocks: Int, _ bounds: PoolBounds, spare: Int = 0
    ) throws -> (Bench, Volume) {
        var options = PoolOptions()
        options.bounds = bounds
        let bench = try Bench(dataBlocks: blocks + spare + 20, options: options)
        let length = blocks * Bench.blockSize
        try bench.change(.create(name: "v", size: UInt64(length)))
        let v = try bench.volume("v")
        #expect(try bench.perform(.writeZeroes, v, length: length, noHole: true) == 0)
        return (bench, v)
    }

    /// Requests of 28 bytes that are thousands of steps each.
    @Test func slotsAreBounded() throws {
        var bounds = PoolBounds()
        bounds.steps = 32
        let (blocks, count) = (70, 200)
        let (bench, v) = try mapped(blocks: blocks, bounds)
        bench.holds = { $0.device == .data }
        let requests = (0..<count).map { _ in
            bench.send(.writeZeroes, v, length: blocks * Bench.blockSize, noHole: true)
        }
        #expect(bench.reactors[0].engine.steps.taken <= bounds.steps + Int(bounds.window) + count)
        bench.holds = { _ in false }
        try bench.settle { requests.allSatisfy { bench.answer($0) != nil } }
        #expect(requests.allSatisfy { bench.answer($0) == 0 })
    }

    /// Many questions are answered by and by; what needs one look at the map is not behind them.
    @Test func questionsAreAnsweredByAndBy() throws {
        var bounds = PoolBounds()
        bounds.turnLeaves = 1
        let (bench, v) = try mapped(blocks: 1000, bounds)
        let queries = (0..<300).map { _ in ExtentQuery(kinds: [.allocation], limit: 100) }
        bench.holds = { _ in true }
        let questions = queries.map { bench.send(.extents, v, length: Int(v.size), query: $0) }
        #expect(questions.count { bench.answer($0) != nil } < 300)
        bench.holds = { _ in false }
        let write = bench.sendWrite(7, v, at: 0, length: 512)
        try bench.settle { bench.answer(write) != nil }
        #expect(questions.contains { bench.answer($0) == nil })
        try bench.settle { questions.allSatisfy { bench.answer($0) == 0 } }
        #expect(
            queries.allSatisfy { $0.extents == [[Extent(length: v.size, status: 0)]] })
    }

    /// A request that has hundreds of blocks to find leaves the turn to others after some of them.
    @Test func aTurnLooksUpABoundedNumber() throws {
        let blocks = 300
        var options = PoolOptions()
        (options.bounds.window, options.bounds.turnAsks) = (1000, 16)
        let bench = try Bench(dataBlocks: blocks + 20, options: options)
        let length = blocks * Bench.blockSize
        try bench.change(.create(name: "v", size: UInt64(length)))
        let v = try bench.volume("v")
        let before = bench.recording.ios.count
        bench.holds = { $0.device == .data }
        let request = bench.send(.writeZeroes, v, length: length, noHole: true)
        #expect(1...16 ~= bench.recording.ios.count - before)
        bench.holds = { _ in false }
        try bench.settle { bench.answer(request) != nil }
        #expect(bench.answer(request) == 0)
        let query = ExtentQuery(kinds: [.allocation], limit: 3)
        #expect(try bench.ask(query, v, at: 0, length: length) == 0)
        #expect(query.extents == [[Extent(length: UInt64(length), status: 0)]])
    }

    /// An unmap that went past thousands of busy blocks has used up the turn, and more; the turn goes on
    /// when one of them is filled.
    @Test func anUnmapBesideManyFills() throws {
        let blocks = 3000
        var bounds = PoolBounds()
        (bounds.turnLeaves, bounds.window, bounds.steps, bounds.turnAsks) = (1, 4000, 9000, 9000)
        let (bench, v) = try mapped(blocks: 600, bounds, spare: blocks)
        try bench.change(.create(name: "w", size: UInt64(blocks * Bench.blockSize)))
        let w = try bench.volume("w")
        bench.holds = { $0.device == .data }
        // The second waits for the blocks of the first.
        let fills = (0..<2).map { _ in
            bench.send(.writeZeroes, w, length: blocks * Bench.blockSize, noHole: true)
        }
        try bench.settle()
        let unmap = bench.send(.trim, v, length: Int(v.size))
        #expect(bench.answer(unmap) == nil)
        bench.holds = { _ in false }
        try bench.settle { (fills + [unmap]).allSatisfy { bench.answer($0) != nil } }
        #expect((fills + [unmap]).allSatisfy { bench.answer($0) == 0 })
    }

    /// What one unmap gives back does not all come with one commit.
    @Test func anUnmapWaitsForCommits() throws {
        var bounds = PoolBounds()
        bounds.deletionBatch = 100
        let (bench, v) = try mapped(blocks: 1000, bounds)
        try bench.rest()
        let unmap = bench.send(.trim, v, length: Int(v.size))
        var most = 0
        try bench.settle {
            most = max(most, bench.pool.metadata.discardedBlocks)
            return bench.answer(unmap) != nil
        }
        #expect(bench.answer(unmap) == 0)
        #expect(1..<300 ~= most)
        #expect(try bench.sectors(v, blocks: 0..<1000).allSatisfy { $0 == 0 })
    }

    /// What is left of a request that nobody waits for is not done.
    @Test(arguments: [VolumeOperation.writeZeroes, .extents])
    func abandonedRequestsEnd(_ operation: VolumeOperation) throws {
        var bounds = PoolBounds()
        (bounds.window, bounds.turnLeaves) = (2, 1)
        let (bench, v) = try mapped(blocks: 1000, bounds)
        let isAbandoned = UnsafeMutablePointer<Bool>.allocate(capacity: 1)
        defer { isAbandoned.deallocate() }
        isAbandoned.initialize(to: false)
        let query = ExtentQuery(kinds: [.allocation], limit: 100)
        bench.holds = { $0.device == .data }
        let before = bench.recording.ios.count
        let request = bench.send(
            operation, v, length: Int(v.size), noHole: true, query: query,
            isAbandoned: isAbandoned)
        isAbandoned.pointee = true
        bench.holds = { _ in false }
        try bench.settle { bench.answer(request) != nil }
        #expect(bench.recording.ios.count - before <= 2)
        #expect(query.extents[0].reduce(0) { $0 + $1.length } < v.size)
    }
}
