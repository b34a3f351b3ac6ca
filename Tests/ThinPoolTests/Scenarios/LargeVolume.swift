// A pool with a volume that is deleted in slices, for the scenarios of cuts and clients in between.

import Testing
import ThinPool

/// A volume with more blocks than are deleted at once, in a pool with too little metadata to delete
/// it in one transaction: so it goes in slices.
enum LargeVolume {
    static let name = "large"
    static let kept = "kept"
    static let keptBytes: Set<UInt8> = [0xC1]
    static let blocks = 8600
    private static let keptBlocks = 4

    static func bench(metadataBlocks: Int = 124) throws -> (Bench, Ledger) {
        let bench = try Bench(dataBlocks: blocks + 60, metadataBlocks: metadataBlocks)
        try bench.change(.create(name: kept, size: UInt64(keptBlocks * Bench.blockSize)))
        let volume = try bench.volume(kept)
        #expect(
            try bench.write(
                keptBytes.first!, volume, at: 0, length: keptBlocks * Bench.blockSize, fua: true)
                == 0)
        let ledger = Ledger(bench)
        ledger.create(name, blocks: blocks)
        try ledger.settle()
        try ledger.zero(name, units: 0..<(blocks * Ledger.unitsPerBlock), noHole: true)
        try ledger.settle()
        try #require(ledger.errors.isEmpty, "it could not be filled: \(ledger.errors)")
        try ledger.flush(name)
        try ledger.settle()
        try bench.rest()
        return (bench, ledger)
    }

    static func requireKept(_ aftermath: Aftermath) throws {
        for block in 0..<keptBlocks { try aftermath.require(kept, block: block, keptBytes) }
    }
}
