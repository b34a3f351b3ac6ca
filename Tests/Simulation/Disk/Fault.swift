// What can go wrong with a simulated disk's I/O, and the count by which any single I/O of a run can
// be made to go wrong.

import Glibc

/// I/Os that end with an error.
public struct Fault: Sendable {
    public struct Operations: OptionSet, Hashable, Sendable {
        public let rawValue: UInt8
        public init(rawValue: UInt8) { self.rawValue = rawValue }

        public static let read = Self(rawValue: 1)
        public static let write = Self(rawValue: 2)
        public static let flush = Self(rawValue: 4)
        /// Zeroing a range.
        public static let zero = Self(rawValue: 8)
        public static let discard = Self(rawValue: 16)
        public static let any: Self = [.read, .write, .flush, .zero, .discard]
    }

    public var operations: Operations
    /// Where; nil: everywhere. Flushes have no place and are struck by any.
    public var sectors: Range<Int>?
    /// How many more I/Os it strikes.
    public var remaining: Int
    /// errno
    public var code: Int32

    public static let forEver = Int.max

    public init(
        _ operations: Operations, sectors: Range<Int>? = nil, remaining: Int = 1,
        code: Int32 = EIO
    ) {
        self.operations = operations
        self.sectors = sectors
        self.remaining = remaining
        self.code = code
    }
}

/// Counts the I/Os of all disks of a world, and strikes the one that it was told to.
public final class IOMeter {
    public private(set) var count = 0
    /// Faults that have struck.
    public var struck = 0
    /// The number of the I/O that fails, from 0.
    public var failing: Int?
    /// All from that one on fail, not it alone.
    public var failsForEver = false
    /// The number of the I/O before which the power is to go.
    public var cutting: Int?
    /// The power is to go now.
    public private(set) var cutIsDue = false

    public init() {}

    /// Some I/O is to go wrong that has not been done yet, or all are from now on.
    var isArmed: Bool { failing != nil || cutting != nil }

    /// The errno with which this I/O ends, if it fails.
    func next() -> Int32? {
        defer { count += 1 }
        if count == cutting { cutIsDue = true }
        guard let failing, count == failing || (failsForEver && count > failing) else {
            return nil
        }
        struck += 1
        return EIO
    }

    /// A fault that has struck is over.
    func heal() {
        if let failing, count > failing { self.failing = nil }
    }
    func cutIsDone() {
        cutIsDue = false
        cutting = nil
    }
}
