// Changes of the catalogue: creating, snapshotting, setting, deleting, adopting volumes. Each is asked for
// from any thread, done by the worker one after the other, and told durable or failed.
//
//     asked ──> prepared (checked, blocks reserved) ──> new catalogue written to the data device
//          ──> [origin held, writes in flight awaited] ──> [a commit awaited, for metadata space]
//          ──> applied with the new catalogue's mappings in one transaction ──> committed ──> told
//
// 1. Whether there is metadata space for all that is applied is asked before anything of it is. A
//    change that does not fit is refused; it does not fail the pool.

import Glibc
import ThinMetadata

public enum VolumeChange: Sendable, Equatable {
    case create(name: String, size: UInt64, description: String? = nil)
    case snapshot(
        origin: String, name: String, readOnly: Bool = false, description: String? = nil)
    /// What is nil stays as it is; an empty description is none.
    case set(name: String, readOnly: Bool? = nil, description: String? = nil)
    case delete(name: String)
    /// Gives a thin device that another program made a name and a size.
    case adopt(id: UInt32, name: String, size: UInt64)
    /// A deletion has ended: its entry goes.
    case forget(UInt32)
}

struct CatalogueChange {
    let change: VolumeChange
    /// Called under the lock: must not take it.
    let completion: ((PoolError?) -> Void)?
    /// There was no metadata space for a deletion at once.
    var deletesInBackground = false
}

/// A change whose catalogue is being written.
struct PreparedChange {
    let change: CatalogueChange
    let catalogue: Catalogue
    let bytes: UnsafeMutableRawBufferPointer
    let blocks: [DataBlock]
    /// The device that the change makes or removes.
    let device: ThinDeviceID
    /// A device of few mappings goes with the change itself, not in the background.
    var deletesAtOnce = false
    /// Commits that it has waited for to give metadata space back.
    var commitsAwaited = 0

    /// The one under way, and the one with all that has been given up by now.
    static let mostCommitsAwaited = 2

    /// What it does to the devices.
    var deviceChange: DeviceChange {
        switch change.change {
        case .create, .snapshot: return .create(device)
        case .delete: return deletesAtOnce ? .delete(device) : .none
        case .set, .adopt, .forget: return .none
        }
    }
}

extension Pool {
    /// Asks for a change. `completion` is called once, on any thread and under the pool's lock:
    /// with nil when the change is durable.
    public func request(
        _ change: VolumeChange, completion: @escaping @Sendable (PoolError?) -> Void
    ) {
        lock.withLock { enqueue(change, completion: completion) }
    }

    func enqueue(_ change: VolumeChange, completion: ((PoolError?) -> Void)?) {
        if let failure {
            completion?(failure)
            return
        }
        worker.changes.append(CatalogueChange(change: change, completion: completion))
        lock.signal()
    }

    // MARK: - Steps of a change

    /// Prepares the oldest change; nil: it is over already (refused, or it waits for space).
    func prepareNext() -> [WorkerIO]? {
        let change = worker.changes.removeFirst()
        do throws(PoolError) {
            let prepared = try prepare(change)
            worker.current = prepared
            let size = Int(blockSize)
            return prepared.blocks.enumerated().map { index, block in
                .writeData(
                    at: block.rawValue * blockSize,
                    from: UnsafeRawBufferPointer(
                        rebasing: prepared.bytes[(index * size)..<((index + 1) * size)]))
            }
        } catch {
            if case .delete(let name) = change.change {
                volumesByName[name]?.isBeingDeleted = false
            }
            change.completion?(error)
            return nil
        }
    }

    private func prepare(_ change: CatalogueChange) throws(PoolError) -> PreparedChange {
        if let readOnlyReason {
            throw PoolError(.readOnly, "the pool cannot be changed: \(readOnlyReason)")
        }
        var next = catalogue
        next.deleting.removeAll { forgotten.contains($0) }
        var device = CatalogueLayout.device
        var deletesAtOnce = false
        switch change.change {
        case .create(let name, let size, let description):
            try checkNew(name, size: size)
            let description = try checked(description)
            device = try freeDevice()
            next.volumes.append(
                .init(
                    id: device.rawValue, name: name, size: size, created: Self.now(),
                    description: description))
        case .snapshot(let origin, let name, let readOnly, let description):
            let source = try existing(origin)
            try checkNew(name, size: source.size)
            let description = try checked(description)
            device = try freeDevice()
            next.volumes.append(
                .init(
                    id: device.rawValue, name: name, size: source.size, origin: origin,
                    created: Self.now(), readOnly: readOnly, description: description))
        case .set(let name, let readOnly, let description):
            let volume = try existing(name)
            if let readOnly { try checkAccess(volume, readOnly) }
            let checked = try checked(description)
            let index = next.volumes.firstIndex { $0.name == name }!
            if let readOnly { next.volumes[index].readOnly = readOnly ? true : nil }
            if description != nil { next.volumes[index].description = checked }
        case .adopt(let id, let name, let size):
            try checkNew(name, size: size)
            device = ThinDeviceID(id)
            try checkAdoptable(id, size: size)
            next.volumes.append(.init(id: id, name: name, size: size, created: Self.now()))
        case .delete(let name):
            let volume = try existing(name)
            try requireUnused(volume)
            volume.isBeingDeleted = true
            device = volume.id
            next.remove(name)
            do throws(MetadataError) {
                let mapped = try metadata.details(device)?.mappedBlocks ?? 0
                deletesAtOnce =
                    mapped <= options.bounds.smallDeletion && !change.deletesInBackground
            } catch { throw PoolError(error) }
            if !deletesAtOnce { next.deleting.append(device.rawValue) }
        case .forget:
            // If there is no block for it now, the next change of the catalogue does it as well.
            break
        }
        let encoded = try next.encoded(blockSize: blockSize)
        let blocks = try takeCatalogueBlocks(UInt64(encoded.count) / blockSize)
        let bytes = UnsafeMutableRawBufferPointer.allocate(
            byteCount: encoded.count, alignment: 4096)
        bytes.copyBytes(from: encoded)
        return PreparedChange(
            change: change, catalogue: next, bytes: bytes, blocks: blocks, device: device,
            deletesAtOnce: deletesAtOnce)
    }

    /// The new catalogue is on the data device (the commit flushes it), or is not.
    func catalogueWritten(_ error: String?) {
        let prepared = worker.current!
        if let error {
            finishCurrent(
                PoolError(
                    .device, "the catalogue cannot be written to \(dataDevice.path): \(error)"))
            return
        }
        guard case .snapshot(let origin, _, _, _) = prepared.change.change,
            let volume = volumesByName[origin]
        else {
            apply()
            return
        }
        // Writes that were sent before are in the snapshot, those that come later are not.
        volume.hold()
        addDrain(epochs.retire(), .quiesced)
        processDrains()
    }

    /// Makes the change and maps the new catalogue, in the open transaction.
    func apply() {
        let prepared = worker.current!
        worker.appliesAfterCommit = false
        var held: Volume?
        if case .snapshot(let origin, _, _, _) = prepared.change.change {
            held = volumesByName[origin]
        }
        defer {
            if let held, !worker.appliesAfterCommit {
                held.release(snapshottedTime: held.pendingTime ?? held.snapshottedTime)
                held.pendingTime = nil
                resume(&held.heldSteps)
            }
        }
        if case .set(let name, let readOnly?, _) = prepared.change.change {
            // Somebody may have opened it while the catalogue was written.
            do throws(PoolError) { try checkAccess(existing(name), readOnly) } catch {
                return finishCurrent(error)
            }
        }
        do throws(MetadataError) {
            if !hasCatalogue {
                try metadata.createThin(CatalogueLayout.device)
                hasCatalogue = true
            }
            guard
                try metadata.fits(
                    prepared.deviceChange, mapping: prepared.blocks.count,
                    of: CatalogueLayout.device)
            else { return currentLacksSpace() }
            try applyChange(prepared)
        } catch {
            switch error {
            case .outOfMetadataSpace, .tooManySnapshots, .deviceExists, .noSuchDevice:
                finishCurrent(PoolError(error))
            default:
                // The open transaction may hold half of the change.
                failWithCurrent(PoolError(error))
            }
            return
        }
        do throws(MetadataError) {
            try mapCatalogue(prepared)
        } catch {
            // The change itself is made: it must not be committed without its catalogue.
            return failWithCurrent(PoolError(error))
        }
        catalogue = prepared.catalogue
        forgotten.formIntersection(catalogue.deleting)
        worker.current = nil
        prepared.bytes.deallocate()
        publish(prepared)
        refillSpareBlocks()
        endOperation()
        waitForCommit(.completion { prepared.change.completion?($0) })
    }

    /// There is no metadata space for the change, of which nothing has been done yet.
    private func currentLacksSpace() {
        let prepared = worker.current!
        if prepared.deletesAtOnce {
            // Its blocks come back in the background, in steps that take less.
            dropCurrent()
            var change = prepared.change
            change.deletesInBackground = true
            worker.changes.insert(change, at: 0)
            lock.signal()
        } else if commitGivesBack, prepared.commitsAwaited < PreparedChange.mostCommitsAwaited {
            worker.current!.commitsAwaited += 1
            worker.appliesAfterCommit = true
            requestCommit()
        } else {
            finishCurrent(PoolError(MetadataError.outOfMetadataSpace))
        }
    }

    private func applyChange(_ prepared: PreparedChange) throws(MetadataError) {
        switch prepared.change.change {
        case .create:
            try metadata.createThin(prepared.device)
        case .snapshot(let origin, _, _, _):
            let volume = volumesByName[origin]!
            try metadata.createSnapshot(prepared.device, of: volume.id)
            volume.pendingTime = metadata.time
        case .delete:
            if prepared.deletesAtOnce { try metadata.deleteDevice(prepared.device) }
        case .set, .adopt, .forget:
            break
        }
    }

    private func mapCatalogue(_ prepared: PreparedChange) throws(MetadataError) {
        for (index, block) in prepared.blocks.enumerated() {
            _ = try metadata.insert(
                CatalogueLayout.device, VirtualBlock(UInt64(index)), block, isAssured: true)
            reservations -= 1
        }
        catalogueBlocks = UInt64(prepared.blocks.count)
        do throws(MetadataError) {
            _ = try metadata.remove(
                CatalogueLayout.device, catalogueBlocks..<UInt64.max, limit: Int.max
            ) { _, _ in }
        } catch {
            // What a longer one has left does no harm; the next change takes it away.
            guard case .outOfMetadataSpace = error else { throw error }
        }
    }

    /// The volumes follow the change.
    private func publish(_ prepared: PreparedChange) {
        switch prepared.change.change {
        case .create, .snapshot, .adopt:
            if let entry = prepared.catalogue.volumes.last { addVolume(entry) }
        case .set(let name, _, _):
            let entry = prepared.catalogue.entry(named: name)!
            volumesByName[name]?.set(
                isReadOnly: entry.readOnly == true, description: entry.description)
        case .delete(let name):
            if let volume = volumesByName.removeValue(forKey: name) {
                volumesByID[volume.id] = nil
                volumes.removeAll { $0 === volume }
                dropTable(of: volume)
            }
        case .forget:
            break
        }
    }

    /// The pool fails first: which of the new catalogue's blocks are still reservations is not known,
    /// and the transaction that made them something else is dropped.
    private func failWithCurrent(_ error: PoolError) {
        fail(error)
        finishCurrent(error)
    }

    /// The change did not happen.
    private func finishCurrent(_ error: PoolError) {
        let prepared = worker.current!
        dropCurrent()
        if case .delete(let name) = prepared.change.change {
            volumesByName[name]?.isBeingDeleted = false
        }
        prepared.change.completion?(error)
    }

    /// Gives back what was prepared.
    private func dropCurrent() {
        let prepared = worker.current!
        worker.current = nil
        for block in prepared.blocks { giveBack(block) }
        refillSpareBlocks()
        prepared.bytes.deallocate()
    }

    // MARK: - Checks

    private func checkNew(_ name: String, size: UInt64) throws(PoolError) {
        if let problem = VolumeRules.nameProblem(name) { throw PoolError(.invalidName, problem) }
        if let problem = VolumeRules.sizeProblem(size) { throw PoolError(.invalidSize, problem) }
        if catalogue.entry(named: name) != nil {
            throw PoolError(.exists, "volume \"\(name)\" exists: choose another name")
        }
    }

    private func existing(_ name: String) throws(PoolError) -> Volume {
        guard let volume = volumesByName[name] else {
            throw PoolError(
                .noSuchVolume, "there is no volume \"\(name)\": see \"wafer volume list\"")
        }
        return volume
    }

    /// - Returns: nil for an empty one.
    private func checked(_ description: String?) throws(PoolError) -> String? {
        guard let description, !description.isEmpty else { return nil }
        if let problem = VolumeRules.descriptionProblem(description) {
            throw PoolError(.invalidDescription, problem)
        }
        return description
    }

    /// Clients have been told whether they can write.
    private func checkAccess(_ volume: Volume, _ readOnly: Bool) throws(PoolError) {
        if volume.isReadOnly != readOnly { try requireUnused(volume) }
    }

    private func requireUnused(_ volume: Volume) throws(PoolError) {
        guard volume.users == 0 else {
            throw PoolError(
                .inUse,
                "volume \"\(volume.name)\" is in use by \(volume.users) connection"
                    + "\(volume.users == 1 ? "" : "s"): detach it first")
        }
    }

    private func checkAdoptable(_ id: UInt32, size: UInt64) throws(PoolError) {
        do throws(MetadataError) {
            guard ThinDeviceID(id) < CatalogueLayout.device,
                try metadata.details(ThinDeviceID(id)) != nil
            else {
                throw MetadataError.noSuchDevice(ThinDeviceID(id))
            }
        } catch { throw PoolError(.noSuchVolume, "the pool has no thin device \(id) to adopt") }
        if catalogue.volumes.contains(where: { $0.id == id }) || catalogue.deleting.contains(id) {
            throw PoolError(.exists, "thin device \(id) has a name already")
        }
        let last: VirtualBlock?
        do throws(MetadataError) { last = try metadata.lastMapped(ThinDeviceID(id)) } catch {
            throw PoolError(error)
        }
        if let last, last.rawValue > (size - 1) / blockSize {
            throw PoolError(
                .invalidSize,
                "thin device \(id) has data beyond \(size) bytes: give the size that it was made "
                    + "with, at least \(bytes(last.rawValue &+ 1)) bytes")
        }
    }

    private func freeDevice() throws(PoolError) -> ThinDeviceID {
        var used: Set<UInt32>
        do throws(MetadataError) {
            used = Set(try metadata.deviceIDs().map(\.rawValue))
        } catch { throw PoolError(error) }
        used.formUnion(catalogue.deleting)
        guard let id = (1..<CatalogueLayout.device.rawValue).first(where: { !used.contains($0) })
        else {
            throw PoolError(
                .tooManyVolumes, "the pool has as many thin devices as it can: delete some")
        }
        return ThinDeviceID(id)
    }

    // MARK: - Blocks for the catalogue

    private func takeCatalogueBlocks(_ count: UInt64) throws(PoolError) -> [DataBlock] {
        var blocks: [DataBlock] = []
        while UInt64(blocks.count) < count {
            if let spare = spareBlocks.popLast() {
                blocks.append(spare)
            } else if case .success(.some(let block)) = allocate() {
                blocks.append(block)
            } else {
                for block in blocks { giveBack(block) }
                refillSpareBlocks()
                throw PoolError(
                    .outOfSpace,
                    "the pool has no free data block for its catalogue: discard something "
                        + "(fstrim) or grow \(dataDevice.path)")
            }
        }
        return blocks
    }

    /// Keeps back what the next change of the catalogue needs.
    func refillSpareBlocks() {
        guard !isReadOnly, failure == nil else { return }
        while spareBlocks.count < Int(catalogueBlocks) + 1 {
            guard metadata.dataBlocksAvailable > 0,
                let block = try? metadata.allocateDataBlock()
            else { return }
            reservations += 1
            spareBlocks.append(block)
        }
    }

    private static func now() -> UInt64 { UInt64(time(nil)) }
}
