// The pools that the tests start from.

import ThinMetadata

/// A pool with a bit of everything: shared roots, shared leaves, counts of 3 and more in both
/// space maps, a tree of three levels, an empty device, several bitmaps with a tail.
struct SamplePool {
    static let dataBlocks: UInt64 = 40_000
    static let devices: [UInt64] = [1, 2, 3, 4, 5, 6, 7]

    var image: PoolImage
    /// Leaves of device 1, of which 3 and 4 share the first two.
    let leaves: [UInt64]
    /// Roots of devices 1 (and 2), 3, 4, 5 (a leaf), 6 (three levels), 7 (an empty leaf).
    let root1: UInt64
    let root3: UInt64
    let leaf3: UInt64
    let root4: UInt64
    let root5: UInt64
    let root6: UInt64
    let root7: UInt64
    /// Children of device 6's root.
    let inner6: [UInt64]

    enum Held { case none, whole, diverged }

    /// Never changed: tests get copies.
    nonisolated(unsafe) private static let built: [Held: SamplePool] =
        [
            .none: .init(building: .none), .whole: .init(building: .whole),
            .diverged: .init(building: .diverged),
        ]

    init(held: Held = .none) {
        self = Self.built[held]!
        image = PoolImage(copying: image)
    }

    private init(building held: Held) {
        let image = PoolImage(blocks: 1024)
        self.image = image
        // Devices 1 to 4: device 1 written at time 0, snapshots 3, 4 and 2 at times 1, 2 and 3.
        let entries = (0..<300).map { PoolImage.Entry(UInt64(2 * $0), 100 + UInt64($0), 0) }
        leaves = (0..<3).map { image.mappingLeaf(Array(entries[100 * $0..<100 * $0 + 100])) }
        let children = leaves.enumerated().map { (UInt64(200 * $0), $1) }
        root1 = image.internalNode(children)
        func diverged(_ block: UInt64, _ time: UInt32) -> (root: UInt64, leaf: UInt64) {
            var copy = Array(entries[200...])
            copy[7] = (copy[7].key, block, time)
            let leaf = image.mappingLeaf(copy)
            return (image.internalNode(Array(children[..<2]) + [(400, leaf)]), leaf)
        }
        (root3, leaf3) = diverged(5000, 1)
        (root4, _) = diverged(5001, 2)
        root5 = image.mappingTree([(0, 6000, 3), (1, 38_000, 3), (1 << 33, 6001, 3)])
        let large = (0..<30_000).map { PoolImage.Entry(10 + UInt64($0), 7000 + UInt64($0), 2) }
        root6 = image.mappingTree(large, perLeaf: 120)
        inner6 = [image.value(root6, 0), image.value(root6, 1)]
        root7 = image.mappingTree([])
        let devices = [
            PoolImage.Device(id: 1, root: root1, mapped: 300, snapshotted: 3, transaction: 1),
            .init(id: 2, root: root1, mapped: 300, created: 3, snapshotted: 3, transaction: 4),
            .init(id: 3, root: root3, mapped: 300, created: 1, snapshotted: 1, transaction: 2),
            .init(id: 4, root: root4, mapped: 300, created: 2, snapshotted: 2, transaction: 3),
            .init(id: 5, root: root5, mapped: 3, created: 3, snapshotted: 3, transaction: 5),
            .init(id: 6, root: root6, mapped: 30_000, created: 2, snapshotted: 2, transaction: 5),
            .init(id: 7, root: root7, mapped: 0, created: 3, snapshotted: 3, transaction: 7),
        ]
        let top = image.topLevel(devices)
        let details = image.details(devices)
        var copy: PoolImage.Held?
        switch held {
        case .none: break
        case .whole: copy = .init(top: top, details: details, time: 3, transaction: 7)
        case .diverged:
            // Device 7 came later, device 5 was changed since.
            let old5 = image.mappingTree([(0, 6000, 2), (1, 6002, 2)])
            var old = Array(devices[..<6])
            old[0].snapshotted = 2
            old[4] = .init(id: 5, root: old5, mapped: 2, created: 2, snapshotted: 2)
            old[5].transaction = 3
            old.remove(at: 1)
            copy = .init(
                top: image.topLevel(old), details: image.details(old), time: 2, transaction: 4)
        }
        image.finish(
            top: top, details: details, held: copy, time: 3, dataBlocks: Self.dataBlocks)
    }
}

extension PoolImage {
    /// What the kernel leaves after formatting: nothing, and no data blocks yet.
    static func empty(blocks: Int = 64, dataBlocks: UInt64 = 0) -> PoolImage {
        let image = PoolImage(blocks: blocks)
        image.finish(
            top: image.topLevel([]), details: image.details([]), time: 0, transaction: 0,
            dataBlocks: dataBlocks)
        return image
    }

    func check(superblock: [UInt8]? = nil, dataDeviceBlocks: UInt64? = nil) -> CheckReport {
        var check = MetadataCheck(
            device: self, superblock: superblock, dataDeviceBlocks: dataDeviceBlocks)
        return check.run()
    }
}
