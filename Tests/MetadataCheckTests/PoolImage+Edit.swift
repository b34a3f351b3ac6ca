// Changes to a finished image, each leaving everything else consistent as far as it says.

import ThinMetadata

extension SamplePool {
    /// Device 3's root, which has three children and belongs to no other device.
    var root5Internal: UInt64 { root3 }
}

extension PoolImage {
    func entries(_ node: UInt64) -> Int { with(node) { Int($0.le32(NodeLayout.entryCount)) } }

    /// Forgets the last entries of a node.
    func cut(_ node: UInt64, to count: Int) {
        edit(node, as: .node) { $0.setLE32(NodeLayout.entryCount, UInt32(count)) }
    }

    func editDetails(_ device: Int, _ body: (UnsafeMutableRawPointer) -> Void) {
        edit(places.details, as: .node) {
            body($0 + 32 + 8 * 126 + (device - 1) * DeviceDetailsLayout.size)
        }
    }
    func setMapped(_ device: Int, _ count: UInt64) {
        editDetails(device) { $0.setLE64(DeviceDetailsLayout.mappedBlocks, count) }
    }
    func setTimes(_ device: Int, created: UInt32, snapshotted: UInt32) {
        editDetails(device) {
            $0.setLE32(DeviceDetailsLayout.creationTime, created)
            $0.setLE32(DeviceDetailsLayout.snapshottedTime, snapshotted)
        }
    }

    func editHeld(_ body: (UnsafeMutableRawPointer) -> Void) {
        edit(places.held, as: .superblock, body)
    }
    /// Device 5's root in the metadata snapshot, which has no device 2.
    var heldRoot5: UInt64 { value(with(places.held) { $0.le64(320) }, 3) }

    // MARK: - Space maps

    var dataBitmap0: UInt64 { places.dataBitmaps[0] }

    func editDataIndex(_ bitmap: Int, _ body: (UnsafeMutableRawPointer) -> Void) {
        edit(places.dataIndex, as: .node) { body($0 + 32 + 8 * 168 + 16 * bitmap) }
    }

    func setHint(to entry: Int) {
        edit(places.index, as: .index) {
            $0.setLE32(IndexBlockLayout.entries + IndexEntryLayout.noneFreeBefore, UInt32(entry))
        }
    }

    /// Frees a metadata block properly.
    func setMetadataFree(_ block: UInt64) {
        setBits(places.metadataBitmaps[0], Int(block), 0)
        takeMetadata(-1)
        setHint(to: Int(min(block, UInt64(with(places.index) { $0.le32(28) }))))
    }

    func setOverflow(_ root: UInt64, _ index: Int, _ count: UInt32) {
        edit(root, as: .node) { $0.setLE32(32 + 8 * 336 + 4 * index, count) }
    }
    /// Adds an entry to an overflow tree that is one leaf.
    func addOverflow(_ root: UInt64, _ block: UInt64, _ count: UInt32) {
        changeOverflow(root) { $0[block] = count }
    }
    func cutOverflow(_ root: UInt64, removing block: UInt64) {
        changeOverflow(root) { $0[block] = nil }
    }
    func setOverflows(_ root: UInt64, _ counts: [UInt64: UInt32]) {
        changeOverflow(root) { $0 = counts }
    }
    private func changeOverflow(_ root: UInt64, _ change: (inout [UInt64: UInt32]) -> Void) {
        edit(root, as: .node) { node in
            var counts: [UInt64: UInt32] = [:]
            for i in 0..<Int(node.le32(NodeLayout.entryCount)) {
                counts[node.le64(32 + 8 * i)] = node.le32(32 + 8 * 336 + 4 * i)
            }
            change(&counts)
            node.setLE32(NodeLayout.entryCount, UInt32(counts.count))
            for (i, entry) in counts.sorted(by: { $0.key < $1.key }).enumerated() {
                node.setLE64(32 + 8 * i, entry.key)
                node.setLE32(32 + 8 * 336 + 4 * i, entry.value)
            }
        }
    }
}
