// A pool that is full: what fails, what goes on, and how it comes back.

import Foundation
import Testing

@Suite struct SpaceTests {
    private static let block = 64 * kibibyte
    private static let poolBlocks: UInt64 = 64

    private func place(_ block: UInt64) -> UInt64 { block * Self.block + 8192 }

    private func smallPool(_ volumes: [String]) throws -> TestPool {
        try TestPool(
            data: Self.poolBlocks * Self.block, volumes: volumes.map { ($0, 16 * mebibyte) })
    }

    /// Writes to one block after the other from `first` on, until one is refused for want of space.
    /// - Returns: the block that was refused.
    private func fill(_ client: Client, from first: UInt64, stamp: UInt64) throws -> UInt64 {
        var block = first
        while true {
            let error = try code {
                try client.write(place(block), pattern(stamp, place(block), 4096))
            }
            if error == ENOSPC { return block }
            guard error == 0 else { throw Failure("block \(block): errno \(error)") }
            block += 1
            guard block <= first + Self.poolBlocks else {
                throw Failure("more blocks were written than there are")
            }
        }
    }

    private func expect(
        _ client: Client, _ block: UInt64, holds stamp: UInt64,
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let bytes = try client.read(place(block), 4096)
        #expect(
            same(bytes, pattern(stamp, place(block), 4096)), "block \(block)",
            sourceLocation: sourceLocation)
    }

    @Test(arguments: Engine.allCases) func fullPool(engine: Engine) throws {
        let pool = try smallPool(["vol"])
        let server = try Server(pool, engine: engine)
        let client = try Client(server, "vol")
        let full = try fill(client, from: 0, stamp: 1)
        // Some blocks are the catalogue's, or kept back for it.
        #expect(full > Self.poolBlocks - 8 && full < Self.poolBlocks)

        // Refused again and again, nothing of it is seen, and all else goes on.
        for block in full..<full + 4 {
            let bytes = pattern(2, place(block), 4096)
            #expect(try code { try client.write(place(block), bytes) } == ENOSPC)
            #expect(isZero(try client.read(place(block), 4096)))
            #expect(
                try code { try client.zero(place(block), 512, flags: Client.noHole) } == ENOSPC)
            try client.zero(place(block), 512)
        }
        for block in 0..<full {
            try expect(client, block, holds: 1)
            try client.write(place(block), pattern(3, place(block), 4096), flags: Client.fua)
        }
        try client.flush()

        // Discard, answered; then write elsewhere at once, many commands together: the space is
        // there, though no commit had given it back yet.
        var mapped = Array(0..<full)
        var next = full
        for round in 0..<12 {
            let count = UInt64(1 + round % 4 * 10)
            let gone = mapped.prefix(Int(count))
            mapped.removeFirst(Int(count))
            for block in gone {
                let length = round % 2 == 0 ? Self.block : 2 * Self.block
                // The longer ones reach into what is not mapped any more, or goes next.
                if round % 2 == 0 || gone.contains(block + 1) {
                    try client.trim(block * Self.block, length)
                } else {
                    try client.zero(block * Self.block, Self.block)
                }
            }
            let batch = Batch(client)
            for block in next..<next + count {
                try batch.write(place(block % 256), pattern(4, place(block % 256), 4096))
            }
            let errors = try batch.wait()
            #expect(errors.allSatisfy { $0 == 0 }, "round \(round): \(errors)")
            mapped += (next..<next + count).map { $0 % 256 }
            next += count
        }
        for block in mapped {
            #expect(try stamps(client.read(place(block), 4096), place(block))[0] >= 3)
        }
        #expect(try code { try client.write(place(next % 256), pattern(5, 0, 512)) } == ENOSPC)
        try client.flush()
        try client.disconnect()
        try server.stop()
        try pool.expectClean()
        #expect(try pool.volumes()[0].mappedBytes == full * Self.block)
    }

    /// The log says it once when it comes to that, and the pool's status as long as it is so.
    @Test func fullnessIsTold() throws {
        let pool = try smallPool(["vol"])
        let server = try Server(pool)
        let client = try Client(server, "vol")
        func warnings() -> [Substring] {
            server.program.error.split(separator: "\n").filter {
                $0.contains("warning") && $0.contains("data block")
            }
        }
        func expect(_ count: Int, _ problem: String?) throws {
            var problems: [String] = []
            let told = try eventually {
                problems = try pool.status().problems
                return warnings().count == count && problems.count == (problem == nil ? 0 : 1)
                    && problems.first?.contains(problem ?? "") != false
            }
            #expect(told, "\(count): \(problems) \(server.program.error)")
        }
        func write(_ blocks: Range<UInt64>) throws {
            for block in blocks {
                try client.write(place(block), pattern(1, place(block), 4096))
                try client.flush()
            }
        }
        try write(0..<40)
        try expect(0, nil)
        try write(40..<54)
        try expect(1, "data blocks are in use")
        try write(54..<59)
        try expect(2, "data blocks are in use")
        let full = try fill(client, from: 59, stamp: 1)
        for block in full..<full + 4 {
            #expect(try code { try client.write(place(block), pattern(1, 0, 512)) } == ENOSPC)
        }
        try expect(3, "no data block left")
        #expect(try pool.status().problems.first?.contains("discard") == true)
        // It is no damage, and the next server says it, too.
        try pool.must("pool", "check", pool.path)
        try server.stop()
        try pool.expectClean()
        let next = try Server(pool)
        #expect(next.program.error.contains("no data block left"))
        let other = try Client(next, "vol")
        try other.trim(0, 40 * Self.block)
        try other.flush()
        #expect(try eventually { try pool.status().problems.isEmpty })
        _ = try fill(other, from: full, stamp: 1)
        #expect(
            try eventually { try pool.status().problems.contains { $0.contains("no data block") } })
        #expect(next.program.error.split(separator: "no data block left").count == 3)
        try next.stop()
    }

    /// Of many writes at once as many succeed as there is space for, and the others leave nothing.
    @Test(arguments: Engine.allCases) func fullInTheMiddleOfABatch(engine: Engine) throws {
        let pool = try smallPool(["vol"])
        let server = try Server(pool, engine: engine, options: ["--reactors", "2"])
        let clients = try [Client.Transport.unix, .tcp].map { try Client(server, "vol", via: $0) }
        let batches = clients.map { Batch($0) }
        for block in 0..<UInt64(100) {
            let bytes = pattern(1, place(block), 4096)
            try batches[Int(block % 2)].write(place(block), bytes)
        }
        let errors = try batches.map { try $0.wait() }
        var written: UInt64 = 0
        for block in 0..<UInt64(100) {
            let error = errors[Int(block % 2)][Int(block / 2)]
            #expect(error == 0 || error == ENOSPC)
            try expect(clients[0], block, holds: error == 0 ? 1 : 0)
            written += error == 0 ? 1 : 0
        }
        try clients[0].flush()
        #expect(try pool.volumes()[0].mappedBytes == written * Self.block)
        #expect(try pool.status().dataBlocksUsed == written + 1)
        #expect(written > Self.poolBlocks - 8)
        try server.stop()
        try pool.expectClean()
    }

    /// Deleting gives space back, also in a full pool; so does growing it.
    @Test(arguments: Engine.allCases) func recovery(engine: Engine) throws {
        let pool = try smallPool(["vol", "other"])
        var server = try Server(pool, engine: engine)
        var client = try Client(server, "vol")
        try Client(server, "other").write(0, pattern(1, 0, 10 << 16))
        for block in 0..<UInt64(10) {
            try client.write(place(block), pattern(2, place(block), 4096))
        }
        try pool.snapshot("vol", "snap")
        let full = try fill(client, from: 10, stamp: 2)

        // What the snapshot shares cannot be written, and stays what it is.
        for block in 0..<UInt64(10) {
            let bytes = pattern(3, place(block), 4096)
            #expect(try code { try client.write(place(block), bytes) } == ENOSPC)
            try expect(client, block, holds: 2)
        }
        try pool.delete("snap")
        for block in 0..<UInt64(10) {
            try client.write(place(block), pattern(3, place(block), 4096))
        }
        #expect(try fill(client, from: full, stamp: 3) == full)
        try pool.delete("other")
        let more = try fill(client, from: full, stamp: 4)
        #expect(more >= full + 10)

        try server.stop()
        let twice = 2 * Self.poolBlocks * Self.block
        try pool.must("pool", "grow", pool.path, "--data-size", "\(twice)")
        try pool.expectClean()
        server = try Server(pool, engine: engine)
        client = try Client(server, "vol")
        #expect(try fill(client, from: more, stamp: 5) == more + Self.poolBlocks)
        for block in 0..<UInt64(10) { try expect(client, block, holds: 3) }
        for block in 10..<full { try expect(client, block, holds: 2) }
        for block in full..<more { try expect(client, block, holds: 4) }
        for block in more..<more + Self.poolBlocks { try expect(client, block, holds: 5) }
        try server.stop()
        try pool.expectClean()
    }

    /// WRITE_ZEROES with NO_HOLE takes the space: no later write there fails for want of it.
    @Test(arguments: Engine.allCases) func noHoleProvisions(engine: Engine) throws {
        let pool = try smallPool(["vol", "filler"])
        let server = try Server(pool, engine: engine)
        let client = try Client(server, "vol")
        // Unmapped, mapped, and shared blocks; parts of blocks at both ends.
        try client.write(place(2), pattern(1, place(2), 4096))
        try client.write(place(4), pattern(1, place(4), 4096))
        try pool.snapshot("vol", "snap")
        try client.write(place(4), pattern(2, place(4), 4096))
        try client.zero(Self.block / 2, 8 * Self.block, flags: Client.noHole)
        // Zeroes without provisioning, for comparison.
        try client.zero(20 * Self.block, 4 * Self.block)
        #expect(isZero(try client.read(0, 9 << 16)))
        let snapshot = try Client(server, "snap")
        try expect(snapshot, 2, holds: 1)
        try expect(snapshot, 4, holds: 1)

        _ = try fill(try Client(server, "filler"), from: 0, stamp: 7)
        for block in 0..<UInt64(9) {
            try client.write(place(block), pattern(3, place(block), 4096))
        }
        #expect(try code { try client.write(place(21), pattern(3, place(21), 4096)) } == ENOSPC)
        for block in 0..<UInt64(9) { try expect(client, block, holds: 3) }
        try server.stop()
        try pool.expectClean()
        #expect(try pool.volumes().first { $0.name == "vol" }?.mappedBytes == 9 * Self.block)
    }

    /// Somebody truncates the data file: what was there is an error, and the server goes on. (The thread
    /// sanitizer has a memcpy of its own, which no signal's handler may leave.)
    @Test(arguments: AttackedServer.sanitizer == "thread" ? [false] : [false, true])
    func aDataFileThatShrinksIsAnError(inMemory: Bool) throws {
        let pool = try TestPool(inMemory: inMemory, volumes: [("vol", 16 * mebibyte)])
        let server = try Server(pool)
        let client = try Client(server, "vol")
        for block in 0..<8 as Range<UInt64> {
            try client.write(place(block), pattern(1, place(block), 4096))
        }
        try expect(client, 7, holds: 1)
        #expect(truncate(pool.path + "/data", 0) == 0)
        for block in 0..<8 as Range<UInt64> {
            #expect(try code { _ = try client.read(place(block), 4096) } == EIO)
        }
        let zeroes = [UInt8](repeating: 0, count: 512)
        #expect(try Client(server, "vol").read(8 * Self.block, 512) == zeroes)
        try server.stop()
    }
}
