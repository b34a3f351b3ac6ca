// Block status: what the map says next to a model of it, and what an answer costs.

import Glibc
import Simulation
import Testing
import ThinMetadata
import ThinPool

@Suite struct ExtentsTests {
    private static let block = Bench.blockSize

    /// Which write gave each block of a volume its data block: what two volumes share is the same.
    private struct Model {
        var volumes: [String: [Int: Int]] = [:]
        var sizes: [String: Int] = [:]

        func status(_ kind: Kind, _ name: String, _ block: Int) -> UInt32 {
            let write = volumes[name]![block]
            switch kind {
            case .allocation: return write == nil ? Extent.hole | Extent.zero : 0
            case .sharing:
                let isShared =
                    write != nil
                    && volumes.contains { $0.key != name && $0.value[block] == write }
                return isShared ? Extent.shared : 0
            case .difference(let other):
                return write == volumes[other]![block] ? 0 : Extent.changed
            }
        }
    }

    private enum Kind: Equatable {
        case allocation, sharing
        case difference(String)
    }

    private func query(_ kinds: [Kind], _ bench: Bench, limit: Int) throws -> ExtentQuery {
        ExtentQuery(
            kinds: try kinds.map {
                switch $0 {
                case .allocation: .allocation
                case .sharing: .sharing
                case .difference(let other): .difference(from: try bench.volume(other))
                }
            }, limit: limit)
    }

    /// The answer is true of each of its bytes, keeps to the request, and has no equal neighbours.
    private func check(
        _ extents: [Extent], _ kind: Kind, _ name: String, _ range: Range<Int>, limit: Int,
        _ model: Model
    ) throws {
        try #require(!extents.isEmpty && extents.count <= limit)
        var at = range.lowerBound
        var last: UInt32?
        for extent in extents {
            let end = at + Int(extent.length)
            try #require(extent.length > 0 && end <= range.upperBound)
            #expect(extent.status != last)
            for block in at / Self.block..<(end + Self.block - 1) / Self.block {
                #expect(
                    model.status(kind, name, block) == extent.status,
                    "\(kind) of block \(block) of \(name)")
            }
            last = extent.status
            at = end
        }
    }

    private static let bounds: [(steps: Int, slice: Int)] = [(256, 16), (1, 1), (5, 2)]

    @Test(arguments: 0..<12 as Range<UInt64>) func asTheModelSays(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        var options = PoolOptions()
        (options.bounds.extentSteps, options.bounds.turnLeaves) = Self.bounds[Int(seed) % 3]
        options.cacheBlocks = [4, 256][random.below(2)]
        let bench = try Bench(dataBlocks: 200, reactors: 1, options: options)
        var model = Model()
        var writes = 0
        for name in ["a", "b"] {
            let blocks = name == "a" ? 40 : 24
            // Both end inside a block, and not at the same place in it.
            let size = blocks * Self.block - (name == "a" ? 512 : 1024)
            try bench.change(.create(name: name, size: UInt64(size)))
            model.volumes[name] = [:]
            model.sizes[name] = size
        }
        for round in 0..<60 {
            let names = model.volumes.keys.sorted()
            let name = names[random.below(names.count)]
            let volume = try bench.volume(name)
            let size = model.sizes[name]!
            let first = random.below((size + Self.block - 1) / Self.block)
            let count = min(1 + random.below(5), (size + Self.block - 1) / Self.block - first)
            let start = first * Self.block
            let length = min(count * Self.block, size - start)
            switch random.below(8) {
            case 0 where names.count < 6:
                try bench.change(.snapshot(origin: name, name: "s\(round)"))
                model.volumes["s\(round)"] = model.volumes[name]
                model.sizes["s\(round)"] = size
            case 1 where name.hasPrefix("s"):
                try bench.change(.delete(name: name))
                model.volumes[name] = nil
            case 2:
                #expect(try bench.perform(.trim, volume, at: start, length: length) == 0)
                for block in first..<first + count { model.volumes[name]![block] = nil }
            case 3:
                #expect(try bench.perform(.flush, volume) == 0)
            default:
                let isPart = random.oneIn(3)
                #expect(
                    try bench.write(1, volume, at: start, length: isPart ? 512 : length) == 0)
                for block in first..<first + (isPart ? 1 : count) {
                    // What is its own is written in place, and keeps its data block.
                    let isOwn =
                        model.volumes[name]![block] != nil
                        && model.status(.sharing, name, block) == 0
                    writes += 1
                    if !isOwn { model.volumes[name]![block] = writes }
                }
                if random.oneIn(3) { try bench.rest() }
            }
            try ask(model, bench, &random)
        }
        // The same from the disks.
        try bench.rest()
        try bench.reopen()
        for _ in 0..<10 { try ask(model, bench, &random) }
    }

    /// Asks of a random volume, the whole of it and a part.
    private func ask(_ model: Model, _ bench: Bench, _ random: inout SeededRandom) throws {
        let names = model.volumes.keys.sorted()
        let name = names[random.below(names.count)]
        let kinds: [Kind] = [
            .allocation, .sharing, .difference(names[random.below(names.count)]),
        ]
        let volume = try bench.volume(name)
        let sectors = model.sizes[name]! / 512
        let first = random.below(sectors)
        let part = first * 512..<(first + 1 + random.below(sectors - first)) * 512
        for range in [0..<model.sizes[name]!, part] {
            let limit = [1, 3, 1000][random.below(3)]
            let query = try query(kinds, bench, limit: limit)
            #expect(
                try bench.ask(query, volume, at: range.lowerBound, length: range.count) == 0)
            for (kind, extents) in zip(kinds, query.extents) {
                try check(extents, kind, name, range, limit: limit, model)
            }
        }
    }

    /// All extents of a range, request by request; and how many requests it took.
    private func all(
        _ kind: Kind, _ volume: Volume, _ bench: Bench
    ) throws -> (extents: [Extent], requests: Int) {
        var extents: [Extent] = []
        var requests = 0
        var at: UInt64 = 0
        while at < volume.size {
            let query = try query([kind], bench, limit: 100)
            try #require(
                try bench.ask(query, volume, at: Int(at), length: Int(volume.size - at)) == 0)
            for extent in query.extents[0] {
                at += extent.length
                if extents.last?.status == extent.status {
                    extents[extents.count - 1].length += extent.length
                } else {
                    extents.append(extent)
                }
            }
            requests += 1
        }
        return (extents, requests)
    }

    @Test func aHoleIsOneExtentHoweverLarge() throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: Volume.maxSize))
        try bench.change(.create(name: "w", size: 1 << 40))
        let v = try bench.volume("v")
        #expect(try bench.write(1, v, at: 1 << 50, length: Self.block) == 0)
        let answer = try all(.allocation, v, bench)
        #expect(answer.requests == 1)
        #expect(
            answer.extents == [
                Extent(length: 1 << 50, status: Extent.hole | Extent.zero),
                Extent(length: 65_536, status: 0),
                Extent(
                    length: Volume.maxSize - (1 << 50) - 65_536, status: Extent.hole | Extent.zero),
            ])
        // What is beyond the end of the other counts as a hole there.
        #expect(try all(.difference("w"), v, bench).extents.map(\.status) == [0, 1, 0])
        #expect(try all(.sharing, v, bench).extents == [Extent(length: v.size, status: 0)])
    }

    /// A long run of mappings is one extent, and no request looks at more of it than its bound.
    @Test func aLongRunTakesBoundedSteps() throws {
        var options = PoolOptions()
        options.bounds.extentSteps = 4
        options.bounds.turnLeaves = 1
        let blocks = 8000
        let bench = try Bench(dataBlocks: blocks + 20, options: options)
        try bench.change(.create(name: "v", size: UInt64(blocks * Self.block)))
        let v = try bench.volume("v")
        #expect(
            try bench.perform(
                .writeZeroes, v, length: blocks * Self.block, noHole: true) == 0)
        let run = [Extent(length: v.size, status: 0)]
        let answer = try all(.allocation, v, bench)
        #expect(answer.extents == run)
        // A leaf has 84 to 252 mappings.
        #expect((blocks / 252 / 4...blocks / 84 / 4 + 1).contains(answer.requests))
        try bench.change(.snapshot(origin: "v", name: "s"))
        #expect(try all(.difference("s"), v, bench) == (run, 1))
        #expect(
            try all(.sharing, v, bench).extents == [Extent(length: v.size, status: Extent.shared)])
        // One change: the leaf that has it is looked at, and little else.
        #expect(try bench.write(1, v, at: 5000 * Self.block, length: 512) == 0)
        let changed = try all(.difference("s"), v, bench)
        #expect(changed.extents.map(\.status) == [0, 1, 0] && changed.requests <= 2)
        #expect(changed.extents[0].length == UInt64(5000 * Self.block))
    }

    /// The map after a failure is that of the last commit.
    @Test func aFailedPoolStillAnswers() throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(4 * Self.block)))
        let v = try bench.volume("v")
        #expect(try bench.write(1, v, at: 0, length: Self.block, fua: true) == 0)
        #expect(try bench.write(2, v, at: Self.block, length: Self.block) == 0)
        bench.recording.fault = {
            $0.device == .data && $0.kind == .flush ? Fault(error: EIO) : nil
        }
        #expect(try bench.perform(.flush, v) == EIO)
        try bench.settle()
        #expect(bench.pool.status().mode == .failed)
        #expect(
            try all(.allocation, v, bench).extents == [
                Extent(length: 65_536, status: 0),
                Extent(length: 3 * 65_536, status: Extent.hole | Extent.zero),
            ])
    }

    @Test func nothingIsComparedWithADeletedVolume() throws {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(4 * Self.block)))
        try bench.change(.snapshot(origin: "v", name: "s"))
        let query = try query([.difference("s")], bench, limit: 1)
        let v = try bench.volume("v")
        try bench.change(.delete(name: "s"))
        // Another one gets its device.
        try bench.change(.create(name: "s", size: UInt64(4 * Self.block)))
        #expect(try bench.ask(query, v, at: 0, length: 512) == EINVAL)
    }
}
