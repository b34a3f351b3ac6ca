// The payload of a BLOCK_STATUS that asks for some of the selected contexts only:
//
//   0 length u64 | 8 context u32, one or more
//
// Offset and length are the range asked for; the header's length is the payload's.

public struct StatusPayload: Equatable, Sendable {
    public var length: UInt64
    public var contexts: [UInt32]

    /// The longest that can be right: each context once.
    public static let maximumSize = 8 + 4 * Limits.maximumContexts

    /// Nil if it is damaged, or names a context that was not selected, or one of them twice.
    public init?(_ bytes: UnsafeRawBufferPointer, selected: [MetaContext]) {
        guard bytes.count >= 12, bytes.count <= Self.maximumSize, bytes.count % 4 == 0 else {
            return nil
        }
        length = bytes.baseAddress!.bigEndian(0)
        contexts = stride(from: 8, to: bytes.count, by: 4).map {
            bytes.baseAddress!.bigEndian($0)
        }
        guard Set(contexts).count == contexts.count,
            contexts.allSatisfy({ id in selected.contains { $0.id == id } })
        else { return nil }
    }
}
