// The sound pool that fuzzed ones start from: small, with a bit of everything. Volumes that share
// nodes and data blocks (counts of 3 and more in both space maps), a mapping tree of two levels, an
// empty volume and a huge one, a catalogue. Made by the product itself, once in a process.

import BlockIO
import ThinMetadata
import ThinPool

struct SeedPool: @unchecked Sendable {
    static let metadataBlocks = 320
    static let dataBlocks = 420
    static let blockSize = 65_536
    private static let blockSectors: UInt32 = 128
    private static let mapped = 300

    /// Never changed once they are made.
    let metadata: UnsafeRawBufferPointer
    let data: UnsafeRawBufferPointer
    /// What has ever been written to, ascending: block 0 is the first.
    let blocks: [(number: Int, kind: BlockKind)]
    /// The root of each tree, and a leaf of a volume's mapping tree.
    let trees: [Int]
    let index: Int
    let metadataBitmap: Int
    let dataBitmap: Int
    /// The data block that the catalogue is in.
    let catalogue: Int

    static let shared = SeedPool()

    private init() {
        do {
            let metadata = try Self.makeDevices()
            self.metadata = metadata.metadata
            data = metadata.data
        } catch { fatalError("fuzz: no pool to begin with: \(error)") }
        let image = metadata
        func block(_ number: Int) -> UnsafeRawPointer {
            image.baseAddress! + number * Layout.blockSize
        }
        blocks = (0..<Self.metadataBlocks).compactMap { number in
            BlockKind.allCases.first { block(number).le32(0) == block(number).checksum(as: $0) }
                .map { (number, $0) }
        }
        func pointer(_ number: Int, _ offset: Int) -> Int { Int(block(number).le64(offset)) }
        /// The first value of a leaf or node whose values are this many keys away.
        func first(_ number: Int, _ capacity: Int = 252) -> Int {
            pointer(number, NodeLayout.keys + 8 * capacity)
        }
        let top = pointer(0, SuperblockLayout.dataMappingRoot)
        let mappingRoot = first(top)
        let dataIndex = pointer(
            0, SuperblockLayout.dataSpaceMapRoot + SpaceMapRootLayout.bitmapRoot)
        trees = [
            top, pointer(0, SuperblockLayout.deviceDetailsRoot), mappingRoot, first(mappingRoot),
            dataIndex,
            pointer(0, SuperblockLayout.dataSpaceMapRoot + SpaceMapRootLayout.refCountRoot),
            pointer(0, SuperblockLayout.metadataSpaceMapRoot + SpaceMapRootLayout.refCountRoot),
        ]
        index = pointer(0, SuperblockLayout.metadataSpaceMapRoot + SpaceMapRootLayout.bitmapRoot)
        metadataBitmap = pointer(index, IndexBlockLayout.entries)
        dataBitmap = first(dataIndex, 168)
        let data = data
        let magic = CatalogueLayout.magicValue
        catalogue = (0..<Self.dataBlocks).last { number in
            (data.baseAddress! + number * Self.blockSize).le64(0) == magic
        }!
    }

    private static func makeDevices() throws -> (
        metadata: UnsafeRawBufferPointer, data: UnsafeRawBufferPointer
    ) {
        let blank = zeroes(dataBlocks * blockSize)
        defer { blank.deallocate() }
        let metadata = OverlayDevice(
            path: "fuzzed metadata", over: .init(rebasing: blank[..<(metadataBlocks * 4096)]))
        let data = OverlayDevice(path: "fuzzed data", over: blank)
        try ThinMetadata.format(
            metadata, dataBlockSectors: blockSectors, dataBlocks: UInt64(dataBlocks))
        let driver = try PoolDriver(metadata: metadata, data: data)
        let size = UInt64((mapped + 20) * blockSize)
        make(driver, .create(name: "origin", size: size))
        write(driver, "origin", 0..<mapped)
        for name in ["one", "two", "three"] {
            make(driver, .snapshot(origin: "origin", name: name))
            write(driver, name, 3..<8)
            write(driver, "origin", 280..<283)
        }
        make(driver, .create(name: "empty", size: 512))
        make(driver, .create(name: "huge", size: 1 << 40))
        driver.close()
        return (copy(of: metadata), copy(of: data))
    }

    private static func make(_ driver: PoolDriver, _ change: VolumeChange) {
        let error = driver.change(change)
        require(error == nil, "\(change): \(error!)")
    }

    private static func write(_ driver: PoolDriver, _ name: String, _ blocks: Range<Int>) {
        let volume = driver.pool.open(exportNamed: name)!
        defer { driver.pool.close(volume) }
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 512, alignment: 512)
        buffer.initializeMemory(as: UInt8.self, repeating: 0x5A, count: 512)
        defer { buffer.deallocate() }
        for block in blocks {
            let error = driver.perform(.write, volume, UInt64(block * blockSize), 512, buffer)
            require(error == 0, "block \(block) of \(name) cannot be written: \(error)")
        }
    }

    private static func zeroes(_ count: Int) -> UnsafeRawBufferPointer {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 4096)
        memory.initializeMemory(as: UInt8.self, repeating: 0)
        return UnsafeRawBufferPointer(memory)
    }

    private static func copy(of device: OverlayDevice) -> UnsafeRawBufferPointer {
        let memory = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Int(device.size), alignment: 4096)
        for page in 0..<Int(device.size) / OverlayDevice.pageSize {
            (memory.baseAddress! + page * OverlayDevice.pageSize).copyMemory(
                from: device.page(page), byteCount: OverlayDevice.pageSize)
        }
        return UnsafeRawBufferPointer(memory)
    }

    // MARK: - Copies to spoil

    func metadataDevice() -> OverlayDevice {
        OverlayDevice(path: "fuzzed metadata", over: metadata)
    }
    func dataDevice() -> OverlayDevice { OverlayDevice(path: "fuzzed data", over: data) }

    /// How a block of the metadata begins.
    func bytes(of block: Int, _ count: Int) -> [UInt8] {
        Array(metadata[block * Layout.blockSize..<block * Layout.blockSize + count])
    }

    func kind(of block: Int) -> BlockKind {
        blocks.first { $0.number == block }!.kind
    }
}
