// Which virtual blocks are being provisioned, copied or zeroed right now, and who waits for them.

import ThinMetadata

/// A virtual block of a volume in one word: 24 bits of device, 40 bits of block.
struct CellKey: Hashable, Comparable {
    let rawValue: UInt64

    init(_ device: ThinDeviceID, _ block: UInt64) {
        // A volume is at most 2^53 bytes and a block at least 2^16.
        precondition(block <= Self.maxBlock)
        rawValue = UInt64(device.rawValue) << Self.blockBits | block
    }

    private static let blockBits = 40
    private static let maxBlock: UInt64 = 1 << blockBits - 1

    var device: UInt32 { UInt32(rawValue >> Self.blockBits) }
    var block: UInt64 { rawValue & Self.maxBlock }
    static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

extension Pool {
    /// The lowest block of the range that is busy.
    func firstCell(of device: ThinDeviceID, in range: Range<UInt64>) -> UInt64? {
        if cells.isEmpty { return nil }
        var first: UInt64?
        for key in cells.keys where key.device == device.rawValue && range.contains(key.block) {
            first = min(first ?? key.block, key.block)
        }
        return first
    }

    func park(_ reference: StepReference, inCell key: CellKey) {
        park(reference, in: &cells[key]!)
    }

    func park(_ reference: StepReference, in list: inout ParkedSteps) {
        step(reference).pointee.next = 0
        if list.isEmpty {
            list.head = reference.rawValue
        } else {
            step(StepReference(rawValue: list.tail)).pointee.next = reference.rawValue
        }
        list.tail = reference.rawValue
    }

    /// Lets every parked step ask again, in the order in which they came.
    func resume(_ list: inout ParkedSteps) {
        var next = list.head
        list = ParkedSteps()
        while next != 0 {
            let reference = StepReference(rawValue: next)
            next = step(reference).pointee.next
            engine(reference.engine).post(.resume(reference.step))
        }
    }

    func releaseCell(_ key: CellKey) {
        guard var waiting = cells.removeValue(forKey: key) else {
            preconditionFailure("a block was released that nobody held")
        }
        resume(&waiting)
    }

    private func step(_ reference: StepReference) -> UnsafeMutablePointer<Step> {
        engine(reference.engine).steps[reference.step]
    }
}
