// The metadata: one kind of block replaced by fuzzed bytes, or a few edits anywhere.

import ThinMetadata

/// The superblock: 512 bytes of the input behind the first one, which says whether they are sealed.
/// What follows says what is done with it.
public enum SuperblockTarget: FuzzTarget {
    public static let name = "superblock"
    public static var seeds: [[UInt8]] {
        [[0] + SeedPool.shared.bytes(of: 0, 512) + [0, 5, 9, 3, 1, 200]]
    }

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let isSealed = input.byte() & 1 == 0
        let device = SeedPool.shared.metadataDevice()
        let block = input.rest(512)
        if isSealed {
            device.overwrite(0, with: block)
        } else {
            block.baseAddress.map {
                device.editedPage(0).copyMemory(from: $0, byteCount: block.count)
            }
        }
        MetadataUse.run(device, &input)
    }
}

/// A node of each tree: its bytes are the input behind the first two, which say which tree and what
/// is done with it.
public enum NodeTarget: FuzzTarget {
    public static let name = "node"
    public static var seeds: [[UInt8]] {
        SeedPool.shared.trees.enumerated().map { place, block in
            [UInt8(place), 6, 0, 5, 9, 3, 1, 200] + SeedPool.shared.bytes(of: block, 4096)
        }
    }

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let seed = SeedPool.shared
        let tree = seed.trees[input.below(seed.trees.count)]
        var use = FuzzInput(input.rest(input.below(64)))
        let device = seed.metadataDevice()
        device.overwrite(tree, with: input.rest())
        MetadataUse.run(device, &use)
    }
}

/// The index block or a bitmap.
public enum SpaceMapTarget: FuzzTarget {
    public static let name = "space-map"
    public static var seeds: [[UInt8]] {
        let seed = SeedPool.shared
        return [seed.index, seed.metadataBitmap, seed.dataBitmap].enumerated().map {
            [UInt8($0), 6, 0, 5, 9, 3, 1, 200] + seed.bytes(of: $1, 200)
        }
    }

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let seed = SeedPool.shared
        let block = [seed.index, seed.metadataBitmap, seed.dataBitmap][input.below(3)]
        var use = FuzzInput(input.rest(input.below(64)))
        let device = seed.metadataDevice()
        device.overwrite(block, with: input.rest())
        MetadataUse.run(device, &use)
    }
}

/// Edits anywhere in the metadata, and a sequence of operations on it.
public enum MetadataTarget: FuzzTarget {
    public static let name = "metadata"

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let device = SeedPool.shared.metadataDevice()
        device.spoil(&input)
        MetadataUse.run(device, &input)
    }
}

/// Edits anywhere in the metadata, and the self-check, which finds words for all of it.
public enum CheckTarget: FuzzTarget {
    public static let name = "check"

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let device = SeedPool.shared.metadataDevice()
        device.spoil(&input)
        var check = MetadataCheck(
            device: device, dataDeviceBlocks: UInt64(SeedPool.dataBlocks))
        let report = check.run()
        for finding in report.findings {
            require(!finding.description.isEmpty, "a finding without words")
        }
        require(report.isClean == report.findings.isEmpty, "findings that are not told")
        require(
            report.findings.count <= MetadataCheck.findingLimit, "more findings than there may be")
    }
}
