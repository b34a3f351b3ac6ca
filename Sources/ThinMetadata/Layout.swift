// Where every field of a metadata block is: dm-thin metadata, version 2.
// All integers are little-endian; a block is 4096 bytes; Docs/format.md has the tables.
//
// Every block starts with:  0 csum u32 | 4 type-specific u32 | 8 blocknr u64

import CLinux

public enum Layout {
    public static let blockSize = 4096
    public static let sectorSize: UInt64 = 512
    /// Sectors in a metadata block; also what the superblock's field has to say.
    public static let metadataBlockSectors: UInt32 = 8
    /// 255 bitmaps of 16,320 blocks: a larger metadata device is accepted, the excess ignored.
    public static let maxMetadataBlocks: UInt64 = 255 * 16_320
    /// Data block size, in sectors: 64 KiB to 1 GiB, a multiple of 64 KiB.
    public static let minDataBlockSectors: UInt32 = 128
    public static let maxDataBlockSectors: UInt32 = 2_097_152

    public static func isDataBlockSize(sectors: UInt64) -> Bool {
        sectors >= minDataBlockSectors && sectors <= maxDataBlockSectors
            && sectors.isMultiple(of: UInt64(minDataBlockSectors))
    }

    static let csum = 0
    static let blocknr = 8
}

/// A block's kind. There is no type field: the checksum's salt tells.
public enum BlockKind: UInt32, CaseIterable, Sendable {
    case superblock = 160_774
    case node = 121_107
    case bitmap = 240_779
    case index = 160_478
}

/// Superblock, block 0.
///
/// | offset | field | offset | field |
/// |---|---|---|---|
/// | 4 | flags u32 | 192 | metadata space-map root, 128 bytes |
/// | 16 | uuid 16 bytes | 320 | data mapping root u64 |
/// | 32 | magic u64 | 328 | device details root u64 |
/// | 40 | version u32 | 336 | data block size u32, sectors |
/// | 44 | time u32 | 340 | metadata block size u32, sectors |
/// | 48 | transaction id u64 | 344 | metadata nr blocks u64 (at format time) |
/// | 56 | held root u64 | 352 | compat u32, compat-ro u32, incompat u32 |
/// | 64 | data space-map root, 128 bytes | | |
///
/// The live part lies in the first 512-byte sector, so that a write that is atomic by sector
/// leaves the old or the new superblock, both with a valid checksum.
public enum SuperblockLayout {
    public static let flags = 4
    public static let uuid = 16
    public static let magic = 32
    public static let version = 40
    public static let time = 44
    public static let transactionID = 48
    public static let heldRoot = 56
    public static let dataSpaceMapRoot = 64
    public static let metadataSpaceMapRoot = 192
    public static let dataMappingRoot = 320
    public static let deviceDetailsRoot = 328
    public static let dataBlockSize = 336
    public static let metadataBlockSize = 340
    public static let metadataBlockCount = 344
    public static let compatFlags = 352
    public static let compatReadOnlyFlags = 356
    public static let incompatFlags = 360

    public static let magicValue: UInt64 = 27_022_010
    public static let versionValue: UInt32 = 2
    public static let needsCheckFlag: UInt32 = 1
}

/// A space-map root, 32 bytes inside the superblock.
public enum SpaceMapRootLayout {
    public static let blockCount = 0
    public static let allocatedCount = 8
    public static let bitmapRoot = 16
    public static let refCountRoot = 24
    public static let size = 32
}

/// A B-tree node.
///
/// | offset | field |
/// |---|---|
/// | 4 | flags u32: 1 internal, 2 leaf |
/// | 16 | nr_entries u32 |
/// | 20 | max_entries u32 |
/// | 24 | value_size u32 |
/// | 28 | padding u32, 0 |
/// | 32 | keys, u64 x max_entries |
/// | 32 + 8 x max_entries | values, value_size x max_entries |
public enum NodeLayout {
    public static let flags = 4
    public static let entryCount = 16
    public static let maxEntries = 20
    public static let valueSize = 24
    public static let keys = 32

    public static let internalFlag: UInt32 = 1
    public static let leafFlag: UInt32 = 2

    /// `3 * floor(floor(4064 / (8 + value_size)) / 3)`
    public static func capacity(valueSize: Int) -> Int { (4064 / (8 + valueSize)) / 3 * 3 }
    /// Values of an internal node are child block numbers, whatever the leaves hold.
    public static let internalValueSize = 8
}

/// A space-map bitmap: 16-byte header, then 2 bits a block, 16,320 blocks.
/// Entry n is in byte `16 + n/4` at bits s = 2(n mod 4) and s+1, **high bit first**: bit s is the
/// count's high bit, bit s+1 its low bit. 3 means that the count is in the overflow tree.
public enum BitmapLayout {
    public static let entries = 16
    public static let entriesPerBitmap = 16_320
}

/// An index entry, 16 bytes: the bitmap's block u64, nr_free u32, none_free_before u32.
/// `nr_free` counts the zero entries of the whole bitmap, those past the device's end included.
public enum IndexEntryLayout {
    public static let block = 0
    public static let freeCount = 8
    public static let noneFreeBefore = 12
    public static let size = 16
}

/// The metadata space map's index block: 16-byte header and 255 index entries.
public enum IndexBlockLayout {
    public static let entries = 16
    public static let maxEntries = 255
}

/// Device details, 24 bytes: mapped_blocks u64, transaction_id u64, creation_time u32,
/// snapshotted_time u32.
public enum DeviceDetailsLayout {
    public static let mappedBlocks = 0
    public static let transactionID = 8
    public static let creationTime = 16
    public static let snapshottedTime = 20
    public static let size = 24
}

/// Little-endian access to a 4096-byte block, and its checksum.
extension UnsafeRawPointer {
    @inline(__always) public func le32(_ offset: Int) -> UInt32 {
        UInt32(littleEndian: loadUnaligned(fromByteOffset: offset, as: UInt32.self))
    }
    @inline(__always) public func le64(_ offset: Int) -> UInt64 {
        UInt64(littleEndian: loadUnaligned(fromByteOffset: offset, as: UInt64.self))
    }

    /// The checksum that a block of this kind has to carry: CRC-32C of bytes 4 to 4095 without the
    /// final inversion, xor the kind's salt.
    public func checksum(as kind: BlockKind) -> UInt32 {
        clinux_crc32c(self + 4, Layout.blockSize - 4) ^ 0xFFFF_FFFF ^ kind.rawValue
    }
}

extension UnsafeMutableRawPointer {
    @inline(__always) public func le32(_ offset: Int) -> UInt32 {
        UnsafeRawPointer(self).le32(offset)
    }
    @inline(__always) public func le64(_ offset: Int) -> UInt64 {
        UnsafeRawPointer(self).le64(offset)
    }
    @inline(__always) public func setLE32(_ offset: Int, _ value: UInt32) {
        storeBytes(of: value.littleEndian, toByteOffset: offset, as: UInt32.self)
    }
    @inline(__always) public func setLE64(_ offset: Int, _ value: UInt64) {
        storeBytes(of: value.littleEndian, toByteOffset: offset, as: UInt64.self)
    }

    /// Writes block number and checksum: the block is then ready for the device.
    public func seal(as kind: BlockKind, number: MetadataBlock) {
        setLE64(Layout.blocknr, number.rawValue)
        setLE32(Layout.csum, UnsafeRawPointer(self).checksum(as: kind))
    }
}
