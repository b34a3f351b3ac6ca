// Every sequence of up to three operations on a fresh pool, and at every step of it every state that
// a power cut can leave.
//
// Most crash bugs ever reported of file systems need no more than three operations on a new one. What
// the longer sequences share with the shorter ones has been looked at there: only the last operation
// of a sequence, and the commit after it, are cut.

import BlockIO
import NBDProtocol
import ThinMetadata
import ThinPool

public enum SmallOperation: String, CaseIterable, Sendable {
    case writeBlock, writeHalf, writeSector, writeAcross, writeFUA
    case flush, discard, discardPart, zero, zeroNoHole, zeroFUA
    case snapshot, delete, commit, reconnect, restart
}

public struct SmallWorlds {
    public private(set) var worlds = 0
    /// States after a cut that were opened and read.
    public private(set) var states = 0

    /// Unflushed writes up to which every subset is tried; of more, each one lost, each one kept,
    /// and some torn inside.
    private static let exhaustive = 5
    private static let torn = 3

    public init() {}

    /// All sequences of that many operations.
    public static func sequences(of length: Int) -> [[SmallOperation]] {
        if length == 0 { return [[]] }
        return sequences(of: length - 1).flatMap { shorter in
            SmallOperation.allCases.map { shorter + [$0] }
        }
    }

    public mutating func run(_ sequence: [SmallOperation]) throws {
        worlds += 1
        var options = WorldOptions()
        options.dataBlocks = 10
        options.metadataBlocks = 96
        options.reactors = 1
        options.cacheBlocks = 16
        options.drops = true
        let world = try World(options: options, random: SeededRandom(seed: 1))
        do {
            try world.beginSmall()
            for operation in sequence.dropLast() { try world.perform(operation) }
            var seen: World.Moment?
            var found = 0
            world.probe = { world in
                let moment = world.moment
                if moment == seen { return }
                seen = moment
                found += try world.probeCuts(exhaustive: Self.exhaustive, torn: Self.torn)
            }
            if let last = sequence.last { try world.perform(last) }
            try world.perform(.commit)
            world.probe = nil
            states += found
            try world.endSmall()
        } catch {
            _ = Unmanaged.passRetained(world)
            throw error
        }
    }
}

extension World {
    private static let smallBlocks = 4

    /// One volume of four blocks and one client of it.
    func beginSmall() throws {
        ask(.create(name: "v", size: UInt64(Self.smallBlocks * blockSize)))
        try settle()
        connect(SimulatedClient(model: models["v"]!))
        while clients.contains(where: { $0.state == .negotiating }) { try progress() }
    }

    func endSmall() throws {
        try settle()
        try verifyAll()
        try close()
    }

    func perform(_ operation: SmallOperation) throws {
        let block = sectorsPerBlock
        switch operation {
        case .writeBlock: send(.write, block..<2 * block)
        case .writeHalf: send(.write, block..<block + block / 2)
        case .writeSector: send(.write, block + 5..<block + 6)
        case .writeAcross: send(.write, 2 * block - 8..<2 * block + 8)
        case .writeFUA: send(.write, 2 * block + 3..<2 * block + 4, .fua)
        case .flush: send(.flush, 0..<0)
        case .discard: send(.trim, block..<2 * block)
        case .discardPart: send(.trim, block + 8..<2 * block + 8)
        case .zero: send(.writeZeroes, block..<2 * block)
        case .zeroNoHole: send(.writeZeroes, block..<2 * block, .noHole)
        case .zeroFUA: send(.writeZeroes, block..<3 * block, .fua)
        case .snapshot:
            ask(.snapshot(origin: "v", name: "s\(models.count)"))
        case .delete:
            // The oldest snapshot, or else the volume itself.
            if let name = models.keys.sorted().first(where: { models[$0]?.isGoing == false }) {
                leaveAll(models[name]!)
                while (clients + broken).contains(where: { $0.model.name == name }) {
                    try progress()
                }
                ask(.delete(name: name))
            }
        case .commit:
            clock += 2_000_000_000
            while !pool.isAtRest { try progress() }
        case .reconnect:
            // With a write under way, which is sent again.
            send(.write, 3 * block..<3 * block + 8)
            for _ in 0..<6 { try progress() }
            if !clients.isEmpty { try dropClient() }
        case .restart:
            try close()
            try open()
            if let model = models["v"] { connect(SimulatedClient(model: model)) }
        }
        try settle()
    }

    private func send(_ command: Command, _ sectors: Range<Int>, _ flags: CommandFlags = []) {
        guard let client = clients.first(where: { !$0.isLeaving }),
            let request = request(command, client.model, sectors, flags)
        else { return }
        submit(request, by: client)
    }

    // MARK: - Power cuts, on copies

    /// What a power cut could leave has changed only if this has.
    struct Moment: Equatable {
        var ios: Int
        var time: UInt64
        var inFlight: Int
    }

    var moment: Moment {
        Moment(
            ios: meter.count, time: time,
            inFlight: worker.inFlight + reactors.reduce(0) { $0 + $1.io.pending.count })
    }

    /// Opens and reads what is left by power cuts at this moment. Returns how many states.
    func probeCuts(exhaustive: Int, torn: Int) throws -> Int {
        let metadata = metadataDisk.copy()
        let data = dataDisk.copy()
        // What is in flight may have reached the caches.
        worker.copyWrites(toMetadata: metadata, data: data)
        for reactor in reactors { reactor.io.copyWrites(to: data) }
        let first = metadata.unflushed
        let all = first + data.unflushed
        var masks: Set<UInt64> = []
        precondition(all < 64, "\(all) unflushed writes in a small world")
        if all <= exhaustive {
            masks = Set(0..<(1 << UInt64(all)))
        } else {
            let full = (UInt64(1) << UInt64(all)) - 1
            masks = [0, full, (1 << UInt64(first)) - 1, full & ~((1 << UInt64(first)) - 1)]
            for write in 0..<UInt64(all) {
                masks.insert(1 << write)
                masks.insert(full & ~(1 << write))
            }
        }
        var count = 0
        for mask in masks.sorted() {
            let metadata = metadata.copy()
            let data = data.copy()
            metadata.cutPower { mask & (1 << UInt64($0)) != 0 }
            data.cutPower { mask & (1 << UInt64(first + $0)) != 0 }
            try probe(metadata, data, "after a cut that keeps \(String(mask, radix: 2))")
            count += 1
        }
        guard all > 0 else { return count }
        var dice = SeededRandom(seed: UInt64(meter.count))
        for _ in 0..<torn {
            let metadata = metadata.copy()
            let data = data.copy()
            metadata.cutPower(&dice)
            data.cutPower(&dice)
            try probe(metadata, data, "after a cut that tears writes")
            count += 1
        }
        return count
    }

    private func probe(
        _ metadata: SimulatedDisk, _ data: SimulatedDisk, _ occasion: String
    ) throws {
        do {
            var check = MetadataCheck(device: metadata)
            let report = check.run()
            guard report.isClean else {
                throw WorldFailure(description: "\(report.findings.map(\.description))")
            }
            let pool = try Pool(metadata: metadata, data: data, options: poolOptions)
            guard pool.status().mode == .writable, pool.status().problems == pool.spaceProblems,
                metadata.writes == 0, data.writes == 0
            else { throw WorldFailure(description: "it does not open as it was left") }
            let names = Set(pool.volumeNames())
            for model in try modelsAfterCut(names) {
                try examine(model, in: pool, on: data, mayFail: false)
            }
        } catch {
            throw WorldFailure(description: "\(occasion): \(error)")
        }
    }

    /// The volumes that have to be there, those included whose making or going was under way.
    private func modelsAfterCut(_ names: Set<String>) throws -> [VolumeModel] {
        var expected = models
        for change in changes {
            switch change.change {
            case .create(let name, let size, _) where names.contains(name):
                expected[name] = VolumeModel(name: name, sectors: Int(size / 512))
            case .snapshot(let origin, let name, _, _) where names.contains(name):
                if let source = models[origin] {
                    expected[name] = VolumeModel(
                        snapshotOf: source, name: name, askedAt: change.sentAt, now: time)
                }
            case .delete(let name) where !names.contains(name):
                expected[name] = nil
            default:
                break
            }
        }
        guard Set(expected.keys) == names else {
            throw WorldFailure(
                description: "the volumes are \(names.sorted()), not \(expected.keys.sorted())")
        }
        return expected.keys.sorted().map { expected[$0]! }
    }
}
