// Random histories of a pool, from the outside: clients and the command do what they like, and a
// model says what must be read, which virtual blocks have a data block, and which share one.
//
//   WAFER_HISTORIES=N       histories to run, from seed 1 on (default 24)
//   WAFER_HISTORY_SEED=S    this one alone, judged after every step

import Foundation
import Testing

/// A volume as it has to be.
private struct ModelVolume {
    var size: UInt64
    /// Virtual block to the number of its provisioning. Volumes that share a block have the same
    /// number there.
    var owned: [UInt64: UInt64] = [:]
    /// For each sector the number of the write that it holds; 0: zeroes.
    var sectors: [UInt64]

    init(size: UInt64) {
        self.size = size
        sectors = [UInt64](repeating: 0, count: Int(size) / sectorSize)
    }
}

private final class History {
    let seed: UInt64
    let pool: TestPool
    let block: UInt64
    private var random: Generator
    private var server: Server
    private var engine: Engine
    private var poolBlocks: UInt64 = 300
    private var volumes: [String: ModelVolume] = [:]
    private var clients: [String: [Client]] = [:]
    private var numbers: UInt64 = 0
    private var names = 0
    private(set) var log: [String] = []

    private static let logTail = 8000
    private static let maxVolumes = 6
    private static let maxVolumeBlocks: UInt64 = 40

    init(seed: UInt64) throws {
        self.seed = seed
        random = Generator(seed: seed)
        block = [64, 64, 128, 192][random.below(4)] * kibibyte
        engine = seed % 2 == 0 ? .ring : .poll
        // In memory the server does the data device's I/O at once, and looks for holes.
        pool = try TestPool(
            data: poolBlocks * block, blockSize: block, inMemory: seed % 4 >= 2)
        server = try Server(pool, engine: engine)
        try create()
    }

    /// For a failure: whether the server still runs, and its last words.
    var serverState: String {
        let state = server.program.isRunning ? "runs" : "has ended: \(server.program.wait().status)"
        return "the server \(state)\n\(server.program.error.suffix(Self.logTail))"
    }

    // MARK: - Steps

    func step() throws {
        let names = volumes.keys.sorted()
        let name = names[random.below(names.count)]
        switch random.below(100) {
        case ..<32: try write(name)
        case ..<42: try zero(name)
        case ..<50: try trim(name)
        case ..<58: try writeTogether(name)
        case ..<61:
            note("flush \(name)")
            try client(name).flush()
        case ..<67: try compare(name)
        case ..<74: if names.count < Self.maxVolumes { try create() }
        case ..<84: if names.count < Self.maxVolumes { try snapshot(name) }
        case ..<91: if names.count > 1 { try delete(name) }
        case ..<94: try restart(grow: false)
        case ..<97: try restart(grow: true)
        default: try crash()
        }
    }

    private func note(_ text: String) { log.append(text) }

    private func number() -> UInt64 {
        numbers += 1
        return numbers
    }

    private func client(_ name: String) throws -> Client {
        if clients[name] == nil {
            clients[name] = try [.unix, .tcp].map { try Client(server, name, via: $0) }
        }
        return clients[name]![random.below(2)]
    }

    private func range(_ name: String, longest: UInt64) -> (offset: UInt64, length: UInt64) {
        let sectors = UInt64(volumes[name]!.sectors.count)
        let start = random.below(sectors)
        var length = 1 + random.below(min(sectors - start, longest / 512))
        // To the end of the volume, or a whole number of blocks.
        if random.chance(10) { length = min(sectors - start, longest / 512) }
        return (start * 512, length * 512)
    }

    private func write(_ name: String) throws {
        let (offset, length) = range(name, longest: random.chance(25) ? 6 * block : block)
        let fua = random.chance(15)
        let number = number()
        note("write \(name) \(offset)+\(length)\(fua ? " fua" : "") number \(number)")
        try client(name).write(
            offset, pattern(number, offset, Int(length)), flags: fua ? Client.fua : 0)
        set(name, offset, length, number)
        for index in touched(offset, length) { own(name, index) }
    }

    /// Writes side by side, in any order, over two connections, to parts of the same blocks.
    private func writeTogether(_ name: String) throws {
        let (offset, length) = range(name, longest: 4 * block)
        note("writes together \(name) \(offset)+\(length)")
        _ = try client(name)
        var pieces: [(UInt64, Int)] = []
        var cursor = offset
        while cursor < offset + length {
            let size = min(offset + length - cursor, (1 + random.below(32)) * 512)
            pieces.append((cursor, Int(size)))
            cursor += size
        }
        pieces.shuffle(using: &random)
        let batches = clients[name]!.map { Batch($0) }
        for (start, size) in pieces {
            let number = number()
            try batches[random.below(2)].write(start, pattern(number, start, size))
            set(name, start, UInt64(size), number)
        }
        for batch in batches {
            let errors = try batch.wait()
            guard errors.allSatisfy({ $0 == 0 }) else { throw Failure("writes fail: \(errors)") }
        }
        for index in touched(offset, length) { own(name, index) }
    }

    private func zero(_ name: String) throws {
        let (offset, length) = range(name, longest: random.chance(20) ? 1 << 30 : 3 * block)
        let noHole = random.chance(40)
        note("zero \(name) \(offset)+\(length)\(noHole ? " no hole" : "")")
        try client(name).zero(offset, length, flags: noHole ? Client.noHole : 0)
        set(name, offset, length, 0)
        let whole = whole(name, offset, length)
        for index in touched(offset, length) {
            if noHole {
                own(name, index)
            } else if whole.contains(index) {
                volumes[name]!.owned[index] = nil
            } else if volumes[name]!.owned[index] != nil {
                own(name, index)
            }
        }
    }

    private func trim(_ name: String) throws {
        let (offset, length) = range(name, longest: random.chance(30) ? 1 << 30 : 4 * block)
        note("trim \(name) \(offset)+\(length)")
        try client(name).trim(offset, length)
        for index in whole(name, offset, length) {
            let start = index * block
            set(name, start, min(block, volumes[name]!.size - start), 0)
            volumes[name]!.owned[index] = nil
        }
    }

    private func create() throws {
        names += 1
        let name = "v\(names)"
        let blocks = 1 + random.below(Self.maxVolumeBlocks)
        let size = blocks * block - (random.chance(50) ? 0 : random.below(block / 512) * 512)
        note("create \(name) \(size)")
        try pool.create(name, size)
        volumes[name] = ModelVolume(size: size)
    }

    private func snapshot(_ origin: String) throws {
        names += 1
        let name = "v\(names)"
        note("snapshot \(origin) \(name)")
        try pool.snapshot(origin, name)
        volumes[name] = volumes[origin]
    }

    private func delete(_ name: String) throws {
        note("delete \(name)")
        for client in clients[name] ?? [] { try client.disconnect() }
        clients[name] = nil
        try pool.delete(name)
        volumes[name] = nil
    }

    private func restart(grow: Bool) throws {
        note(grow ? "stop, grow, start" : "restart")
        // Some clients leave first, some do not.
        if random.chance(50) { for client in clients.values.joined() { try client.disconnect() } }
        clients = [:]
        try server.stop()
        if grow {
            poolBlocks += 20
            try pool.must("pool", "grow", pool.path, "--data-size", "\(poolBlocks * block)")
        }
        engine = random.chance(50) ? .ring : .poll
        server = try Server(pool, engine: engine)
    }

    /// Everything is flushed, so that what is there afterwards is known.
    private func crash() throws {
        note("flush all, kill, start")
        for name in volumes.keys.sorted() { try client(name).flush() }
        server.kill()
        clients = [:]
        server = try Server(pool, engine: engine)
    }

    // MARK: - The model

    private func touched(_ offset: UInt64, _ length: UInt64) -> Range<UInt64> {
        offset / block..<(offset + length + block - 1) / block
    }

    /// The blocks that lie in the range with all that the volume has of them.
    private func whole(_ name: String, _ offset: UInt64, _ length: UInt64) -> Range<UInt64> {
        let end = offset + length
        let first = (offset + block - 1) / block
        let last = end == volumes[name]!.size ? (end + block - 1) / block : end / block
        return first..<max(first, last)
    }

    private func set(_ name: String, _ offset: UInt64, _ length: UInt64, _ number: UInt64) {
        let first = Int(offset) / sectorSize
        for sector in first..<first + Int(length) / sectorSize {
            volumes[name]!.sectors[sector] = number
        }
    }

    /// The volume has a block of its own there.
    private func own(_ name: String, _ index: UInt64) {
        if let present = volumes[name]!.owned[index],
            !volumes.contains(where: { $0.key != name && $0.value.owned[index] == present })
        {
            return
        }
        volumes[name]!.owned[index] = number()
    }

    // MARK: - Judgement

    private func compare(_ name: String) throws {
        note("compare \(name)")
        let volume = volumes[name]!
        let client = try client(name)
        let size = try client.size()
        guard size == volume.size else { throw Failure("\(name) has \(size) bytes") }
        var offset: UInt64 = 0
        while offset < volume.size {
            let length = min(volume.size - offset, 512 * (1 + random.below(4096)))
            let found = try stamps(client.read(offset, Int(length)), offset)
            let first = Int(offset) / sectorSize
            for (index, number) in found.enumerated()
            where number != volume.sectors[first + index] {
                throw Failure(
                    "\(name), sector \(first + index): number \(number) instead of "
                        + "\(volume.sectors[first + index])")
            }
            offset += length
        }
    }

    /// Contents, and after a flush of everything the metadata.
    func judge(with tools: [String]) throws {
        for name in volumes.keys.sorted() {
            try compare(name)
            try client(name).flush()
        }
        try judgeMetadata(with: tools)
    }

    func end() throws {
        try judge(with: [ThinTools.check])
        note("stop")
        clients = [:]
        try server.stop()
        try judgeMetadata(with: ThinTools.checks)
    }

    private func judgeMetadata(with tools: [String]) throws {
        for tool in tools {
            let outcome = try Program(tool, [pool.path + "/metadata"], in: pool.scratch).wait()
            guard outcome.status == 0 else { throw Failure("\(tool): \(outcome)") }
        }
        let dump = try pool.dump()
        let listed = try pool.volumes()
        guard Set(listed.map(\.name)) == Set(volumes.keys.map { $0 }) else {
            throw Failure("there are the volumes \(listed)")
        }
        let catalogue = UInt32(1 << 24 - 1)
        guard Set(dump.keys) == Set(listed.map(\.id) + [catalogue]) else {
            throw Failure("there are the devices \(dump.keys.sorted())")
        }
        // Provisioning and data block belong to each other, one to one.
        var blockOf: [UInt64: UInt64] = [:]
        var numberOf: [UInt64: UInt64] = [:]
        for data in dump[catalogue]!.mappings.values { numberOf[data] = 0 }
        for entry in listed {
            let device = dump[entry.id]!
            let model = volumes[entry.name!]!
            guard device.mappedBlocks == UInt64(device.mappings.count),
                entry.mappedBytes == device.mappedBlocks * block
            else {
                throw Failure(
                    "\(entry.name!) has \(device.mappings.count) mappings, \(device.mappedBlocks) "
                        + "by its details, and is listed with \(entry.mappedBytes) bytes")
            }
            let (found, expected) = (Set(device.mappings.keys), Set(model.owned.keys))
            guard found == expected else {
                throw Failure(
                    "\(entry.name!): blocks \(found.subtracting(expected).sorted()) should have no "
                        + "mapping, \(expected.subtracting(found).sorted()) lack one")
            }
            for (index, data) in device.mappings {
                let number = model.owned[index]!
                guard blockOf[number] ?? data == data, numberOf[data] ?? number == number else {
                    throw Failure("\(entry.name!), block \(index): shared with the wrong ones")
                }
                blockOf[number] = data
                numberOf[data] = number
            }
        }
        let status = try pool.status()
        guard status.dataBlocksUsed == UInt64(numberOf.count), status.dataBlocks == poolBlocks,
            status.mode == "writable" || status.mode == "read-only",
            // It may be nearly full.
            status.problems.allSatisfy({ $0.contains("data block") })
        else {
            throw Failure("\(numberOf.count) of \(poolBlocks) blocks are mapped, but: \(status)")
        }
    }
}

@Suite struct HistoryTests {
    private static let steps = 40
    /// The new thin_check takes half a second, whatever it checks: it has every so many steps.
    private static let stepsBetweenNewChecks = 5
    private static let single = number("WAFER_HISTORY_SEED")
    static let seeds: [UInt64] = single.map { [$0] } ?? Array(1...(number("WAFER_HISTORIES") ?? 24))

    private static func number(_ name: String) -> UInt64? {
        ProcessInfo.processInfo.environment[name].flatMap { UInt64($0) }
    }

    @Test(arguments: seeds) func history(seed: UInt64) throws {
        let judgesAll = seed % 8 == 0 || Self.single != nil
        let history = try History(seed: seed)
        do {
            for step in 1...Self.steps {
                try history.step()
                guard judgesAll else { continue }
                let isStrict = Self.single != nil || step % Self.stepsBetweenNewChecks == 0
                try history.judge(with: isStrict ? ThinTools.checks : [ThinTools.check])
            }
            try history.end()
        } catch {
            Issue.record(
                """
                seed \(seed), step \(history.log.count): \(error)
                replay: WAFER_HISTORY_SEED=\(seed) swift test --filter HistoryTests
                \(history.log.suffix(20).joined(separator: "\n"))
                \(history.serverState)
                """)
        }
    }
}
