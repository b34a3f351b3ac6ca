// Where in the volume a connection's requests go.

/// The offsets of one connection's requests.
struct Offsets {
    private let blockSize: UInt64
    private let blocks: UInt64
    private let isSequential: Bool
    private var next: UInt64
    private var random: SplitMix64

    /// In sequence each connection begins in a part of its own.
    init(
        _ operation: Operation, size: UInt64, blockSize: Int, connection: Int, connections: Int,
        seed: UInt64
    ) {
        self.blockSize = UInt64(blockSize)
        blocks = size / self.blockSize
        isSequential = operation.isSequential
        next = blocks / UInt64(connections) * UInt64(connection)
        random = SplitMix64(seed: seed << 16 + UInt64(connection))
    }

    @inline(__always)
    mutating func take() -> UInt64 {
        guard isSequential else { return random.below(blocks) * blockSize }
        let offset = next * blockSize
        next += 1
        if next == blocks { next = 0 }
        return offset
    }
}
