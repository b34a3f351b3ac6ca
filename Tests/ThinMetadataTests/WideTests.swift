// Large shapes: hundreds of devices, a deep tree shared many times, images of thin_restore.

import Foundation
import Testing
import ThinMetadata

@Suite struct WideTests {
    @Test func hundredsOfDevicesAndADeepSharedTree() throws {
        let harness = try Harness(metadataBlocks: 12_000, dataBlocks: 700_000, cacheBlocks: 300)
        harness.toolEvery = 100
        var random = Generator(seed: 5)
        for id in 0..<420 as Range<UInt64> { try harness.create(id * 3) }
        for virtual in 0..<120_000 as Range<UInt64> { try harness.write(3, virtual * 2) }
        try harness.commit()
        for copy in 0..<8 as Range<UInt64> { try harness.snapshot(5000 + copy, of: 3) }
        for copy in 0..<8 as Range<UInt64> {
            for _ in 0..<60 {
                try harness.write(5000 + copy, UInt64(random.below(240_000)))
                harness.pool.trimCache()
            }
            let start = UInt64(random.below(200_000))
            try harness.discard(5000 + copy, start..<start + 9000, limit: 3000)
        }
        try harness.commit()
        #expect(try readImage(harness.device).depth == 3)
        try expectClean(harness.device, harness.directory)
        for id in 0..<400 as Range<UInt64> { try harness.delete(id * 3 == 3 ? 5000 : id * 3) }
        try harness.commit()
        for id in harness.model.ids {
            var slices = 0
            while try !harness.deleteSlice(id, budget: 30_000) {
                slices += 1
                if slices % 3 == 0 { try harness.commit() }
            }
            if id > 3000 { try harness.commit() }
        }
        try harness.commit()
        #expect(harness.pool.dataBlocksUsed == 0)
        try expectClean(harness.device, harness.directory)
    }

    /// A device with more nodes than are deleted at once goes slice by slice, each one valid.
    @Test func slicesOfALargeDevice() throws {
        let harness = try Harness(metadataBlocks: 9000, dataBlocks: 600_000, cacheBlocks: 300)
        harness.toolEvery = 4
        try harness.create(1)
        // Scattered, so that leaves stay half full.
        for virtual in 0..<300_000 as Range<UInt64> {
            try harness.write(1, virtual &* 7919 % 300_000)
        }
        try harness.commit()
        let used = harness.pool.metadataBlocksUsed
        try #require(used > 1200)
        var slices = 0
        while try !harness.deleteSlice(1, budget: 20_000) {
            slices += 1
            try harness.commit()
            harness.pool.trimCache()
        }
        try harness.commit()
        #expect(harness.pool.dataBlocksUsed == 0)
    }

    private func restore(_ random: inout Generator) throws -> TestDevice {
        var xml = """
            <superblock uuid="" time="9" transaction="4" flags="0" version="2" \
            data_block_size="128" nr_data_blocks="40000">\n
            """
        for id in 1...20 {
            var mappings = ""
            var count = 0
            var virtual = 0
            for _ in 0..<random.below(40) {
                virtual += random.below(50)
                let length = 1 + random.below(90)
                mappings +=
                    "<range_mapping origin_begin=\"\(virtual)\" data_begin=\"\(random.below(9000))\""
                    + " length=\"\(length)\" time=\"\(random.below(9))\"/>\n"
                virtual += length
                count += length
            }
            xml +=
                "<device dev_id=\"\(id)\" mapped_blocks=\"\(count)\" transaction=\"2\""
                + " creation_time=\"0\" snap_time=\"\(random.below(10))\">\n\(mappings)</device>\n"
        }
        xml += "</superblock>\n"
        let directory = try TemporaryDirectory()
        try xml.write(to: directory.file("xml"), atomically: true, encoding: .utf8)
        try TestDevice(blocks: 3000).save(to: directory.file("image"))
        let result = try run(
            thinRestore, ["-i", directory.file("xml").path, "-o", directory.file("image").path])
        try #require(result.status == 0, "\(result.output)")
        return try TestDevice(file: directory.file("image"))
    }

    @Test(arguments: [21, 22, 23] as [UInt64]) func goesOnFromThinRestore(seed: UInt64) throws {
        var random = Generator(seed: seed)
        let harness = try Harness(image: try restore(&random), cacheBlocks: 8)
        harness.toolEvery = 6
        try harness.verifyLookups(&random, samples: 10)
        for round in 0..<60 {
            let id = harness.model.ids[random.below(harness.model.ids.count)]
            switch random.below(6) {
            case 0: try harness.snapshot(UInt64(100 + round), of: id)
            case 1: try harness.discard(id, 0..<UInt64(random.below(4000) + 1), limit: 800)
            case 2: _ = try harness.deleteSlice(id, budget: 400)
            default: for _ in 0..<80 { try harness.write(id, UInt64(random.below(4000))) }
            }
            if random.chance(40) { try harness.commit() }
            harness.pool.trimCache()
        }
        try harness.commit()
        #expect(try dump(harness.device, harness.directory) == harness.model.devices)
    }
}
