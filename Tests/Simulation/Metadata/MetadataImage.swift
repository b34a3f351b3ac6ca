// The metadata space map as it is on a device, read without the code that wrote it.

import Glibc
import ThinMetadata

struct MetadataImage {
    let device: SparseDevice
    let superblock: [UInt8]
    let blockCount: Int
    private let index: UInt64
    private let bitmaps: [UInt64]

    init(_ device: SparseDevice) {
        self.device = device
        superblock = device.peek(0)
        let root = SuperblockLayout.metadataSpaceMapRoot
        blockCount = Int(superblock.le64(root + SpaceMapRootLayout.blockCount))
        index = superblock.le64(root + SpaceMapRootLayout.bitmapRoot)
        let entries = device.peek(index)
        let perBitmap = BitmapLayout.entriesPerBitmap
        bitmaps = (0..<(blockCount + perBitmap - 1) / perBitmap).map {
            entries.le64(IndexBlockLayout.entries + IndexEntryLayout.size * $0)
        }
    }

    /// All blocks with a reference.
    var blocksInUse: Set<UInt64> {
        var used: Set<UInt64> = []
        for (number, block) in bitmaps.enumerated() {
            device.peek(block).withUnsafeBytes { bitmap in
                for byte in BitmapLayout.entries..<Layout.blockSize where bitmap[byte] != 0 {
                    for pair in 0..<4 where bitmap[byte] >> UInt8(2 * pair) & 3 != 0 {
                        used.insert(
                            UInt64(
                                number * BitmapLayout.entriesPerBitmap
                                    + 4 * (byte - BitmapLayout.entries) + pair))
                    }
                }
            }
        }
        return used
    }

    /// Writes a count of 1 or 2, and for a block that was free the index entry.
    func setCount(_ block: UInt64, _ count: UInt8, on scratch: ScratchDevice) {
        let (number, entry) = Int(block).quotientAndRemainder(
            dividingBy: BitmapLayout.entriesPerBitmap)
        var wasFree = false
        scratch.edit(bitmaps[number], .bitmap) {
            let offset = BitmapLayout.entries + entry / 4
            let shift = UInt8(2 * (entry % 4))
            let byte = $0.load(fromByteOffset: offset, as: UInt8.self)
            wasFree = byte >> shift & 3 == 0
            // The high bit comes first.
            let bits: UInt8 = count == 1 ? 2 : 1
            $0.storeBytes(
                of: byte & ~(3 << shift) | bits << shift, toByteOffset: offset, as: UInt8.self)
        }
        guard wasFree else { return }
        scratch.edit(index, .index) {
            let free =
                IndexBlockLayout.entries + IndexEntryLayout.size * number
                + IndexEntryLayout.freeCount
            $0.setLE32(free, $0.le32(free) - 1)
            // A hint may be too low.
        }
    }
}

extension [UInt8] {
    func le64(_ offset: Int) -> UInt64 { withUnsafeBytes { $0.baseAddress!.le64(offset) } }
    func le32(_ offset: Int) -> UInt32 { withUnsafeBytes { $0.baseAddress!.le32(offset) } }
}
