// Whole chunks, header and payload, but for the data of a READ, which stays where it is.
//
//   OFFSET_DATA       0 offset u64 | 8 data
//   OFFSET_HOLE       0 offset u64 | 8 length u32
//   ERROR             0 error u32 | 4 text's length u16 | 6 text
//   BLOCK_STATUS      0 context u32 | 4 extents: length u32 | status u32
//   BLOCK_STATUS_EXT  0 context u32 | 4 number of extents u32 | 8 extents: length u64 | status u64

extension ChunkHeader {
    // MARK: - Sizes

    @inlinable public var dataSize: Int { size + 8 }
    @inlinable public var holeSize: Int { size + 12 }

    public func errorSize(_ text: StaticString) -> Int { size + 6 + text.utf8CodeUnitCount }

    public func statusSize(extents: Int) -> Int {
        size + (extended ? 8 + 16 * extents : 4 + 8 * extents)
    }

    // MARK: - Chunks

    /// Writes `size` bytes: done, and nothing to say.
    @inlinable public func writeNone(to bytes: UnsafeMutableRawPointer) {
        write(to: bytes, .none, isLast: true, length: 0)
    }

    /// Writes `dataSize` bytes, which `length` bytes of data have to follow.
    @inlinable public func writeData(
        to bytes: UnsafeMutableRawPointer, at offset: UInt64, length: Int, isLast: Bool
    ) {
        write(to: bytes, .offsetData, isLast: isLast, length: 8 + length)
        bytes.storeBigEndian(offset, at: size)
    }

    /// Writes `holeSize` bytes.
    public func writeHole(
        to bytes: UnsafeMutableRawPointer, at offset: UInt64, length: Int, isLast: Bool
    ) {
        write(to: bytes, .offsetHole, isLast: isLast, length: 12)
        bytes.storeBigEndian(offset, at: size)
        bytes.storeBigEndian(UInt32(length), at: size + 8)
    }

    /// Writes `errorSize` bytes.
    public func writeError(
        to bytes: UnsafeMutableRawPointer, _ error: WireError, _ text: StaticString
    ) {
        precondition(error != .none, "an error chunk has an error")
        let length = text.utf8CodeUnitCount
        write(to: bytes, .error, isLast: true, length: 6 + length)
        bytes.storeBigEndian(error.rawValue, at: size)
        bytes.storeBigEndian(UInt16(length), at: size + 4)
        (bytes + size + 6).copyMemory(from: text.utf8Start, byteCount: length)
    }

    /// Writes what precedes the extents of one context; returns where the first of them goes.
    public func beginStatus(
        to bytes: UnsafeMutableRawPointer, context: UInt32, extents: Int, isLast: Bool
    ) -> UnsafeMutableRawPointer {
        write(
            to: bytes, extended ? .blockStatusExtended : .blockStatus, isLast: isLast,
            length: statusSize(extents: extents) - size)
        bytes.storeBigEndian(context, at: size)
        guard extended else { return bytes + size + 4 }
        bytes.storeBigEndian(UInt32(extents), at: size + 4)
        return bytes + size + 8
    }

    /// Writes an extent; returns where the next goes.
    /// - Precondition: `length` fits 32 bits if the header is not extended.
    public func writeExtent(
        to bytes: UnsafeMutableRawPointer, length: UInt64, status: UInt32
    ) -> UnsafeMutableRawPointer {
        if extended {
            bytes.storeBigEndian(length, at: 0)
            bytes.storeBigEndian(UInt64(status), at: 8)
            return bytes + 16
        }
        bytes.storeBigEndian(UInt32(length), at: 0)
        bytes.storeBigEndian(status, at: 4)
        return bytes + 8
    }
}
