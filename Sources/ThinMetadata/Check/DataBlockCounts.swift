// The reference counts of the data blocks as the mappings give them.
//
// One byte a block, allocated where something is mapped; what does not fit goes to a dictionary.
// A second byte per block remembers at which virtual block it was first seen (a hash of it): copies
// of a leaf keep a mapping at its place, so two places mean that a block was given out twice. One
// such mistake in 256 goes unnoticed. Pools of more than 2^27 blocks do without.

extension MetadataCheck {
    final class DataBlockCounts {
        static let chunkBits: UInt64 = 16
        static let chunkSize = 1 << Int(chunkBits)
        static let ownerLimit: UInt64 = 1 << 27

        let limit: UInt64
        private let tracksPlaces: Bool
        private let chunks: UnsafeMutableBufferPointer<UnsafeMutablePointer<UInt8>?>
        /// What counts have beyond `UInt8.max`.
        private var excess: [UInt64: UInt64] = [:]

        init(limit: UInt64) {
            self.limit = limit
            tracksPlaces = limit <= Self.ownerLimit
            chunks = .allocate(
                capacity: Int((limit + UInt64(Self.chunkSize) - 1) >> Self.chunkBits))
            chunks.initialize(repeating: nil)
        }

        deinit {
            for chunk in chunks { chunk?.deallocate() }
            chunks.deallocate()
        }

        /// - Precondition: `block < limit`.
        /// - Returns: false if the block was mapped before, at another virtual block.
        @inline(__always) func add(_ block: UInt64, at virtualBlock: UInt64) -> Bool {
            let chunk = chunks[Int(block >> Self.chunkBits)] ?? makeChunk(block >> Self.chunkBits)
            let offset = Int(block) & (Self.chunkSize - 1)
            let count = chunk[offset]
            if count == .max {
                excess[block, default: 0] += 1
            } else {
                chunk[offset] = count + 1
            }
            guard tracksPlaces else { return true }
            let place = UInt8(truncatingIfNeeded: (virtualBlock &* 0x9E37_79B9_7F4A_7C15) >> 56)
            if count == 0 {
                chunk[Self.chunkSize + offset] = place
                return true
            }
            return chunk[Self.chunkSize + offset] == place
        }

        @inline(never) private func makeChunk(_ index: UInt64) -> UnsafeMutablePointer<UInt8> {
            let size = tracksPlaces ? 2 * Self.chunkSize : Self.chunkSize
            let chunk = UnsafeMutablePointer<UInt8>.allocate(capacity: size)
            chunk.initialize(repeating: 0, count: size)
            chunks[Int(index)] = chunk
            return chunk
        }

        @inline(__always) func count(of block: UInt64) -> UInt64 {
            guard block < limit, let chunk = chunks[Int(block >> Self.chunkBits)] else { return 0 }
            let count = chunk[Int(block) & (Self.chunkSize - 1)]
            return count < .max ? UInt64(count) : 255 + excess[block, default: 0]
        }

        /// Whether none of the 32 blocks from `block`, a multiple of 32, is mapped.
        @inline(__always) func isUnused32(from block: UInt64) -> Bool {
            guard block < limit, let chunk = chunks[Int(block >> Self.chunkBits)] else {
                return true
            }
            let words = UnsafeRawPointer(chunk + (Int(block) & (Self.chunkSize - 1)))
            return words.le64(0) | words.le64(8) | words.le64(16) | words.le64(24) == 0
        }

        var used: UInt64 {
            var sum: UInt64 = 0
            for case let chunk? in chunks {
                for i in 0..<Self.chunkSize where chunk[i] != 0 { sum += 1 }
            }
            return sum
        }
    }
}
