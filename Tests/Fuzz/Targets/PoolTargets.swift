// Whole pools: opened, listed, checked, read, written and changed.

import BlockIO
import CLinux
import ThinMetadata
import ThinPool

/// The catalogue's block is the input: its payload, with a header that fits; or all of it.
public enum CatalogueTarget: FuzzTarget {
    public static let name = "catalogue"
    public static var seeds: [[UInt8]] {
        [
            #"{"deleting":[],"volumes":[{"created":1,"id":1,"name":"a","size":1048576}]}"#,
            #"{"deleting":[3],"volumes":[{"created":1,"id":2,"name":"b","origin":"c","size":512}]}"#,
            "{}",
        ].map { [0] + Array($0.utf8) }
    }

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let isWhole = input.byte() & 1 == 1
        let contents = input.rest(OverlayDevice.pageSize - CatalogueLayout.payload)
        let seed = SeedPool.shared
        let data = seed.dataDevice()
        let page = data.editedPage(
            seed.catalogue * SeedPool.blockSize / OverlayDevice.pageSize)
        let start = isWhole ? 0 : CatalogueLayout.payload
        if let base = contents.baseAddress {
            (page + start).copyMemory(from: base, byteCount: contents.count)
        }
        if !isWhole {
            page.setLE64(CatalogueLayout.payloadBytes, UInt64(contents.count))
            page.setLE32(
                CatalogueLayout.checksum, clinux_crc32c(page + start, contents.count))
        }
        var none = FuzzInput(UnsafeRawBufferPointer(start: nil, count: 0))
        PoolUse.run(seed.metadataDevice(), data, &none)
    }
}

/// Edits anywhere in the metadata, then a server's life on it.
public enum PoolTarget: FuzzTarget {
    public static let name = "pool"

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let metadata = SeedPool.shared.metadataDevice()
        metadata.spoil(&input)
        PoolUse.run(metadata, SeedPool.shared.dataDevice(), &input)
    }
}

private enum PoolUse {
    private static let maxOperations = 24
    private static let bufferSize = 4096

    static func run(
        _ metadata: OverlayDevice, _ data: OverlayDevice, _ input: inout FuzzInput
    ) {
        var options = PoolOptions()
        let choice = input.byte()
        options.readOnly = choice & 1 == 1
        options.cacheBlocks = choice & 2 == 2 ? 8 : 256
        options.tableBytes = choice & 4 == 4 ? 1 : 1 << 20
        options.bounds.smallDeletion = choice & 8 == 8 ? 2 : 4096
        do throws(PoolError) {
            let driver = try PoolDriver(metadata: metadata, data: data, options: options)
            list(driver)
            for _ in 0..<maxOperations where !input.isAtEnd { act(driver, &input) }
            driver.close()
        } catch { _ = error.message }
    }

    /// What a server tells people.
    private static func list(_ driver: PoolDriver) {
        _ = driver.pool.status()
        do throws(PoolError) { _ = try driver.pool.volumeList() } catch { _ = error.message }
    }

    private static func check(_ driver: PoolDriver) {
        do throws(PoolError) { _ = try driver.pool.check() } catch { _ = error.message }
    }

    private static func act(_ driver: PoolDriver, _ input: inout FuzzInput) {
        let pool = driver.pool
        let names = pool.volumeNames()
        let what = input.byte()
        let name = names.isEmpty ? "none" : names[input.below(names.count)]
        switch what % 16 {
        case 0: _ = driver.change(.create(name: "new\(what)", size: UInt64(input.byte()) << 16))
        case 1: _ = driver.change(.snapshot(origin: name, name: "snap\(what)"))
        case 2: _ = driver.change(.delete(name: name))
        case 3:
            _ = driver.change(
                .adopt(id: UInt32(input.byte()), name: "adopted\(what)", size: 1 << 20))
        case 4: what & 0x20 == 0 ? list(driver) : check(driver)
        default: request(driver, name, what, &input)
        }
    }

    private static func request(
        _ driver: PoolDriver, _ name: String, _ what: UInt8, _ input: inout FuzzInput
    ) {
        guard let volume = driver.pool.open(exportNamed: name) else { return }
        defer { driver.pool.close(volume) }
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: bufferSize, alignment: 4096)
        defer { buffer.deallocate() }
        buffer.initializeMemory(as: UInt8.self, repeating: what, count: bufferSize)
        // As the protocol's validation lets them through.
        let sectors = volume.size / Volume.sectorSize
        let offset = UInt64(input.word(UInt16.self)) * 16 % sectors
        let left = sectors - offset
        let few = min(left, 1 + UInt64(input.byte() % 8)) * Volume.sectorSize
        let many = min(left, UInt64(input.word(UInt16.self)) * 16) * Volume.sectorSize
        let at = offset * Volume.sectorSize
        let fua = what & 0x80 != 0
        let writes = !volume.isReadOnly
        switch what % 16 {
        case 5, 6, 7: _ = driver.perform(.read, volume, at, few, buffer)
        case 8, 9, 10, 11:
            if writes { _ = driver.perform(.write, volume, at, few, buffer, fua: fua) }
        case 12: _ = driver.perform(.flush, volume, 0, 0)
        case 13: if writes { _ = driver.perform(.trim, volume, at, many, fua: fua) }
        case 14:
            if writes {
                _ = driver.perform(
                    .writeZeroes, volume, at, few, fua: fua, noHole: what & 0x40 != 0)
            }
        default: if writes { _ = driver.perform(.writeZeroes, volume, at, many, fua: fua) }
        }
    }
}
