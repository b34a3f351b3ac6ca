// Editing images by hand: what other programs may have left there.

import Foundation
import ThinMetadata

extension TestDevice {
    func le32(_ block: UInt64, _ offset: Int) -> UInt32 { self.block(block).le32(offset) }
    func le64(_ block: UInt64, _ offset: Int) -> UInt64 { self.block(block).le64(offset) }

    /// Changes a block and makes its checksum right again.
    func edit(_ block: UInt64, salt: UInt32, _ change: (UnsafeMutableRawPointer) -> Void) {
        let memory = self.block(block)
        change(memory)
        memory.setLE32(0, referenceChecksum(memory, salt: salt))
    }
    func editSuperblock(_ change: (UnsafeMutableRawPointer) -> Void) {
        edit(0, salt: 160_774, change)
    }

    /// Takes a metadata snapshot the way the kernel does. Top-level and details root must not be
    /// shared yet, and all blocks used must be in the first bitmap.
    func reserveMetadataSnapshot() {
        let index = le64(0, 208)
        let bitmap = le64(index, 16)
        let used = Int(le32(index, 28))
        var free = used
        func pair(_ block: Int) -> UInt8 {
            self.block(bitmap).load(fromByteOffset: 16 + block / 4, as: UInt8.self)
                >> UInt8(2 * (block % 4)) & 3
        }
        while pair(free) != 0 { free += 1 }
        let copy = UInt64(free)
        memcpy(block(copy), block(0), 4096)
        edit(copy, salt: 160_774) {
            $0.setLE64(8, copy)
            memset($0 + 64, 0, 256)
            $0.setLE64(56, 0)
        }
        edit(bitmap, salt: 240_779) { memory in
            // On disk 2 means count 1, and 1 means count 2.
            for (number, bits) in [(free, 2), (Int(le64(0, 320)), 1), (Int(le64(0, 328)), 1)] {
                let offset = 16 + number / 4
                let byte = memory.load(fromByteOffset: offset, as: UInt8.self)
                let shift = UInt8(2 * (number % 4))
                memory.storeBytes(
                    of: byte & ~(3 << shift) | UInt8(bits) << shift, toByteOffset: offset,
                    as: UInt8.self)
            }
        }
        edit(index, salt: 160_478) { $0.setLE32(24, $0.le32(24) - 1) }
        editSuperblock {
            $0.setLE64(56, copy)
            $0.setLE64(200, $0.le64(200) + 1)
        }
    }
}
