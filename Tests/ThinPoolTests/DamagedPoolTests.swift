// Pools whose metadata is well formed and says what cannot be: an error in words, and nothing else.

import BlockIO
import Testing
import ThinMetadata
import ThinPool

@Suite struct DamagedPoolTests {
    private static let detailsValues = NodeLayout.keys + 8 * 126

    /// A pool with volume "v", its thin device 1, of which "w", thin device 2, is a snapshot.
    private func makePool() throws -> Bench {
        let bench = try Bench()
        try bench.change(.create(name: "v", size: UInt64(4 * Bench.blockSize)))
        #expect(try bench.write(1, try bench.volume("v"), at: 0, length: Bench.blockSize) == 0)
        try bench.change(.snapshot(origin: "v", name: "w"))
        try bench.rest()
        return bench
    }

    /// Changes a block of the metadata and gives it the checksum that goes with it.
    private func edit(
        _ bench: Bench, _ number: UInt64, as kind: BlockKind,
        _ change: (UnsafeMutableRawPointer) -> Void
    ) throws {
        let block = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Layout.blockSize, alignment: Layout.blockSize)
        defer { block.deallocate() }
        let place = number * UInt64(Layout.blockSize)
        try bench.metadataDisk.read(at: place, into: block)
        change(block.baseAddress!)
        block.baseAddress!.seal(as: kind, number: MetadataBlock(number))
        try bench.metadataDisk.write(at: place, from: UnsafeRawBufferPointer(block))
    }

    private func superblock(_ bench: Bench, _ offset: Int) throws -> UInt64 {
        let block = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Layout.blockSize, alignment: Layout.blockSize)
        defer { block.deallocate() }
        try bench.metadataDisk.read(at: 0, into: block)
        return UnsafeRawPointer(block.baseAddress!).le64(offset)
    }

    /// Changes the details of the `index`th thin device; the catalogue's is the last one.
    private func editDetails(
        _ bench: Bench, _ index: Int, _ change: (UnsafeMutableRawPointer) -> Void
    ) throws {
        let root = try superblock(bench, SuperblockLayout.deviceDetailsRoot)
        try edit(bench, root, as: .node) {
            change($0 + Self.detailsValues + DeviceDetailsLayout.size * index)
        }
    }

    @Test(arguments: [33, 1 << 48, .max] as [UInt64])
    func aCatalogueLargerThanThePoolIsRefused(blocks: UInt64) throws {
        let bench = try makePool()
        try editDetails(bench, 2) { $0.setLE64(DeviceDetailsLayout.mappedBlocks, blocks) }
        let error = #expect(throws: PoolError.self) { try bench.reopen() }
        #expect(error?.kind == .metadata)
    }

    @Test func aVolumeThatClaimsTooMuchIsListed() throws {
        let bench = try makePool()
        try editDetails(bench, 0) { $0.setLE64(DeviceDetailsLayout.mappedBlocks, 1 << 60) }
        try bench.reopen()
        #expect(try bench.pool.volumeList().map(\.mappedBytes) == [.max, UInt64(Bench.blockSize)])
    }

    /// A volume's mappings get its time in the mapping table, which has 24 bits for it.
    @Test func aSnapshotLaterThanAnyTimeIsDamage() throws {
        let bench = try makePool()
        try bench.change(.delete(name: "w"))
        try bench.rest()
        try editDetails(bench, 0) { $0.setLE32(DeviceDetailsLayout.snapshottedTime, 1 << 24) }
        try bench.reopen()
        #expect(bench.pool.open(exportNamed: "v") == nil)
        #expect(bench.pool.status().problems.count == 1)
    }

    /// The old catalogue's data block has no reference that the new one could take away: the change
    /// fails half-way, and with it the pool.
    @Test func aCatalogueWithoutAReferenceFailsTheChange() throws {
        let bench = try makePool()
        let index = try superblock(
            bench, SuperblockLayout.dataSpaceMapRoot + SpaceMapRootLayout.bitmapRoot)
        var bitmap: UInt64 = 0
        try edit(bench, index, as: .node) { bitmap = $0.le64(NodeLayout.keys + 8 * 168) }
        try edit(bench, bitmap, as: .bitmap) {
            for offset in BitmapLayout.entries..<Layout.blockSize {
                $0.storeBytes(of: 0, toByteOffset: offset, as: UInt8.self)
            }
        }
        try bench.reopen()
        let error = #expect(throws: PoolError.self) {
            try bench.change(.create(name: "x", size: 512))
        }
        #expect(error?.kind == .metadata)
        #expect(bench.pool.status().mode == .failed)
    }
}
