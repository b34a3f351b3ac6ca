// What simulated histories have found, each reduced to the steps that it takes.

import Glibc
import Testing
import ThinMetadata
import ThinPool

@Suite struct RegressionTests {
    private static let block = Bench.blockSize

    private static func isDataWrite(_ io: RecordedIO) -> Bool {
        io.device == .data && io.kind == .write && io.actor != .worker
    }

    /// A block that the path proves exclusive is written in place, the mapping table forgets that it
    /// allowed so, and a later write to the block finds that it has to copy: not before the first has
    /// landed, or the copy would be without it.
    @Test func aCopyHasWhatWasAllowedInPlace() throws {
        var options = PoolOptions()
        options.tableBytes = 1
        let bench = try Bench(options: options)
        for name in ["v", "w"] {
            try bench.change(.create(name: name, size: UInt64(2 * Self.block)))
            #expect(try bench.write(1, try bench.volume(name), at: 0, length: Self.block) == 0)
            try bench.change(.snapshot(origin: name, name: "of-\(name)"))
        }
        try bench.change(.delete(name: "of-v"))
        try bench.rest()
        let v = try bench.volume("v")
        let w = try bench.volume("w")

        bench.holds = Self.isDataWrite
        let first = bench.sendWrite(2, v, at: 0, length: 512)
        // The table has room for one volume's page only.
        _ = try bench.read(w, at: 0, length: 512)
        _ = try bench.read(w, at: Self.block, length: 512)
        // Something stops being shared, not yet durably: no path proves anything now.
        bench.holds = { Self.isDataWrite($0) || ($0.device == .metadata && $0.actor == .worker) }
        let deletion = bench.ask(.delete(name: "of-w"))
        try bench.settle()
        let second = bench.sendWrite(3, v, at: 4096, length: 512)
        try bench.settle()

        bench.holds = { _ in false }
        try bench.settle()
        #expect(bench.answer(first) == 0 && bench.answer(second) == 0 && deletion.isDone)
        let bytes = try bench.read(v, at: 0, length: 8192)
        #expect(bytes[..<512].allSatisfy { $0 == 2 }, "an acknowledged write is lost")
        #expect(bytes[4096..<4608].allSatisfy { $0 == 3 })
    }

    /// A volume of three pages of the mapping table, and room for fewer: whatever makes way for a
    /// page, it is not the page that was loaded just now, or a mapped block would read as a hole.
    @Test(arguments: [1, 2]) func aPageThatWasLoadedAnswers(volumes: Int) throws {
        var options = PoolOptions()
        options.tableBytes = 1
        let bench = try Bench(options: options)
        let page = 512 * Self.block
        for name in ["v", "w"].prefix(volumes) {
            try bench.change(.create(name: name, size: UInt64(3 * page)))
        }
        let v = try bench.volume("v")
        for number in 0..<3 {
            let data = UInt8(number + 1)
            #expect(
                try bench.write(data, v, at: number * page, length: Self.block) == 0)
        }
        for round in 0..<4 {
            for number in 0..<3 {
                let bytes = try bench.read(v, at: number * page, length: 512)
                #expect(
                    bytes.allSatisfy { $0 == UInt8(number + 1) }, "round \(round), page \(number)")
            }
        }
        // The bound is kept, but for the page that was used last and what of the directory it is in.
        #expect(bench.pool.tableBytes <= 2 * 4096)
    }

    /// The device reports a failed flush once; another reactor's, which ran at the same time, ends
    /// well although what it was to cover is lost.
    @Test(arguments: [true, false]) func noFlushIsAnsweredBesideOneThatFails(
        failsFirst: Bool
    ) throws {
        let bench = try Bench(reactors: 2)
        try bench.change(.create(name: "v", size: UInt64(2 * Self.block)))
        let v = try bench.volume("v")
        #expect(try bench.write(1, v, at: 0, length: Self.block, fua: true) == 0)
        #expect(try bench.write(2, v, at: 0, length: 512) == 0)
        bench.recording.fault = {
            $0.device == .data && $0.kind == .flush && $0.actor == .engine(0)
                ? Fault(error: EIO) : nil
        }
        bench.holds = { $0.device == .data && $0.kind == .flush }
        let failing = bench.send(.flush, v, on: 0)
        let other = bench.send(.flush, v, on: 1)
        // Both are under way at the device; the server hears of one end first.
        let late: RecordedIO.Actor = failsFirst ? .engine(1) : .engine(0)
        bench.holds = { $0.kind == .flush && $0.actor == late }
        try bench.settle()
        bench.holds = { _ in false }
        try bench.settle()
        #expect(bench.answer(failing) == EIO && bench.answer(other) == EIO)
        #expect(bench.pool.status().mode == .failed)
    }

    /// A killed server may leave a superblock that its device has not made durable. The next one must
    /// not give out blocks that are free in that state only.
    @Test func openingMakesDurableWhatItReads() throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(2 * Self.block)))
        try bench.rest()
        let before = bench.recording.now
        try bench.reopen()
        let flushes = bench.recording.ios.filter {
            $0.begin >= before && $0.device == .metadata && $0.kind == .flush
        }
        #expect(flushes.count == 1)
    }

    /// The end of a deletion needs a block for the new catalogue. A pool that has none comes to rest
    /// all the same, and the next change takes the entry along.
    @Test func deletionEndsInAFullPool() throws {
        var options = PoolOptions()
        options.bounds.smallDeletion = 0
        let bench = try Bench(dataBlocks: 8, options: options)
        try bench.change(.create(name: "v", size: UInt64(16 * Self.block)))
        try bench.change(.create(name: "w", size: UInt64(Self.block)))
        let v = try bench.volume("v")
        var filled = 0
        while try bench.write(1, v, at: filled * Self.block, length: Self.block) == 0 {
            filled += 1
        }
        #expect(filled > 0)
        try bench.change(.delete(name: "w"))
        try bench.rest()
        #expect(bench.pool.status().deleting == 0)
        #expect(bench.pool.volumeNames() == ["v"])
    }
}
