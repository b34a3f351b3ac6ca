// What a pool's metadata has to say: the devices and their mappings, as dictionaries.

import ThinMetadata

struct MetadataModel: Equatable {
    struct Device: Equatable {
        /// Virtual block -> data block and time, as the format packs them.
        var mappings: [UInt64: Mapping] = [:]
        var creationTime: UInt32
        var snapshottedTime: UInt32
    }

    var time: UInt32 = 0
    var dataBlocks: UInt64
    var metadataBlocks: UInt64
    var devices: [UInt32: Device] = [:]

    var ids: [UInt32] { devices.keys.sorted() }

    /// Compares all that can be read of the pool with this.
    func verify(_ metadata: ThinMetadata) throws {
        guard metadata.time == time, metadata.dataBlocks == dataBlocks,
            metadata.metadataBlocks == metadataBlocks
        else {
            throw WorldFailure(
                description: "time \(metadata.time), \(metadata.dataBlocks) data blocks, "
                    + "\(metadata.metadataBlocks) metadata blocks, where \(time), \(dataBlocks), "
                    + "\(metadataBlocks) are due")
        }
        let ids = try metadata.deviceIDs().map(\.rawValue)
        guard ids == self.ids else {
            throw WorldFailure(
                description: "the devices are \(ids), where \(self.ids) are due")
        }
        for id in ids {
            try verifyDetails(metadata, id)
            try verifyMappings(metadata, id)
            metadata.trimCache()
        }
    }

    func verifyDetails(_ metadata: ThinMetadata, _ id: UInt32) throws {
        let device = devices[id]!
        let details = try metadata.details(ThinDeviceID(id))
        let due = DeviceDetails(
            mappedBlocks: UInt64(device.mappings.count), transactionID: metadata.transactionID,
            creationTime: device.creationTime, snapshottedTime: device.snapshottedTime)
        guard details == due else {
            throw WorldFailure(
                description: "device \(id): details \(String(describing: details)), "
                    + "where \(due) is due")
        }
    }

    private func verifyMappings(_ metadata: ThinMetadata, _ id: UInt32) throws {
        let due = devices[id]!.mappings
        var seen = 0
        var wrong: String?
        var last: UInt64?
        var at = VirtualBlock(0)
        while at.rawValue < UInt64.max {
            let next = try metadata.visitLeaf(
                ThinDeviceID(id), from: at, limit: VirtualBlock(.max)
            ) { virtual, mapping in
                if due[virtual.rawValue] != mapping || last ?? 0 > virtual.rawValue
                    || last == virtual.rawValue
                {
                    wrong = "virtual block \(virtual.rawValue) is mapped to \(mapping)"
                }
                last = virtual.rawValue
                seen += 1
            }
            guard next > at else {
                throw WorldFailure(description: "device \(id): a walk stays at \(at.rawValue)")
            }
            at = next
        }
        if let wrong { throw WorldFailure(description: "device \(id): \(wrong)") }
        guard seen == due.count else {
            throw WorldFailure(
                description: "device \(id): \(seen) mappings, where \(due.count) are due")
        }
    }
}
