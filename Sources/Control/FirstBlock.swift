// Block 0 of a metadata device, looked at before anybody opens a pool on it.

import BlockIO
import ThinMetadata

struct FirstBlock {
    /// Shorter than a block if the device is.
    private let bytes: [UInt8]

    init(_ device: any BlockDevice) throws(ControlError) {
        var bytes = [UInt8](
            repeating: 0, count: Int(min(device.size, UInt64(Layout.blockSize))))
        var failure: DeviceError?
        bytes.withUnsafeMutableBytes { buffer in
            do throws(DeviceError) { try device.read(at: 0, into: buffer) } catch {
                failure = error
            }
        }
        if let failure { throw ControlError(failure) }
        self.bytes = bytes
    }

    var isBlank: Bool { bytes.allSatisfy { $0 == 0 } }

    /// It has dm-thin's magic number; it may still be damaged.
    var isSuperblock: Bool {
        guard bytes.count == Layout.blockSize else { return false }
        return bytes.withUnsafeBytes {
            $0.baseAddress!.le64(SuperblockLayout.magic) == SuperblockLayout.magicValue
        }
    }

    /// Bytes of a data block, if what the superblock says is possible.
    var dataBlockSize: UInt64? {
        guard isSuperblock else { return nil }
        let sectors = bytes.withUnsafeBytes {
            $0.baseAddress!.le32(SuperblockLayout.dataBlockSize)
        }
        guard Layout.isDataBlockSize(sectors: UInt64(sectors)) else { return nil }
        return UInt64(sectors) * Layout.sectorSize
    }
}
