// Damage to a pool's metadata as a fuzzed sequence of edits, each followed by the checksum that goes
// with it: as a faulty writer would leave it.
//
//   count u8 | count x edit;  edit: block u8 | what u8 | place u16 | ...
//
// Fields are hit more often than the rest of a block, and pointers lead to blocks that there are.

import Glibc
import ThinMetadata

extension OverlayDevice {
    private static let maxEdits = 12

    /// Applies the edits that the input begins with.
    func spoil(_ input: inout FuzzInput) {
        let seed = SeedPool.shared
        for _ in 0..<Int(input.byte()) % (Self.maxEdits + 1) {
            let choice = input.below(seed.blocks.count + 12)
            let hubs = [0, seed.index, seed.metadataBitmap, seed.dataBitmap] + seed.trees
            let number =
                choice < seed.blocks.count
                ? seed.blocks[choice].number : hubs[(choice - seed.blocks.count) % hubs.count]
            edit(number, seed.kind(of: number), &input)
        }
    }

    /// Replaces the beginning of a block.
    func overwrite(_ number: Int, with bytes: UnsafeRawBufferPointer) {
        let page = editedPage(number)
        if let base = bytes.baseAddress { memcpy(page, base, min(bytes.count, Layout.blockSize)) }
        page.setLE64(Layout.blocknrOffset, UInt64(number))
        seal(number, as: SeedPool.shared.kind(of: number))
    }

    private func seal(_ number: Int, as kind: BlockKind) {
        let page = editedPage(number)
        page.setLE32(0, UnsafeRawPointer(page).checksum(as: kind))
    }

    private func edit(_ number: Int, _ kind: BlockKind, _ input: inout FuzzInput) {
        let page = editedPage(number)
        let what = input.byte()
        let place = Self.place(in: page, kind, &input)
        switch what % 12 {
        case 0: page.storeBytes(of: input.byte(), toByteOffset: place, as: UInt8.self)
        case 1: page.setLE32(place & ~3, input.word(UInt32.self))
        case 2: page.setLE64(min(place & ~3, 4088), input.word(UInt64.self))
        case 3, 4: page.setLE64(min(place & ~3, 4088), Self.pointer(&input))
        case 5: page.setLE32(place & ~3, UInt32(input.byte()))
        case 6: page.setLE64(min(place & ~3, 4088), UInt64(input.byte()))
        case 7: page.setLE64(min(place & ~3, 4088), .max << UInt64(input.byte() % 64))
        case 8: memset(page + place, Int32(input.byte()), min(Int(input.byte()), 4096 - place))
        case 9:
            let bytes = input.rest(min(Int(input.byte()), 4096 - place))
            if let base = bytes.baseAddress { memcpy(page + place, base, bytes.count) }
        case 10:
            // Another block in this one's place.
            let seed = SeedPool.shared
            let other = seed.blocks[input.below(seed.blocks.count)].number
            memmove(page, self.page(other), Layout.blockSize)
            page.setLE64(Layout.blocknrOffset, UInt64(number))
            return seal(number, as: seed.kind(of: other))
        default:
            // A list of entries that is longer or shorter.
            page.setLE32(NodeLayout.entryCount, UInt32(input.byte()))
        }
        // Now and then the checksum is left as it was.
        if what < 240 { seal(number, as: kind) }
    }

    private static func place(
        in page: UnsafeMutableRawPointer, _ kind: BlockKind, _ input: inout FuzzInput
    ) -> Int {
        let choice = Int(input.word(UInt16.self))
        guard choice < 0x8000 else { return choice % Layout.blockSize }
        switch kind {
        case .superblock: return choice % 368
        case .bitmap: return choice % 160
        case .index: return choice % 64
        case .node:
            let capacity = Int(min(page.le32(NodeLayout.maxEntries), 336))
            let size = Int(min(page.le32(NodeLayout.valueSize), 24))
            let values = NodeLayout.keys + 8 * capacity
            switch choice % 4 {
            case 0: return choice / 4 % 40
            case 1: return min(NodeLayout.keys + 8 * (choice / 4 % max(1, capacity)), 4088)
            default: return min(values + choice / 4 % max(1, size * capacity), 4092)
            }
        }
    }

    private static func pointer(_ input: inout FuzzInput) -> UInt64 {
        let choice = Int(input.byte())
        let seed = SeedPool.shared
        switch choice {
        case 252: return 0
        case 253: return UInt64(SeedPool.metadataBlocks)
        case 254: return UInt64(SeedPool.metadataBlocks - 1)
        case 255: return .max
        default: return UInt64(seed.blocks[choice % seed.blocks.count].number)
        }
    }
}

extension Layout {
    /// Where each block says which it is.
    static let blocknrOffset = 8
}
