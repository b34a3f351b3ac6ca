// What a connection does over and over, and where in the volume.

import ArgumentParser
import NBDProtocol

enum Operation: String, CaseIterable, ExpressibleByArgument {
    case randomRead = "randread"
    case randomWrite = "randwrite"
    case read
    case write
    /// A write at random, and a flush when it is answered; both together count as one.
    case writeAndFlush = "write+flush"

    var command: Command { self == .randomRead || self == .read ? .read : .write }
    var isSequential: Bool { self == .read || self == .write }
}

/// The offsets of one connection's requests.
struct Offsets {
    private let blockSize: UInt64
    private let blocks: UInt64
    private let isSequential: Bool
    private var next: UInt64
    private var state: UInt64

    /// In sequence each connection begins in a part of its own.
    init(
        _ operation: Operation, size: UInt64, blockSize: Int, connection: Int, connections: Int,
        seed: UInt64
    ) {
        self.blockSize = UInt64(blockSize)
        blocks = size / self.blockSize
        isSequential = operation.isSequential
        next = blocks / UInt64(connections) * UInt64(connection)
        state = seed &+ UInt64(connection) &* 0xA076_1D64_78BD_642F
    }

    @inline(__always)
    mutating func take() -> UInt64 {
        guard isSequential else {
            return random().multipliedFullWidth(by: blocks).high * blockSize
        }
        let offset = next * blockSize
        next += 1
        if next == blocks { next = 0 }
        return offset
    }

    /// SplitMix64.
    @inline(__always)
    private mutating func random() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}
