// Block 0 in memory: what every commit rewrites last and alone.
//
// 1. Fields that are not ours (uuid, transaction id, held root, compat flags, padding) go back to
//    the device as they came.
// 2. Only the first 512 bytes ever change.

import BlockIO

import Glibc

final class Superblock {
    let bytes: UnsafeMutableRawPointer

    init() {
        bytes = .allocate(byteCount: Layout.blockSize, alignment: Layout.blockSize)
        memset(bytes, 0, Layout.blockSize)
    }
    deinit { bytes.deallocate() }

    /// Reads block 0 and refuses what is not a dm-thin pool of version 2, or not safe to touch.
    convenience init(reading device: any BlockDevice) throws(MetadataError) {
        self.init()
        let path = device.path
        guard device.size >= UInt64(Layout.blockSize) else {
            throw .notAPool(path: path, "it is only \(device.size) bytes long")
        }
        try readBlock(device, 0, into: bytes)
        if (0..<Layout.blockSize / 8).allSatisfy({ bytes.le64(8 * $0) == 0 }) {
            throw .notAPool(path: path, "it is blank")
        }
        guard bytes.le64(SuperblockLayout.magic) == SuperblockLayout.magicValue else {
            throw .notAPool(path: path, "the superblock has another magic number")
        }
        guard bytes.le32(Layout.csum) == UnsafeRawPointer(bytes).checksum(as: .superblock) else {
            throw .notAPool(path: path, "the superblock's checksum is wrong")
        }
        guard bytes.le64(Layout.blocknr) == 0 else {
            throw .notAPool(
                path: path, "the superblock says that it is block \(bytes.le64(Layout.blocknr))")
        }
        try verifyFeatures(path)
    }

    private func verifyFeatures(_ path: String) throws(MetadataError) {
        let version = bytes.le32(SuperblockLayout.version)
        guard version == SuperblockLayout.versionValue else {
            throw .unsupported(path: path, "metadata version \(version); only 2 is supported")
        }
        let incompatible = bytes.le32(SuperblockLayout.incompatFlags)
        guard incompatible == 0 else {
            throw .unsupported(path: path, "unknown incompatible features: flags \(incompatible)")
        }
        let readOnly = bytes.le32(SuperblockLayout.compatReadOnlyFlags)
        guard readOnly == 0 else {
            throw .unsupported(path: path, "unknown read-only features: flags \(readOnly)")
        }
        if let reason = Self.illegalDataBlockSize(dataBlockSectors) {
            throw .unsupported(path: path, reason)
        }
    }

    /// Why this is no data block size; nil if it is one.
    static func illegalDataBlockSize(_ sectors: UInt32) -> String? {
        guard Layout.isDataBlockSize(sectors: UInt64(sectors)) else {
            return "a data block size of \(sectors) sectors; "
                + "it has to be a multiple of 64 KiB from 64 KiB to 1 GiB"
        }
        return nil
    }

    func seal() { bytes.seal(as: .superblock, number: MetadataBlock(0)) }

    var needsCheck: Bool {
        get { bytes.le32(SuperblockLayout.flags) & SuperblockLayout.needsCheckFlag != 0 }
        set {
            let others = bytes.le32(SuperblockLayout.flags) & ~SuperblockLayout.needsCheckFlag
            bytes.setLE32(
                SuperblockLayout.flags, others | (newValue ? SuperblockLayout.needsCheckFlag : 0))
        }
    }
    var time: UInt32 {
        get { bytes.le32(SuperblockLayout.time) }
        set { bytes.setLE32(SuperblockLayout.time, newValue) }
    }
    var transactionID: UInt64 { bytes.le64(SuperblockLayout.transactionID) }
    var heldRoot: UInt64 { bytes.le64(SuperblockLayout.heldRoot) }
    var dataBlockSectors: UInt32 { bytes.le32(SuperblockLayout.dataBlockSize) }
    var mappingRoot: UInt64 {
        get { bytes.le64(SuperblockLayout.dataMappingRoot) }
        set { bytes.setLE64(SuperblockLayout.dataMappingRoot, newValue) }
    }
    var detailsRoot: UInt64 {
        get { bytes.le64(SuperblockLayout.deviceDetailsRoot) }
        set { bytes.setLE64(SuperblockLayout.deviceDetailsRoot, newValue) }
    }
    var dataSpaceMap: SpaceMapRoot {
        get { SpaceMapRoot(bytes + SuperblockLayout.dataSpaceMapRoot) }
        set { newValue.write(to: bytes + SuperblockLayout.dataSpaceMapRoot) }
    }
    var metadataSpaceMap: SpaceMapRoot {
        get { SpaceMapRoot(bytes + SuperblockLayout.metadataSpaceMapRoot) }
        set { newValue.write(to: bytes + SuperblockLayout.metadataSpaceMapRoot) }
    }
}

/// A space map's fields in the superblock.
struct SpaceMapRoot {
    var blockCount: UInt64
    var allocatedCount: UInt64
    var bitmapRoot: UInt64
    var refCountRoot: UInt64

    init(blockCount: UInt64, allocatedCount: UInt64, bitmapRoot: UInt64, refCountRoot: UInt64) {
        self.blockCount = blockCount
        self.allocatedCount = allocatedCount
        self.bitmapRoot = bitmapRoot
        self.refCountRoot = refCountRoot
    }
    init(_ memory: UnsafeMutableRawPointer) {
        blockCount = memory.le64(SpaceMapRootLayout.blockCount)
        allocatedCount = memory.le64(SpaceMapRootLayout.allocatedCount)
        bitmapRoot = memory.le64(SpaceMapRootLayout.bitmapRoot)
        refCountRoot = memory.le64(SpaceMapRootLayout.refCountRoot)
    }
    func write(to memory: UnsafeMutableRawPointer) {
        memory.setLE64(SpaceMapRootLayout.blockCount, blockCount)
        memory.setLE64(SpaceMapRootLayout.allocatedCount, allocatedCount)
        memory.setLE64(SpaceMapRootLayout.bitmapRoot, bitmapRoot)
        memory.setLE64(SpaceMapRootLayout.refCountRoot, refCountRoot)
    }
}
