// A new pool, and what is refused at the door.

import BlockIO
import Foundation
import Testing

import ThinMetadata

@Suite struct FormatTests {
    @Test func newPoolIsEmptyAndOpens() throws {
        let device = TestDevice(blocks: 1024)
        try ThinMetadata.format(device, dataBlockSectors: 128, dataBlocks: 20_000)
        let pool = try ThinMetadata(device, cacheBlocks: 64)
        #expect(pool.dataBlocks == 20_000)
        #expect(pool.dataBlocksUsed == 0)
        #expect(pool.metadataBlocks == 1024)
        #expect(try pool.deviceIDs() == [])
    }
}
