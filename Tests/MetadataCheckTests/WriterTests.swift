// The transaction code against the check: two readings of one format.

import BlockIO
import Testing
import ThinMetadata

@Suite struct WriterTests {
    /// Writes a frozen transaction and takes back what it freed.
    private func commit(_ metadata: ThinMetadata, to image: PoolImage) throws {
        let frozen = try metadata.freeze()
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 4096, alignment: 4096)
        defer { memory.deallocate() }
        for i in 0..<frozen.blocks {
            let block = frozen.copyBlock(i, to: memory.baseAddress!)
            try image.write(at: block.rawValue * 4096, from: .init(memory))
        }
        frozen.copySuperblock(to: memory.baseAddress!)
        try image.write(at: 0, from: .init(memory))
        let freed = metadata.committed(frozen)
        metadata.makeAvailable(freed.discarded + freed.replaced)
    }

    @Test(arguments: [(100, UInt64(0)), (100, 1), (2000, 100_000), (17_000, 16_320)])
    func newPoolIsClean(blocks: Int, dataBlocks: UInt64) throws {
        let image = PoolImage(blocks: blocks)
        try ThinMetadata.format(image, dataBlockSectors: 128, dataBlocks: dataBlocks)
        let report = image.check(dataDeviceBlocks: dataBlocks)
        #expect(report.findings.map(\.description) == [])
        #expect(report.dataBlocks == dataBlocks)
    }

    @Test(arguments: 1...6)
    func everyCommittedStateIsClean(seed: Int) throws {
        var random = SeededGenerator(state: UInt64(seed))
        let image = PoolImage(blocks: 1500)
        let dataBlocks: UInt64 = 33_000
        try ThinMetadata.format(image, dataBlockSectors: 128, dataBlocks: dataBlocks)
        let metadata = try ThinMetadata(image, cacheBlocks: 64)
        var devices: [ThinDeviceID: UInt64] = [:]
        for round in 1...25 {
            for _ in 0..<Int.random(in: 1...6, using: &random) {
                let id = ThinDeviceID(UInt32.random(in: 1...9, using: &random))
                try step(metadata, id, &devices, &random)
            }
            try commit(metadata, to: image)
            metadata.trimCache()
            let report = image.check(dataDeviceBlocks: dataBlocks)
            #expect(report.findings.map(\.description) == [], "round \(round)")
            #expect(report.devices == devices.count)
            #expect(report.mappings == devices.values.reduce(0, +))
            if round % 8 == 0 && Tools.haveThinTools {
                #expect(try Tools.thinCheckAccepts(image))
            }
        }
    }

    private func step(
        _ metadata: ThinMetadata, _ id: ThinDeviceID, _ devices: inout [ThinDeviceID: UInt64],
        _ random: inout SeededGenerator
    ) throws {
        guard devices[id] != nil else {
            if let origin = devices.keys.sorted().randomElement(using: &random),
                Bool.random(using: &random)
            {
                try metadata.createSnapshot(id, of: origin)
                devices[id] = devices[origin]
            } else {
                try metadata.createThin(id)
                devices[id] = 0
            }
            return
        }
        let start = UInt64.random(in: 0..<4000, using: &random)
        let range = start..<start + UInt64.random(in: 1...1500, using: &random)
        switch Int.random(in: 0..<8, using: &random) {
        case 0:
            try metadata.deleteDevice(id)
            devices[id] = nil
        case 1, 2:
            var next: VirtualBlock? = VirtualBlock(range.lowerBound)
            while let from = next {
                next = try metadata.remove(
                    id, from.rawValue..<range.upperBound, limit: 100
                ) { _, _ in devices[id]! -= 1 }
            }
        default:
            for block in range {
                guard let data = try metadata.allocateDataBlock() else { return }
                if try metadata.insert(id, VirtualBlock(block), data) == nil { devices[id]! += 1 }
            }
        }
    }
}
