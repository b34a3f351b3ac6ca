// The words of the format as types, so that a data block is never taken for a metadata block.

/// A block of the data device; byte offset is `rawValue * dataBlockSize`. At most 40 bits.
@frozen public struct DataBlock: RawRepresentable, Hashable, Comparable, Sendable {
    public var rawValue: UInt64
    @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public init(_ rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

/// A 4096-byte block of the metadata device. Block 0 is the superblock.
@frozen public struct MetadataBlock: RawRepresentable, Hashable, Comparable, Sendable {
    public var rawValue: UInt64
    @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public init(_ rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

/// A block of a thin device, counted in data-block sizes from the device's start.
@frozen public struct VirtualBlock: RawRepresentable, Hashable, Comparable, Sendable {
    public var rawValue: UInt64
    @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public init(_ rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

/// A thin device's number, at most 2^24 - 1 (the kernel's limit).
@frozen public struct ThinDeviceID: RawRepresentable, Hashable, Comparable, Sendable {
    public var rawValue: UInt32
    @inlinable public init(rawValue: UInt32) { self.rawValue = rawValue }
    @inlinable public init(_ rawValue: UInt32) { self.rawValue = rawValue }
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
    /// The largest id that the kernel accepts.
    public static let max = ThinDeviceID((1 << 24) - 1)
}

/// A mapping as the leaves store it: `(data block << 24) | time`.
@frozen public struct Mapping: RawRepresentable, Hashable, Sendable {
    public var rawValue: UInt64
    @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

    public static let timeBits = 24
    public static let maxTime: UInt32 = (1 << 24) - 1
    public static let maxBlock: UInt64 = (1 << 40) - 1

    /// - Precondition: both fit their bits. A wider time would be or-ed into the block number
    ///   and map two virtual blocks to one data block.
    @inlinable public init(block: DataBlock, time: UInt32) {
        precondition(time <= Self.maxTime && block.rawValue <= Self.maxBlock)
        rawValue = block.rawValue << 24 | UInt64(time)
    }
    @inlinable public var block: DataBlock { DataBlock(rawValue >> 24) }
    @inlinable public var time: UInt32 { UInt32(truncatingIfNeeded: rawValue & 0xFF_FFFF) }
}
