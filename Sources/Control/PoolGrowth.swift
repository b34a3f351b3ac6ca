// "wafer pool grow": makes the files behind a pool longer, then opens the pool once, which takes up
// what its devices have.

import BlockIO
import ThinMetadata
import ThinPool

public enum PoolGrowth {
    /// - Parameters: the new sizes in bytes; nil leaves a device as it is.
    /// - Returns: the pool afterwards.
    public static func grow(
        _ directory: PoolDirectory, dataSize: UInt64?, metadataSize: UInt64?
    ) throws(ControlError) -> PoolStatus {
        if try RemotePool.connect(directory) != nil {
            throw ControlError(
                .busy,
                "\(directory.path) is being served, and only a pool at rest can grow: stop its "
                    + "server first")
        }
        // Claimed until both are longer; released before the pool itself claims them.
        do throws(ControlError) {
            let metadata = try open(directory.metadataPath)
            let data = try open(directory.dataPath)
            // Both are judged before the first is changed.
            if let metadataSize { try require(metadata, canGrowTo: metadataSize, unit: 4096) }
            if let dataSize { try require(data, canGrowTo: dataSize, unit: 512) }
            if let dataSize { try require(metadata, asOf: metadataSize, hasRoomFor: dataSize) }
            if let metadataSize { try extend(metadata, to: metadataSize, reserving: true) }
            if let dataSize { try extend(data, to: dataSize, reserving: false) }
        } catch {
            throw error.kind == .busy ? directory.inUse(error) : error
        }
        let pool = try LocalPool(directory, purpose: .change)
        if let reason = pool.pool.status().reason {
            try pool.close()
            throw ControlError(
                .refused, "the pool \(directory.path) does not take up its new size: \(reason)")
        }
        try pool.close()
        return pool.pool.status()
    }

    private static func open(_ path: String) throws(ControlError) -> FileDevice {
        do throws(DeviceError) {
            return try FileDevice(path: path, access: .readWrite)
        } catch { throw ControlError(error) }
    }

    private static func require(_ device: FileDevice, canGrowTo size: UInt64, unit: UInt64)
        throws(ControlError)
    {
        guard !device.isBlockDevice else {
            throw ControlError(
                .refused,
                "\(device.path) is a block device: enlarge it with what provides it (lvextend, the "
                    + "storage), the pool takes that up when it is next opened")
        }
        guard size >= device.size else {
            throw ControlError(
                .refused,
                "\(device.path) has \(ByteSize(bytes: device.size)) already: a pool does not shrink"
            )
        }
        guard size % unit == 0 else {
            throw ControlError(
                .refused, "\(device.path): \(size) bytes are not a multiple of \(unit)")
        }
    }

    /// A longer data device that the pool could not use would be of no use. Nothing is written.
    private static func require(
        _ metadata: FileDevice, asOf metadataSize: UInt64?, hasRoomFor dataSize: UInt64
    ) throws(ControlError) {
        do throws(MetadataError) {
            let pool = try ThinMetadata(metadata, cacheBlocks: trialCacheBlocks)
            let blockSize = UInt64(pool.dataBlockSectors) * Layout.sectorSize
            try pool.growMetadata(asOf: metadataSize)
            try pool.growData(to: min(dataSize / blockSize, Mapping.maxBlock))
        } catch {
            guard case .outOfMetadataSpace = error else { throw ControlError(error) }
            throw ControlError(
                .refused,
                "\(metadata.path) has no room for more data blocks: give it a larger "
                    + "--metadata-size, too, or delete volumes first")
        }
    }
    private static let trialCacheBlocks = 256

    private static func extend(
        _ device: FileDevice, to size: UInt64, reserving: Bool
    ) throws(ControlError) {
        do throws(DeviceError) { try device.grow(to: size, reserving: reserving) } catch {
            throw ControlError(error)
        }
    }
}
