// Decides whether a device is used past the page cache (O_DIRECT), and with which alignment.
//
// Clients send requests aligned to 512 bytes. Direct I/O is therefore used only where the device
// takes that; elsewhere the page cache does the read-modify-write of its larger sectors.

import CLinux
import Glibc

struct DirectAccess {
    /// What a client's requests are aligned to at the least.
    static let requestAlignment = 512

    /// nil where direct I/O is on, or was not asked for.
    var refusal: String?
    /// Offsets and lengths of direct I/O are multiples of this.
    var alignment: Int
    /// The address of direct I/O's memory is a multiple of this.
    var memoryAlignment: Int

    var isOn: Bool { refusal == nil }

    private static func refused(_ reason: String) -> DirectAccess {
        DirectAccess(refusal: reason, alignment: 1, memoryAlignment: 1)
    }

    /// Turns O_DIRECT on for `descriptor` if that works with requests aligned to 512 bytes.
    static func turnOn(_ descriptor: Int32, isBlockDevice: Bool, sector: Int, size: UInt64)
        -> DirectAccess
    {
        guard size % UInt64(requestAlignment) == 0 else {
            return refused("its size, \(size) bytes, is not a multiple of \(requestAlignment)")
        }
        var memory: UInt32 = 0
        var offset: UInt32 = 0
        let asked = clinux_direct_alignment(descriptor, &memory, &offset)
        let isKnown = asked == 0
        if isKnown && offset == 0 {
            return refused("its file system does not support direct I/O")
        }
        let alignment = isKnown ? Int(offset) : isBlockDevice ? sector : requestAlignment
        guard alignment <= requestAlignment else {
            return refused(
                "direct I/O needs requests aligned to \(alignment) bytes, clients send "
                    + "\(requestAlignment)")
        }
        guard clinux_set_direct(descriptor, true) == 0 else {
            return refused("its file system does not support direct I/O")
        }
        guard isKnown || isBlockDevice || probe(descriptor) else {
            _ = clinux_set_direct(descriptor, false)
            return refused("direct I/O there does not take requests of \(requestAlignment) bytes")
        }
        return DirectAccess(
            refusal: nil, alignment: requestAlignment,
            memoryAlignment: isKnown ? max(Int(memory), 1) : requestAlignment)
    }

    /// Where nobody says the alignment: does one sector, not at a page's beginning, read?
    private static func probe(_ descriptor: Int32) -> Bool {
        let buffer = AlignedBuffer(count: requestAlignment)
        return pread(descriptor, buffer.pointer, requestAlignment, off_t(requestAlignment)) >= 0
    }
}
