// The superblock, and the copy of it that a metadata snapshot keeps.

import BlockIO

extension MetadataCheck {
    /// A superblock's fields that the rest of the check goes on.
    struct Superblock {
        struct SpaceMapRoot {
            var blockCount: UInt64
            var allocatedCount: UInt64
            var bitmapRoot: UInt64
            var refCountRoot: UInt64
        }

        /// Where it lies.
        var block: UInt64
        var time: UInt32
        var transactionID: UInt64
        var heldRoot: UInt64
        var dataMap: SpaceMapRoot
        var metadataMap: SpaceMapRoot
        var dataMappingRoot: UInt64
        var deviceDetailsRoot: UInt64
        var dataBlockSectors: UInt32
        var needsCheck: Bool

        init(_ bytes: UnsafeRawPointer, block: UInt64) {
            self.block = block
            time = bytes.le32(SuperblockLayout.time)
            transactionID = bytes.le64(SuperblockLayout.transactionID)
            heldRoot = bytes.le64(SuperblockLayout.heldRoot)
            dataMap = SpaceMapRoot(bytes + SuperblockLayout.dataSpaceMapRoot)
            metadataMap = SpaceMapRoot(bytes + SuperblockLayout.metadataSpaceMapRoot)
            dataMappingRoot = bytes.le64(SuperblockLayout.dataMappingRoot)
            deviceDetailsRoot = bytes.le64(SuperblockLayout.deviceDetailsRoot)
            dataBlockSectors = bytes.le32(SuperblockLayout.dataBlockSize)
            needsCheck = bytes.le32(SuperblockLayout.flags) & SuperblockLayout.needsCheckFlag != 0
        }
    }

    /// Room for a space-map root in the superblock.
    static let spaceMapRootRoom =
        SuperblockLayout.metadataSpaceMapRoot - SuperblockLayout.dataSpaceMapRoot
    static let superblockEnd = SuperblockLayout.incompatFlags + 4
}

extension MetadataCheck.Superblock.SpaceMapRoot {
    init(_ bytes: UnsafeRawPointer) {
        blockCount = bytes.le64(SpaceMapRootLayout.blockCount)
        allocatedCount = bytes.le64(SpaceMapRootLayout.allocatedCount)
        bitmapRoot = bytes.le64(SpaceMapRootLayout.bitmapRoot)
        refCountRoot = bytes.le64(SpaceMapRootLayout.refCountRoot)
    }
}

extension MetadataCheck.Examination {
    typealias Superblock = MetadataCheck.Superblock

    /// Checks the main superblock.
    /// - Returns: nil if there is none to go on from.
    func checkMainSuperblock(_ given: [UInt8]?) -> Superblock? {
        _ = claims.claim(0, as: .superblock, from: 0)
        if let given {
            return given.withUnsafeBytes { understandMain($0.baseAddress!) }
        }
        guard reader.blockCount > 0 else {
            log.add(.damage, .notAPool, "the metadata device is smaller than one block")
            return nil
        }
        return reader.withBlock(0) { bytes in bytes.flatMap { understandMain($0) } }
    }

    private func understandMain(_ bytes: UnsafeRawPointer) -> Superblock? {
        let isIntact =
            bytes.le32(Layout.csum) == bytes.checksum(as: .superblock)
        let hasMagic = bytes.le64(SuperblockLayout.magic) == SuperblockLayout.magicValue
        guard isIntact || hasMagic else {
            let isBlank = (0..<Layout.blockSize / 8).allSatisfy { bytes.le64(8 * $0) == 0 }
            log.add(
                .damage, .notAPool, block: 0,
                isBlank
                    ? "the superblock is all zero: no pool was made here"
                    : "no superblock: neither the magic number nor the checksum is there")
            return nil
        }
        _ = reader.verify(bytes, as: .superblock, number: 0, role: .superblock)
        checkFields(bytes, block: 0)
        let superblock = Superblock(bytes, block: 0)
        checkMainFields(bytes, superblock)
        return superblock
    }

    /// What holds for a superblock and for a metadata snapshot's copy.
    private func checkFields(_ bytes: UnsafeRawPointer, block: UInt64) {
        if bytes.le64(SuperblockLayout.magic) != SuperblockLayout.magicValue {
            log.add(.damage, .magic, block: block, "the superblock's magic number is wrong")
        }
        let version = bytes.le32(SuperblockLayout.version)
        if version != SuperblockLayout.versionValue {
            log.add(
                .damage, .version, block: block,
                "format version \(version), only \(SuperblockLayout.versionValue) is known")
        }
        let readOnly = bytes.le32(SuperblockLayout.compatReadOnlyFlags)
        let incompatible = bytes.le32(SuperblockLayout.incompatFlags)
        if readOnly != 0 || incompatible != 0 {
            log.add(
                .damage, .featureFlags, block: block,
                "unknown features: compat-ro flags \(readOnly), incompat flags \(incompatible)")
        }
        if bytes.le32(SuperblockLayout.compatFlags) != 0 {
            log.add(.suspicious, .unusedField, block: block, "the compat flags are not zero")
        }
        if bytes.le32(SuperblockLayout.flags) & ~SuperblockLayout.needsCheckFlag != 0 {
            log.add(.suspicious, .unusedField, block: block, "unknown superblock flags are set")
        }
        if !isZero(bytes, SuperblockLayout.uuid..<SuperblockLayout.magic) {
            log.add(.suspicious, .unusedField, block: block, "the uuid is not zero")
        }
        if !isZero(bytes, MetadataCheck.superblockEnd..<Layout.blockSize) {
            log.add(
                .suspicious, .unusedField, block: block,
                "the superblock is not zero after its last field")
        }
        let sectors = bytes.le32(SuperblockLayout.dataBlockSize)
        if !Layout.isDataBlockSize(sectors: UInt64(sectors)) {
            log.add(.damage, .geometry, block: block, "data block size of \(sectors) sectors")
        }
        let metadataSectors = bytes.le32(SuperblockLayout.metadataBlockSize)
        if metadataSectors != Layout.metadataBlockSectors {
            log.add(
                .damage, .geometry, block: block,
                "metadata block size of \(metadataSectors) sectors, must be "
                    + "\(Layout.metadataBlockSectors)")
        }
        if bytes.le32(SuperblockLayout.time) > Mapping.maxTime {
            log.add(
                .damage, .time, block: block,
                "the pool's time \(bytes.le32(SuperblockLayout.time)) does not fit the 24 bits "
                    + "that a mapping has for it")
        }
    }

    private func checkMainFields(_ bytes: UnsafeRawPointer, _ superblock: Superblock) {
        for root in [SuperblockLayout.dataSpaceMapRoot, SuperblockLayout.metadataSpaceMapRoot] {
            let unused = root + SpaceMapRootLayout.size..<root + MetadataCheck.spaceMapRootRoom
            if !isZero(bytes, unused) {
                log.add(
                    .suspicious, .unusedField, block: 0, "a space-map root is not zero at its end")
            }
        }
        let metadataCount = superblock.metadataMap.blockCount
        if metadataCount > reader.blockCount || metadataCount == 0 {
            log.add(
                .damage, .blockCount, block: 0,
                "the metadata space map has \(metadataCount) blocks, the device \(reader.blockCount)"
            )
        }
        let formatted = bytes.le64(SuperblockLayout.metadataBlockCount)
        if formatted == 0 || formatted > metadataCount {
            // Less is right: the field is not updated when the device grows.
            log.add(
                .suspicious, .geometry, block: 0,
                "the superblock speaks of \(formatted) metadata blocks, the space map of "
                    + "\(metadataCount)")
        }
        let dataCount = superblock.dataMap.blockCount
        if let present = dataDeviceBlocks, dataCount > present {
            log.add(
                .damage, .blockCount, block: 0,
                "the data space map has \(dataCount) blocks, the data device \(present)")
        } else if dataCount > Mapping.maxBlock + 1 {
            log.add(
                .damage, .blockCount, block: 0,
                "the data space map has \(dataCount) blocks, more than a mapping can name")
        }
    }

    /// Checks the metadata snapshot's copy.
    /// - Returns: nil if there is no snapshot or its copy says nothing.
    func checkHeldSuperblock(_ main: Superblock) -> Superblock? {
        guard main.heldRoot != 0 else { return nil }
        let block = main.heldRoot
        guard claims.claim(block, as: .heldSuperblock, from: 0) == .first else {
            sawAllMappings = false
            return nil
        }
        let held: Superblock? = reader.withBlock(block) { bytes in
            guard let bytes,
                reader.verify(bytes, as: .superblock, number: block, role: .heldSuperblock)
            else { return nil }
            checkFields(bytes, block: block)
            checkHeldFields(bytes, Superblock(bytes, block: block), main)
            return Superblock(bytes, block: block)
        }
        if held == nil {
            claims.isComplete = false
            sawAllMappings = false
        }
        return held
    }

    private func checkHeldFields(
        _ bytes: UnsafeRawPointer, _ held: Superblock, _ main: Superblock
    ) {
        let maps = SuperblockLayout.dataSpaceMapRoot..<SuperblockLayout.dataMappingRoot
        if !isZero(bytes, maps) || held.heldRoot != 0 {
            log.add(
                .suspicious, .unusedField, block: held.block,
                "a metadata snapshot's superblock has no space maps and no snapshot, this has")
        }
        if held.dataBlockSectors != main.dataBlockSectors {
            log.add(
                .damage, .geometry, block: held.block,
                "the metadata snapshot has another data block size than the pool")
        }
        if held.time > main.time {
            log.add(
                .damage, .time, block: held.block,
                "the metadata snapshot's time \(held.time) is after the pool's, \(main.time)")
        }
        if held.transactionID > main.transactionID {
            log.add(
                .suspicious, .transactionID, block: held.block,
                "the metadata snapshot's transaction \(held.transactionID) is after the pool's, "
                    + "\(main.transactionID)")
        }
    }

    func isZero(_ bytes: UnsafeRawPointer, _ range: Range<Int>) -> Bool {
        range.allSatisfy { bytes.load(fromByteOffset: $0, as: UInt8.self) == 0 }
    }
}
