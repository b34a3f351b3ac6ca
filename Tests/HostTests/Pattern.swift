// Data that says what it is: each sector holds its writer's number and its own place, over and
// over, so that a sector out of place, of another volume, or torn is seen.

import Foundation

let sectorSize = 512

func same(_ a: [UInt8], _ b: [UInt8]) -> Bool {
    a.count == b.count
        && a.withUnsafeBytes { a in
            b.withUnsafeBytes { memcmp(a.baseAddress!, $0.baseAddress!, a.count) == 0 }
        }
}

func isZero(_ bytes: [UInt8]) -> Bool {
    bytes.withUnsafeBytes {
        bytes.isEmpty
            || $0[0] == 0
                && memcmp($0.baseAddress!, $0.baseAddress! + 1, bytes.count - 1) == 0
    }
}

/// What the sectors of a byte range hold after number `stamp` has written them.
func pattern(_ stamp: UInt64, _ offset: UInt64, _ length: Int) -> [UInt8] {
    precondition(offset % UInt64(sectorSize) == 0 && length % sectorSize == 0)
    return [UInt8](unsafeUninitializedCapacity: length) { buffer, count in
        let memory = UnsafeMutableRawBufferPointer(buffer)
        for start in stride(from: 0, to: length, by: sectorSize) {
            let sector = memory.baseAddress! + start
            fill(sector, stamp, (offset + UInt64(start)) / UInt64(sectorSize))
        }
        count = length
    }
}

/// One sector; number 0 is a sector of zeroes.
func fill(_ sector: UnsafeMutableRawPointer, _ stamp: UInt64, _ place: UInt64) {
    if stamp == 0 {
        memset(sector, 0, sectorSize)
        return
    }
    sector.storeBytes(of: stamp, as: UInt64.self)
    sector.storeBytes(of: place, toByteOffset: 8, as: UInt64.self)
    var filled = 16
    while filled < sectorSize {
        memcpy(sector + filled, sector, filled)
        filled *= 2
    }
}

/// The number of each sector of what was read at `offset`.
/// - Throws: if a sector is neither zero nor whole nor in its place.
func stamps(_ bytes: [UInt8], _ offset: UInt64) throws -> [UInt64] {
    try bytes.withUnsafeBytes { bytes in
        try stride(from: 0, to: bytes.count, by: sectorSize).map { start in
            let sector = bytes.baseAddress! + start
            let stamp = sector.loadUnaligned(as: UInt64.self)
            let place = (offset + UInt64(start)) / UInt64(sectorSize)
            let isWhole = memcmp(sector, sector + 16, sectorSize - 16) == 0
            let found = sector.loadUnaligned(fromByteOffset: 8, as: UInt64.self)
            guard isWhole, found == (stamp == 0 ? 0 : place) else {
                throw Failure(
                    "sector \(place) holds number \(stamp) of sector \(found)"
                        + (isWhole ? "" : ", torn"))
            }
            return stamp
        }
    }
}

/// Repeatable from its seed.
struct Generator: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
        return z ^ z >> 31
    }
    mutating func below(_ limit: UInt64) -> UInt64 { next() % limit }
    mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(limit)) }
    mutating func chance(_ percent: Int) -> Bool { below(100) < percent }
}
