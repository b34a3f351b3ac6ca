// Meta contexts as questions to the pool's map, and the answers as chunks.
//
//   base:allocation               bit 0 hole, bit 1 reads as zeroes
//   wafer:shared                  bit 0 other volumes have the block, too: writing to it copies it
//   wafer:changed-since:VOLUME    bit 0 not the same block as in that volume

import NBDProtocol
import ThinPool

/// The contexts that Wafer adds to the protocol's own.
package enum WaferContext {
    package static let shared = "wafer:shared"
    package static let changedSince = "wafer:changed-since:"

    /// The volume that the context compares with.
    static func base(_ context: String) -> String? {
        context.hasPrefix(changedSince) ? String(context.dropFirst(changedSince.count)) : nil
    }
}

/// The contexts that a session has selected, with what each asks.
struct VolumeContexts {
    private(set) var selected: [MetaContext] = []
    private(set) var kinds: [ExtentKind] = []

    var isEmpty: Bool { selected.isEmpty }

    mutating func append(_ context: MetaContext, _ kind: ExtentKind) {
        selected.append(context)
        kinds.append(kind)
    }

    func only(_ ids: [UInt32]) -> VolumeContexts {
        var some = VolumeContexts()
        for (context, kind) in zip(selected, kinds) where ids.contains(context.id) {
            some.append(context, kind)
        }
        return some
    }
}

/// A BLOCK_STATUS request.
struct StatusQuery {
    private let contexts: VolumeContexts
    private let limit: Int
    let query: ExtentQuery

    /// - Parameters:
    ///   - isSingle: one extent is enough (REQ_ONE).
    ///   - blocks: of the range, rounded down.
    init(_ contexts: VolumeContexts, isSingle: Bool, blocks: UInt64) {
        self.contexts = contexts
        let most = Limits.maximumExtents / contexts.selected.count
        // A range touches up to two more blocks than fit into it, each of them one extent at most.
        limit = isSingle ? 1 : Int(min(blocks, UInt64(most - 2))) + 2
        query = ExtentQuery(kinds: contexts.kinds, limit: limit)
    }

    /// Bytes that the longest answer takes: the extents, and the reply made of them.
    func memory(_ chunk: ChunkHeader) -> Int {
        contexts.selected.count * (chunk.statusSize(extents: limit) + Self.bytes(extents: limit))
    }

    /// As much for any question about some of these contexts: fewer of them may have more extents
    /// between them than all.
    static func mostMemory(_ contexts: VolumeContexts, _ chunk: ChunkHeader) -> Int {
        (contexts.selected.count - 1) * chunk.statusSize(extents: 0)
            + chunk.statusSize(extents: Limits.maximumExtents)
            + bytes(extents: Limits.maximumExtents)
    }

    private static func bytes(extents: Int) -> Int { extents * MemoryLayout<Extent>.stride }

    /// Writes a chunk for each context; returns how many bytes.
    func write(to bytes: UnsafeMutableRawPointer, _ chunk: ChunkHeader) -> Int {
        var at = bytes
        for (index, context) in contexts.selected.enumerated() {
            let extents = query.extents[index]
            precondition(!extents.isEmpty, "a range without status")
            at = chunk.beginStatus(
                to: at, context: context.id, extents: extents.count,
                isLast: index == contexts.selected.count - 1)
            for extent in extents {
                at = chunk.writeExtent(to: at, length: extent.length, status: extent.status)
            }
        }
        return at - bytes
    }
}
