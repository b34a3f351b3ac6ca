// What must hold after every power cut, whatever was going on: the pool opens and may be written,
// its metadata is as the strict check wants it, and nobody reads what no client wrote.

import Glibc
import ThinMetadata
import ThinPool

/// What a scenario found wrong, with the cut at which it did.
struct ScenarioFailure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

struct Aftermath {
    let bench: Bench
    let survivors: Survivors
    /// What every volume's sectors are filled with.
    private(set) var sectors: [String: [UInt8]] = [:]

    init(
        _ survivors: Survivors, reactors: Int = 1, options: PoolOptions = PoolOptions()
    ) throws {
        self.survivors = survivors
        do {
            bench = try Bench(after: survivors, reactors: reactors, options: options)
        } catch {
            throw ScenarioFailure("\(survivors.what): the pool does not open: \(error)")
        }
        let status = bench.pool.status()
        try require(
            status.mode == .writable && status.problems == bench.pool.spaceProblems,
            "it opens \(status)")
        try survivors.checked.requireClean(bench, survivors.what)
        for name in bench.pool.volumeNames() {
            sectors[name] = try readAll(name)
        }
    }

    func require(_ condition: Bool, _ what: @autoclosure () -> String) throws {
        guard condition else { throw ScenarioFailure("\(survivors.what): \(what())") }
    }

    private func readAll(_ name: String) throws -> [UInt8] {
        var result: [UInt8] = []
        for (index, byte) in try bench.sectors(bench.volume(name)).enumerated() {
            guard let byte else {
                throw ScenarioFailure("\(survivors.what): sector \(index) of \(name) is torn")
            }
            if byte == RecordedDisk.secret || byte == RecordedDisk.discarded {
                throw ScenarioFailure(
                    "\(survivors.what): sector \(index) of \(name) shows what no client wrote")
            }
            result.append(byte)
        }
        return result
    }

    /// The sectors of blocks of a volume.
    func sectors(_ name: String, blocks: Range<Int>) throws -> ArraySlice<UInt8> {
        guard let all = sectors[name] else {
            throw ScenarioFailure("\(survivors.what): volume \(name) is lost")
        }
        return all[(blocks.lowerBound * sectorsPerBlock)..<(blocks.upperBound * sectorsPerBlock)]
    }

    /// All these sectors hold one of these bytes.
    func require(
        _ name: String, sectors range: Range<Int>, _ allowed: Set<UInt8>
    ) throws {
        guard let all = sectors[name] else {
            throw ScenarioFailure("\(survivors.what): volume \(name) is lost")
        }
        for sector in range where !allowed.contains(all[sector]) {
            throw ScenarioFailure(
                "\(survivors.what): sector \(sector) of \(name) holds \(all[sector]), allowed are "
                    + "\(allowed.sorted())")
        }
    }

    func require(_ name: String, block: Int, _ allowed: Set<UInt8>) throws {
        try require(
            name, sectors: (block * sectorsPerBlock)..<((block + 1) * sectorsPerBlock), allowed)
    }
}

/// States that the strict check has found clean. The cuts of one commit leave a few of them again
/// and again, and what decides is only the superblock and the blocks that it reaches.
final class CheckedStates {
    private var clean: [[UInt8]: [[(block: Int, page: [UInt8])]]] = [:]

    func requireClean(_ bench: Bench, _ what: String) throws {
        let platter = bench.metadataDisk.platter
        let superblock = platter.page(0)
        let isKnown = clean[superblock, default: []].contains { pages in
            pages.allSatisfy { block, page in
                platter.page(block).withUnsafeBytes { found in
                    page.withUnsafeBytes {
                        memcmp($0.baseAddress!, found.baseAddress!, page.count) == 0
                    }
                }
            }
        }
        if isKnown { return }
        try requireCleanMetadata(bench, what)
        let tree = try MetadataImage(platter).reachable()
        clean[superblock, default: []].append(tree.blocks.map { (Int($0), platter.page(Int($0))) })
    }
}

let sectorsPerBlock = Bench.blockSize / Bench.sector

/// The strict check finds nothing, not even a leaked block.
@discardableResult
func requireCleanMetadata(_ bench: Bench, _ what: String) throws -> CheckReport {
    var check = MetadataCheck(
        device: bench.metadataDisk,
        dataDeviceBlocks: bench.dataDisk.size / UInt64(Bench.blockSize))
    let report = check.run()
    guard report.isClean else {
        throw ScenarioFailure("\(what): \(report.findings.map(\.description))")
    }
    return report
}
