// The orders that a commit must keep, asserted on a recording: what each superblock that reached
// the device refers to, and what had been done to it by then.
//
// The trees are read with the library's own reader from the bytes that the device held at that
// moment; which metadata blocks they consist of is what the self-check reads.

import BlockIO
import Glibc
import ThinMetadata

/// A superblock in a recording, and the state it makes the pool's.
struct RecordedCommit {
    var superblock: RecordedIO
    /// Metadata blocks that it reaches, block 0 not counted.
    var tree: Set<UInt64>
    /// Data blocks that it maps.
    var mapped: Set<UInt64>
}

struct Orders {
    private let recording: Recording
    private let flushes: [RecordedIO]
    private let commits: [RecordedCommit]
    /// What was wrong; empty: every order was kept.
    private(set) var violations: [String] = []

    var commitCount: Int { commits.count }

    /// Reads the commits of a bench's recording.
    init(_ bench: Bench) throws {
        recording = bench.recording
        flushes = recording.ios.filter { $0.kind == .flush && $0.isDone }
        var commits: [RecordedCommit] = []
        let image = MetadataImage(bench.metadataDisk.first)
        let writes = recording.ios.filter {
            $0.device == .metadata && $0.kind == .write && $0.hasEffect
        }
        for io in writes.sorted(by: { $0.end! < $1.end! }) {
            image.platter.apply(io, in: io.range)
            guard io.isSuperblock else { continue }
            let state = try image.reachable()
            commits.append(
                RecordedCommit(superblock: io, tree: state.blocks, mapped: state.mapped))
        }
        self.commits = commits
        checkSuperblocks()
        checkTrees()
        checkMappings()
        checkDiscards()
    }

    private mutating func require(_ condition: Bool, _ what: @autoclosure () -> String) {
        if !condition { violations.append(what()) }
    }

    /// A flush of the device that began after `from` and ended before `until`.
    private func hasFlush(_ device: DeviceName, after from: Int, before until: Int) -> Bool {
        flushes.contains { $0.device == device && $0.begin > from && $0.end! < until }
    }

    /// No other write of metadata is in flight beside a superblock.
    private mutating func checkSuperblocks() {
        let writes = recording.ios.filter { $0.device == .metadata && $0.kind == .write }
        for commit in commits {
            let times = commit.superblock.begin...commit.superblock.end!
            for io in writes where io.begin != commit.superblock.begin {
                let end = io.end ?? Int.max
                require(
                    end < times.lowerBound || io.begin > times.upperBound,
                    "\(io.label) is in flight beside the superblock of \(times)")
            }
        }
    }

    /// Every block of a tree was flushed before its superblock began, and none is written again
    /// before the next superblock has ended.
    private mutating func checkTrees() {
        let writes = recording.ios.filter {
            $0.device == .metadata && $0.kind == .write && !$0.isSuperblock
        }
        for (index, commit) in commits.enumerated() {
            let next = index + 1 < commits.count ? commits[index + 1].superblock.end! : Int.max
            for io in writes {
                let blocks =
                    UInt64(io.offset / Layout.blockSize)...UInt64(
                        (io.range.upperBound - 1) / Layout.blockSize)
                guard blocks.contains(where: { commit.tree.contains($0) }) else { continue }
                if let end = io.end, end < commit.superblock.begin {
                    require(
                        hasFlush(.metadata, after: end, before: commit.superblock.begin),
                        "\(io.label) was not flushed before the superblock that refers to it")
                } else {
                    require(
                        io.begin > next,
                        "\(io.label) overwrites the committed state of \(commit.superblock.end!)")
                }
            }
        }
    }

    /// What a new mapping refers to was written whole, and a flush that began when that had ended
    /// was over before the superblock began.
    private mutating func checkMappings() {
        // By the data block whose first byte they write, in the order in which they began.
        var fills: [UInt64: [RecordedIO]] = [:]
        for io in recording.ios
        where io.device == .data && io.changesDevice && io.kind != .discard && io.hasEffect {
            let first = (io.offset + Bench.blockSize - 1) / Bench.blockSize
            for block in first..<max(first, (io.range.upperBound - 1) / Bench.blockSize + 1) {
                fills[UInt64(block), default: []].append(io)
            }
        }
        var freedAt: [UInt64: Int] = [:]
        var before: Set<UInt64> = []
        for commit in commits {
            for block in commit.mapped.subtracting(before) {
                let start = Int(block) * Bench.blockSize
                let range = start..<(start + Bench.blockSize)
                let free = freedAt[block] ?? -1
                guard let fill = fills[block]?.first(where: { $0.begin > free }) else {
                    require(false, "data block \(block) is mapped and was never written")
                    continue
                }
                require(
                    fill.range.clamped(to: range) == range,
                    "data block \(block) is mapped after \(fill.label), which is not all of it")
                require(
                    hasFlush(.data, after: fill.end!, before: commit.superblock.begin),
                    "data block \(block) is mapped by the superblock of "
                        + "\(commit.superblock.end!), but \(fill.label) was not flushed by then")
            }
            for block in before.subtracting(commit.mapped) {
                freedAt[block] = commit.superblock.end!
            }
            before = commit.mapped
        }
    }

    /// Nothing is discarded that a state maps which a power cut could bring back.
    private mutating func checkDiscards() {
        for io in recording.ios where io.device == .data && io.kind == .discard {
            let blocks =
                UInt64(io.offset / Bench.blockSize)...UInt64(
                    (io.range.upperBound - 1) / Bench.blockSize)
            let end = io.end ?? Int.max
            let last = commits.lastIndex { $0.superblock.end! < io.begin }
            for (index, commit) in commits.enumerated()
            where index >= last ?? 0 && commit.superblock.begin < end {
                require(
                    !blocks.contains { commit.mapped.contains($0) },
                    "\(io.label) of a block that the superblock of "
                        + "\(commit.superblock.end!) maps")
            }
        }
    }
}

/// A metadata device's bytes at some moment, read by the library; notes which blocks are read.
final class MetadataImage: BlockDevice {
    var platter: Platter
    private var blocksRead: Set<UInt64> = []

    init(_ platter: Platter) { self.platter = platter }

    var path: String { "image" }
    var size: UInt64 { UInt64(platter.count) }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(DeviceError) {
        platter.read(at: Int(offset), into: buffer)
        let block = UInt64(Layout.blockSize)
        blocksRead.formUnion(offset / block..<(offset + UInt64(buffer.count)) / block)
    }

    func write(at: UInt64, from: UnsafeRawBufferPointer) throws(DeviceError) {
        preconditionFailure("an image is only read")
    }

    func flush() throws(DeviceError) {}

    /// The metadata blocks that block 0 reaches, itself not counted, and the data blocks that
    /// they map.
    func reachable() throws -> (blocks: Set<UInt64>, mapped: Set<UInt64>) {
        blocksRead = []
        let metadata = try ThinMetadata(self, cacheBlocks: 1024)
        var mapped: Set<UInt64> = []
        for id in try metadata.deviceIDs() {
            var next = VirtualBlock(0)
            let limit = VirtualBlock(UInt64.max)
            while next < limit {
                next = try metadata.visitLeaf(id, from: next, limit: limit) { _, mapping in
                    mapped.insert(mapping.block.rawValue)
                }
            }
        }
        // The reader has not seen all bitmaps and overflow trees; what allocates reads the rest.
        blocksRead.formUnion(try spaceMapBlocks())
        blocksRead.remove(0)
        return (blocksRead, mapped)
    }

    /// Blocks of both space maps, by the superblock's roots.
    private func spaceMapBlocks() throws -> Set<UInt64> {
        var blocks: Set<UInt64> = []
        let superblock = page(0)
        func root(_ map: Int, _ field: Int) -> UInt64 { superblock.le64(map + field) }
        for map in [SuperblockLayout.dataSpaceMapRoot, SuperblockLayout.metadataSpaceMapRoot] {
            addTree(
                root(map, SpaceMapRootLayout.refCountRoot), valueSize: 4, isIndex: false, &blocks)
        }
        let index = root(SuperblockLayout.metadataSpaceMapRoot, SpaceMapRootLayout.bitmapRoot)
        blocks.insert(index)
        let entries = page(index)
        let count = root(SuperblockLayout.metadataSpaceMapRoot, SpaceMapRootLayout.blockCount)
        let bitmaps = (Int(count) + BitmapLayout.entriesPerBitmap - 1)
            / BitmapLayout.entriesPerBitmap
        for bitmap in 0..<bitmaps {
            blocks.insert(
                entries.le64(IndexBlockLayout.entries + bitmap * IndexEntryLayout.size))
        }
        addTree(
            root(SuperblockLayout.dataSpaceMapRoot, SpaceMapRootLayout.bitmapRoot),
            valueSize: IndexEntryLayout.size, isIndex: true, &blocks)
        return blocks
    }

    private func addTree(
        _ root: UInt64, valueSize: Int, isIndex: Bool, _ blocks: inout Set<UInt64>
    ) {
        blocks.insert(root)
        let node = page(root)
        let isLeaf = node.le32(NodeLayout.flags) & NodeLayout.leafFlag != 0
        let values = NodeLayout.keys + 8 * Int(node.le32(NodeLayout.maxEntries))
        for entry in 0..<Int(node.le32(NodeLayout.entryCount)) {
            if !isLeaf {
                addTree(
                    node.le64(values + 8 * entry), valueSize: valueSize, isIndex: isIndex, &blocks)
            } else if isIndex {
                blocks.insert(node.le64(values + valueSize * entry))
            }
        }
    }

    private func page(_ block: UInt64) -> PageBytes {
        var bytes = [UInt8](repeating: 0, count: Layout.blockSize)
        bytes.withUnsafeMutableBytes {
            platter.read(at: Int(block) * Layout.blockSize, into: $0)
        }
        return PageBytes(bytes: bytes)
    }
}

private struct PageBytes {
    let bytes: [UInt8]
    func le32(_ offset: Int) -> UInt32 {
        bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: offset, as: UInt32.self) }
    }
    func le64(_ offset: Int) -> UInt64 {
        bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: offset, as: UInt64.self) }
    }
}
