// The thin devices: their details, their mappings, and whether the two agree.

import BlockIO

extension MetadataCheck {
    struct Details {
        var mappedBlocks: UInt64
        var transactionID: UInt64
        var creationTime: UInt32
        var snapshottedTime: UInt32
        /// Where they are.
        var block: UInt64
    }

    struct MappingRoot {
        var id: UInt64
        var root: UInt64
        /// The top-level leaf that says so.
        var from: UInt64
    }

    /// A device as one superblock sees it: positions in `DeviceTables`.
    struct Device {
        var id: UInt64
        var root: Int
        /// -1: it has none.
        var details: Int
    }

    struct DeviceTables {
        /// All details and all mapping roots, once each, though pool and metadata snapshot may
        /// both reach them.
        var details: [Details] = []
        var roots: [MappingRoot] = []
        /// The nodes of `roots` in the mapping forest.
        var rootNodes: [UInt32] = []
        var main: [Device] = []
        var held: [Device] = []
        var superblock: Superblock
        var heldSuperblock: Superblock?
    }
}

extension MetadataCheck.Examination {
    typealias TreeForest = MetadataCheck.TreeForest
    typealias DeviceTables = MetadataCheck.DeviceTables

    // MARK: - Details and top level

    func readDevices(_ superblock: Superblock, _ held: Superblock?) -> DeviceTables {
        var tables = DeviceTables(superblock: superblock, heldSuperblock: held)
        var detailIDs: [UInt64] = []
        let details = TreeForest(kind: .details, reader: reader, claims: claims, log: log)
        details.visitLeaf = { bytes, node in
            node.start = tables.details.count
            let values = NodeLayout.keys + 8 * Int(bytes.le32(NodeLayout.maxEntries))
            for i in 0..<Int(node.entryCount) {
                detailIDs.append(bytes.le64(NodeLayout.keys + 8 * i))
                let entry = bytes + values + i * DeviceDetailsLayout.size
                tables.details.append(MetadataCheck.Details(entry, block: UInt64(node.block)))
            }
        }
        let top = TreeForest(kind: .topLevel, reader: reader, claims: claims, log: log)
        top.visitLeaf = { bytes, node in
            node.start = tables.roots.count
            let values = NodeLayout.keys + 8 * Int(bytes.le32(NodeLayout.maxEntries))
            for i in 0..<Int(node.entryCount) {
                tables.roots.append(
                    MetadataCheck.MappingRoot(
                        id: bytes.le64(NodeLayout.keys + 8 * i), root: bytes.le64(values + 8 * i),
                        from: UInt64(node.block)))
            }
        }
        var detailRoots = [(block: superblock.deviceDetailsRoot, from: UInt64(0))]
        var topRoots = [(block: superblock.dataMappingRoot, from: UInt64(0))]
        if let held {
            detailRoots.append((held.deviceDetailsRoot, held.block))
            topRoots.append((held.dataMappingRoot, held.block))
        }
        let detailNodes = details.grow(roots: detailRoots)
        let topNodes = top.grow(roots: topRoots)
        if !top.isComplete { sawAllMappings = false }
        for i in detailNodes.indices {
            let devices = join(
                positions(details, detailNodes[i]), detailIDs, isWhole: details.isComplete,
                positions(top, topNodes[i]), tables.roots, isWhole: top.isComplete,
                isHeld: i == 1)
            if i == 0 { tables.main = devices } else { tables.held = devices }
        }
        checkDetails(tables)
        return tables
    }

    /// The positions of a tree's leaf entries, in the order of their keys.
    private func positions(_ forest: TreeForest, _ root: UInt32) -> [Int] {
        forest.leaves(under: root).flatMap { index in
            let node = forest.nodes[Int(index)]
            return node.start..<node.start + Int(node.entryCount)
        }
    }

    /// Brings the two key sets together, which have to be the same.
    private func join(
        _ details: [Int], _ detailIDs: [UInt64], isWhole hasAllDetails: Bool,
        _ roots: [Int], _ allRoots: [MetadataCheck.MappingRoot], isWhole hasAllRoots: Bool,
        isHeld: Bool
    ) -> [MetadataCheck.Device] {
        let place = isHeld ? " of the metadata snapshot" : ""
        var detailsOfID: [UInt64: Int] = [:]
        for position in details { detailsOfID[detailIDs[position]] = position }
        var devices: [MetadataCheck.Device] = []
        for position in roots {
            let (id, from) = (allRoots[position].id, allRoots[position].from)
            let found = detailsOfID.removeValue(forKey: id)
            devices.append(MetadataCheck.Device(id: id, root: position, details: found ?? -1))
            if found == nil && hasAllDetails {
                log.add(
                    .damage, .deviceSet, block: from, device: id,
                    "is in the device tree\(place), but has no details")
            }
            if id > UInt64(ThinDeviceID.max.rawValue) && !isHeld {
                log.add(
                    .suspicious, .deviceID, block: from, device: id,
                    "the kernel accepts ids up to \(ThinDeviceID.max.rawValue)")
            }
        }
        guard hasAllRoots else { return devices }
        for (id, _) in detailsOfID.sorted(by: { $0.key < $1.key }) {
            log.add(
                .damage, .deviceSet, device: id,
                "has details, but is not in the device tree\(place)")
        }
        return devices
    }

    /// Times and transaction ids, for the pool and for the metadata snapshot.
    private func checkDetails(_ tables: DeviceTables) {
        var reported: Set<Int> = []
        func check(_ devices: [MetadataCheck.Device], _ superblock: Superblock) {
            for device in devices where device.details >= 0 {
                let details = tables.details[device.details]
                func report(
                    _ severity: CheckFinding.Severity, _ kind: CheckFinding.Kind, _ what: String
                ) {
                    guard reported.insert(device.details).inserted else { return }
                    log.add(severity, kind, block: details.block, device: device.id, what)
                }
                if details.snapshottedTime > superblock.time {
                    report(
                        .damage, .time,
                        "snapshotted_time \(details.snapshottedTime) is after the pool's time "
                            + "\(superblock.time): every write will copy")
                } else if details.creationTime > details.snapshottedTime {
                    report(
                        .suspicious, .time,
                        "creation_time \(details.creationTime) is after snapshotted_time "
                            + "\(details.snapshottedTime)")
                }
                if details.transactionID > superblock.transactionID {
                    report(
                        .suspicious, .transactionID,
                        "was made in transaction \(details.transactionID), the pool is at "
                            + "\(superblock.transactionID)")
                }
            }
        }
        check(tables.main, tables.superblock)
        if let held = tables.heldSuperblock { check(tables.held, held) }
    }

    // MARK: - Mappings

    /// Reads all mapping trees and counts what they refer to.
    func readMappings(
        of tables: borrowing DeviceTables, _ superblock: Superblock
    ) -> (forest: TreeForest, counts: MetadataCheck.DataBlockCounts, rootNodes: [UInt32]) {
        let forest = TreeForest(kind: .mapping, reader: reader, claims: claims, log: log)
        // More blocks than the metadata has room to count cannot be mapped.
        let countable = reader.blockCount * UInt64(BitmapLayout.entriesPerBitmap)
        let counts = MetadataCheck.DataBlockCounts(
            limit: min(superblock.dataMap.blockCount, countable))
        forest.visitLeaf = { [self] bytes, node in
            visitMappings(bytes, &node, counts, poolTime: superblock.time)
        }
        let rootNodes = forest.grow(roots: tables.roots.map { ($0.root, $0.from) })
        if !forest.isComplete { sawAllMappings = false }
        return (forest, counts, rootNodes)
    }

    private func visitMappings(
        _ bytes: UnsafeRawPointer, _ node: inout MetadataCheck.TreeNode,
        _ counts: MetadataCheck.DataBlockCounts, poolTime: UInt32
    ) {
        let keys = bytes + NodeLayout.keys
        let values = keys + 8 * Int(bytes.le32(NodeLayout.maxEntries))
        let end = counts.limit
        var maxTime: UInt32 = 0
        var outside = Suspects()
        var crossed = Suspects()
        var late = Suspects()
        for i in 0..<Int(node.entryCount) {
            let key = keys.le64(8 * i)
            let mapping = Mapping(rawValue: values.le64(8 * i))
            let (block, time) = (mapping.block.rawValue, mapping.time)
            maxTime = max(maxTime, time)
            if time > poolTime { late.note(key, UInt64(time)) }
            if block >= end {
                outside.note(key, block)
            } else if !counts.add(block, at: key) {
                crossed.note(key, block)
            }
        }
        report.storedMappings += UInt64(node.entryCount)
        node.maxTime = maxTime
        let place = UInt64(node.block)
        if outside.count > 0 {
            log.add(
                .damage, .dataBlockRange, block: place,
                dataBlocks: outside.value..<outside.value + 1, virtualBlock: outside.key,
                "mapped to a data block past the end, which is \(end)\(outside.others)")
        }
        if crossed.count > 0 {
            log.add(
                .damage, .crossMapped, block: place, dataBlocks: crossed.value..<crossed.value + 1,
                virtualBlock: crossed.key,
                "this data block is mapped at another virtual block, too\(crossed.others)")
        }
        if late.count > 0 {
            log.add(
                .damage, .time, block: place, virtualBlock: late.key,
                "mapped at time \(late.value), after the pool's time \(poolTime)\(late.others)")
        }
    }

    /// Mappings of one leaf with the same fault: the first one and how many there are.
    private struct Suspects {
        var count = 0
        var key: UInt64 = 0
        var value: UInt64 = 0

        mutating func note(_ key: UInt64, _ value: UInt64) {
            if count == 0 { (self.key, self.value) = (key, value) }
            count += 1
        }
        var others: String { count > 1 ? " (and \(count - 1) more mappings of this leaf)" : "" }
    }

    // MARK: - Devices against their mappings

    func check(_ tables: DeviceTables, _ forest: TreeForest) {
        shareOut(tables, forest)
        report.devices = tables.main.count
        for device in tables.main {
            if let node = rootNode(device, tables, forest) {
                let (sum, overflow) = report.mappings.addingReportingOverflow(node.mappings)
                report.mappings = overflow ? .max : sum
            }
        }
        var seen: Set<[Int]> = []
        for device in tables.main { checkMappedBlocks(device, tables, forest, &seen, place: "") }
        for device in tables.held {
            checkMappedBlocks(
                device, tables, forest, &seen, place: " in the metadata snapshot")
            guard let time = tables.heldSuperblock?.time,
                let node = rootNode(device, tables, forest), node.maxTime > time,
                node.maxTime <= tables.superblock.time
            else { continue }
            log.add(
                .damage, .time, block: UInt64(node.block), device: device.id,
                "the metadata snapshot has a mapping of time \(node.maxTime), after its own "
                    + "time \(time)")
        }
        log.attribute { block in
            guard let node = forest.node(of: block), node.owners > 0 else { return nil }
            return tables.main[Int(node.owner)].id
        }
    }

    private func rootNode(
        _ device: MetadataCheck.Device, _ tables: DeviceTables, _ forest: TreeForest
    ) -> MetadataCheck.TreeNode? {
        let index = tables.rootNodes[device.root]
        guard index != TreeForest.noNode else { return nil }
        return forest.nodes[Int(index)]
    }

    private func checkMappedBlocks(
        _ device: MetadataCheck.Device, _ tables: DeviceTables, _ forest: TreeForest,
        _ seen: inout Set<[Int]>, place: String
    ) {
        guard device.details >= 0, let node = rootNode(device, tables, forest), node.isComplete,
            seen.insert([device.details, device.root]).inserted
        else { return }
        let details = tables.details[device.details]
        guard details.mappedBlocks != node.mappings else { return }
        log.add(
            .damage, .mappedBlocks, block: details.block, device: device.id,
            "mapped_blocks is \(details.mappedBlocks), but there are \(node.mappings) "
                + "mappings\(place)")
    }

    /// Finds out which nodes several devices share, and checks that each of these devices knows:
    /// its snapshotted_time has to be after the time of every mapping in there, or a write would
    /// go to the shared block itself. A metadata snapshot is not protected in this way.
    private func shareOut(_ tables: DeviceTables, _ forest: TreeForest) {
        for (index, device) in tables.main.enumerated() {
            let node = tables.rootNodes[device.root]
            guard node != TreeForest.noNode else { continue }
            let time =
                device.details >= 0
                ? tables.details[device.details].snapshottedTime : UInt32.max
            forest.nodes[Int(node)].join(owners: 1, owner: UInt32(index), ownerTime: time)
        }
        for index in tables.rootNodes where index != TreeForest.noNode {
            checkSharing(index, tables, forest)
        }
        // Parents before children.
        for index in forest.settledOrder.reversed() {
            let node = forest.nodes[Int(index)]
            guard node.owners > 0 else { continue }
            checkSharing(index, tables, forest)
            let wasReported = forest.nodes[Int(index)].sharingReported
            for edge in node.start..<node.start + Int(node.entryCount) {
                let child = Int(forest.edgeChildren[edge])
                guard child != Int(TreeForest.noNode) else { continue }
                forest.nodes[child].join(
                    owners: node.owners, owner: node.owner, ownerTime: node.ownerTime)
                if wasReported { forest.nodes[child].sharingReported = true }
                if forest.nodes[child].isLeaf { checkSharing(UInt32(child), tables, forest) }
            }
        }
    }

    private func checkSharing(_ index: UInt32, _ tables: DeviceTables, _ forest: TreeForest) {
        let node = forest.nodes[Int(index)]
        guard node.owners > 1, node.mappings > 0, node.maxTime >= node.ownerTime,
            !node.sharingReported
        else { return }
        forest.nodes[Int(index)].sharingReported = true
        log.add(
            .damage, .sharingTime, block: UInt64(node.block),
            device: tables.main[Int(node.owner)].id,
            "shares mappings as new as time \(node.maxTime) with another device, but its "
                + "snapshotted_time is \(node.ownerTime): writes would change both")
    }
}

extension MetadataCheck.Details {
    init(_ bytes: UnsafeRawPointer, block: UInt64) {
        mappedBlocks = bytes.le64(DeviceDetailsLayout.mappedBlocks)
        transactionID = bytes.le64(DeviceDetailsLayout.transactionID)
        creationTime = bytes.le32(DeviceDetailsLayout.creationTime)
        snapshottedTime = bytes.le32(DeviceDetailsLayout.snapshottedTime)
        self.block = block
    }
}

extension MetadataCheck.TreeNode {
    /// Another way from a device to this node.
    mutating func join(owners: UInt8, owner: UInt32, ownerTime: UInt32) {
        if self.owners == 0 || ownerTime < self.ownerTime {
            (self.owner, self.ownerTime) = (owner, ownerTime)
        }
        self.owners = min(2, self.owners + owners)
    }
}
