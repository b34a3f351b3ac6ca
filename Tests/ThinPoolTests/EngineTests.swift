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
        at: UInt64, vectors: UnsafePointer<iovec>, count: Int, isNew: Bool, durable: Bool,
        tag: UInt64
    ) -> Int32? { nil }
    func flush(tag: UInt64) -> Int32? { nil }
    func isHole(at: UInt64, length: UInt64) -> Bool { false }
    func contents(at: UInt64, length: Int) -> UnsafeMutableRawPointer? { nil }
    func zero(at: UInt64, length: UInt64, tag: UInt64) {}
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
}
