// The pool's volumes: read from the catalogue at the start, opened and closed by connections,
// listed for people.

import BlockIO
import ThinMetadata

extension Pool {
    // MARK: - For the server

    /// The volume of that name, in use until `close`; nil if there is none.
    public func open(exportNamed name: String) -> Volume? {
        lock.withLock { open(name) }
    }

    /// The volume, if there is one and no other.
    public func openOnlyVolume() -> Volume? {
        lock.withLock { volumesByName.count == 1 ? open(volumesByName.first!.key) : nil }
    }

    private func open(_ name: String) -> Volume? {
        guard let volume = volumesByName[name], !volume.isBeingDeleted else { return nil }
        volume.users += 1
        return volume
    }

    public func close(_ volume: Volume) {
        lock.withLock {
            precondition(volume.users > 0)
            volume.users -= 1
        }
    }

    /// Clients that wait for the volume can ask again; who serves them compares `fencesRemoved`.
    package func removeFence(of volume: Volume) {
        volume.removeFence()
        fencesRemoved.wrappingAdd(1, ordering: .acquiringAndReleasing)
    }

    public func volumeNames() -> [String] {
        lock.withLock { indexOfVolumes().names }
    }

    /// The volume that follows that name in the order of names; nil: none does.
    public func volume(after name: String?) -> (name: String, description: String?)? {
        lock.withLock {
            indexOfVolumes().name(after: name).map { ($0, volumesByName[$0]!.description) }
        }
    }

    public func volumeSize(_ name: String) -> UInt64? {
        lock.withLock { volumesByName[name]?.size }
    }

    /// Names of volumes that a difference from makes sense of: the volume's origins, its snapshots,
    /// and theirs. Sorted, at most `limit`.
    public func extentBases(of volume: Volume, limit: Int) -> [String] {
        lock.withLock { indexOfVolumes().relatives(of: volume.name, limit: limit) }
    }

    private func indexOfVolumes() -> VolumeIndex {
        if let volumeIndex { return volumeIndex }
        let index = VolumeIndex(catalogue.volumes.filter { volumesByName[$0.name] != nil })
        volumeIndex = index
        return index
    }

    // MARK: - Opening

    func addVolume(_ entry: Catalogue.Entry) {
        let id = ThinDeviceID(entry.id)
        let details: DeviceDetails?
        do throws(MetadataError) { details = try metadata.details(id) } catch {
            problems.append("volume \"\(entry.name)\" cannot be opened: \(error)")
            return
        }
        guard let details else {
            problems.append(
                "volume \"\(entry.name)\" is in the catalogue, but its thin device \(entry.id) "
                    + "is not in the pool")
            return
        }
        guard
            let volume = Volume(
                entry, blockSize: blockSize, snapshottedTime: details.snapshottedTime,
                isReadOnly: isReadOnly || entry.readOnly == true,
                tablePageShift: options.bounds.tablePageShift)
        else {
            problems.append("volume \"\(entry.name)\" cannot be opened: out of address space")
            return
        }
        volumesByName[entry.name] = volume
        volumesByID[id] = volume
        volumes.append(volume)
    }

    func loadCatalogue() throws(PoolError) {
        do throws(MetadataError) {
            guard let details = try metadata.details(CatalogueLayout.device) else { return }
            hasCatalogue = true
            catalogueBlocks = details.mappedBlocks
        } catch { throw PoolError(error) }
        // Its device was made, and the change that was to fill it was refused.
        if catalogueBlocks == 0 { return }
        guard catalogueBlocks <= metadata.dataBlocks else {
            throw PoolError(
                .metadata,
                "the pool's catalogue of volumes is damaged: its \(catalogueBlocks) blocks are "
                    + "more than the pool has")
        }
        let header = try readCatalogue(bytes: UInt64(CatalogueLayout.payload))
        defer { header.deallocate() }
        let length = try Catalogue.length(header: header.baseAddress!)
        guard length <= catalogueBlocks * blockSize else {
            throw PoolError(
                .metadata, "the pool's catalogue of volumes is damaged: it is shorter than it says")
        }
        let bytes = try readCatalogue(bytes: length)
        defer { bytes.deallocate() }
        catalogue = try Catalogue.decode(UnsafeRawBufferPointer(bytes))
        do throws(MetadataError) {
            var gone: [UInt32] = []
            for id in catalogue.deleting where try metadata.details(ThinDeviceID(id)) == nil {
                gone.append(id)
            }
            catalogue.deleting.removeAll { gone.contains($0) }
        } catch { throw PoolError(error) }
        for entry in catalogue.volumes { addVolume(entry) }
    }

    private func readCatalogue(bytes count: UInt64) throws(PoolError)
        -> UnsafeMutableRawBufferPointer
    {
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Int(count), alignment: 4096)
        var done: UInt64 = 0
        while done < count {
            let mapping: Mapping?
            do throws(MetadataError) {
                mapping = try metadata.lookup(
                    CatalogueLayout.device, VirtualBlock(done / blockSize))
            } catch {
                buffer.deallocate()
                throw PoolError(error)
            }
            guard let mapping else {
                buffer.deallocate()
                throw PoolError(
                    .metadata, "the pool's catalogue of volumes is damaged: a block is missing")
            }
            let piece = min(blockSize, count - done)
            do throws(DeviceError) {
                try dataDevice.read(
                    at: mapping.block.rawValue * blockSize,
                    into: UnsafeMutableRawBufferPointer(
                        rebasing: buffer[Int(done)..<Int(done + piece)]))
            } catch {
                buffer.deallocate()
                throw PoolError(error)
            }
            done += piece
        }
        return buffer
    }

    // MARK: - For people

    /// What the metadata says may be anything.
    func bytes(_ blocks: UInt64) -> UInt64 {
        let (bytes, isTooMuch) = blocks.multipliedReportingOverflow(by: blockSize)
        return isTooMuch ? .max : bytes
    }

    /// Nothing is written any more, until the pool is opened again.
    public var hasFailed: Bool { lock.withLock { failure != nil } }

    public func status() -> PoolStatus {
        lock.withLock {
            let mode: PoolStatus.Mode =
                failure != nil ? .failed : isReadOnly ? .readOnly : .writable
            return PoolStatus(
                mode: mode, reason: failure?.message ?? readOnlyReason, blockSize: blockSize,
                dataBlocks: metadata.dataBlocks, dataBlocksUsed: metadata.dataBlocksUsed,
                metadataBlocks: metadata.metadataBlocks,
                metadataBlocksUsed: metadata.metadataBlocksUsed,
                volumes: volumesByName.count, deleting: deletionsLeft,
                time: metadata.time, transactionID: metadata.transactionID,
                needsCheck: metadata.needsCheck,
                heldRoot: metadata.heldRoot?.rawValue,
                problems: problems + (growthProblem.map { [$0] } ?? []) + spaceProblems)
        }
    }

    /// All volumes by name, then those being deleted, then thin devices without a name.
    public func volumeList() throws(PoolError) -> [VolumeInfo] {
        lock.lock()
        defer { lock.unlock() }
        var list: [VolumeInfo] = []
        var known: Set<UInt32> = [CatalogueLayout.device.rawValue]
        do throws(MetadataError) {
            for entry in catalogue.volumes.sorted(by: { $0.name < $1.name }) {
                known.insert(entry.id)
                let mapped = try metadata.details(ThinDeviceID(entry.id))?.mappedBlocks ?? 0
                list.append(
                    VolumeInfo(
                        name: entry.name, id: entry.id, size: entry.size,
                        mappedBytes: bytes(mapped), origin: entry.origin,
                        created: entry.created,
                        connections: volumesByName[entry.name]?.users ?? 0, state: .ready,
                        readOnly: entry.readOnly ?? false, description: entry.description))
            }
            for id in try metadata.deviceIDs() where !known.contains(id.rawValue) {
                let mapped = try metadata.details(id)?.mappedBlocks ?? 0
                list.append(
                    VolumeInfo(
                        name: nil, id: id.rawValue, size: nil, mappedBytes: bytes(mapped),
                        origin: nil, created: nil, connections: 0,
                        state: catalogue.deleting.contains(id.rawValue) ? .deleting : .unnamed))
            }
        } catch { throw PoolError(error) }
        return list
    }
}

/// A pool in numbers. Blocks of data are `blockSize` bytes, of metadata 4096.
public struct PoolStatus: Codable, Sendable, Equatable {
    public enum Mode: String, Codable, Sendable {
        case writable
        case readOnly = "read-only"
        case failed
    }
    public var mode: Mode
    /// Why it is not writable.
    public var reason: String?
    public var blockSize: UInt64
    public var dataBlocks: UInt64
    public var dataBlocksUsed: UInt64
    public var metadataBlocks: UInt64
    public var metadataBlocksUsed: UInt64
    public var volumes: Int
    /// Volumes deleted whose blocks are still being given back.
    public var deleting: Int
    /// dm-thin's clock: snapshots taken so far.
    public var time: UInt32
    public var transactionID: UInt64
    public var needsCheck: Bool
    public var heldRoot: UInt64?
    public var problems: [String]
}

public struct VolumeInfo: Codable, Sendable, Equatable {
    public enum State: String, Codable, Sendable {
        case ready, deleting
        /// Made by another program and not adopted.
        case unnamed
    }
    public var name: String?
    public var id: UInt32
    /// Bytes.
    public var size: UInt64?
    /// Bytes of the volume that have a block, shared ones included.
    public var mappedBytes: UInt64
    public var origin: String?
    /// Seconds since 1970.
    public var created: UInt64?
    public var connections: Int
    public var state: State
    /// Nobody may write to it. Nil where that is not known.
    public var readOnly: Bool?
    public var description: String?
}
