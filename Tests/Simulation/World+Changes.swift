// Management: volumes made, snapshotted and deleted, and the pool checked, while clients go on.

import ThinMetadata
import ThinPool

extension World {
    @discardableResult
    func ask(_ change: VolumeChange) -> Change {
        let record = Change(change, sentAt: time)
        time += 1
        changes.append(record)
        note("asked: \(change)")
        if case .delete(let name) = change { models[name]?.isGoing = true }
        if case .snapshot(let origin, _, _, _) = change { models[origin]?.hasRelatives = true }
        if case .set(let name, .some, _) = change { models[name]?.access = .unknown }
        nonisolated(unsafe) let unsafeRecord = record
        pool.request(change) { unsafeRecord.result = .some($0) }
        return record
    }

    func delete(_ model: VolumeModel) {
        if model.isGoing { return }
        // Its clients leave, and mostly their going is awaited.
        leaveAll(model)
        let isInUse = (clients + broken).contains { $0.model === model }
        if isInUse && !random.oneIn(8) { return }
        ask(.delete(name: model.name))
        // Somebody comes too late.
        if random.oneIn(2) { connect(newClient(model)) }
    }

    func leaveAll(_ model: VolumeModel) {
        for client in clients where client.model === model && !client.isLeaving { client.leave() }
    }

    /// Another program makes a thin device while the pool is closed.
    func makeStranger() throws {
        guard metadataDisk.faults.isEmpty, !meter.isArmed else { return }
        let metadata = try ThinMetadata(metadataDisk, cacheBlocks: options.cacheBlocks)
        let id = UInt32(1000 + counts.reopens)
        do { try metadata.createThin(ThinDeviceID(id)) } catch {
            if case .outOfMetadataSpace = error { return }
            throw error
        }
        try worker.commit(metadata.freeze(), to: metadataDisk)
        strangers.insert(id)
    }

    /// Asks for what has to be refused, for one reason.
    func askWrongly() {
        guard let name = models.keys.sorted().first, models[name]?.isGoing == false,
            failedAt == nil, !isReadOnly
        else { return }
        let refused: [(VolumeChange, PoolError.Kind)] = [
            (.create(name: name, size: 512), .exists),
            (.create(name: "", size: 512), .invalidName),
            (.create(name: "a/b", size: 512), .invalidName),
            (.create(name: "-a", size: 512), .invalidName),
            (.create(name: String(repeating: "a", count: 256), size: 512), .invalidName),
            (.create(name: "a", size: 0), .invalidSize),
            (.create(name: "a", size: 513), .invalidSize),
            (.create(name: "a", size: Volume.maxSize + 512), .invalidSize),
            (.snapshot(origin: "nobody", name: "a"), .noSuchVolume),
            (.snapshot(origin: name, name: name), .exists),
            (.create(name: "a", size: 512, description: "a\nb"), .invalidDescription),
            (.set(name: "nobody", readOnly: true), .noSuchVolume),
            (
                .set(name: name, description: String(repeating: "a", count: 256)),
                .invalidDescription
            ),
            (.delete(name: "nobody"), .noSuchVolume),
            (.adopt(id: 999, name: "a", size: 512), .noSuchVolume),
            (.adopt(id: 1, name: name, size: 512), .exists),
        ]
        let (change, kind) = refused[random.below(refused.count)]
        nonisolated(unsafe) weak let world = self
        pool.request(change) { error in
            guard let world, !world.isTroubled, error?.kind != kind else { return }
            // The volume itself may have gone meanwhile, and the server may have ended.
            if [.noSuchVolume, .failed, .device, .metadata].contains(error?.kind) { return }
            world.wrong = WorldFailure(
                description: "\(change) ends with \(error?.message ?? "success")")
        }
    }

    /// Takes note of the changes that have been told done.
    func noteChanges() throws {
        guard changes.contains(where: { $0.result != nil }) else { return }
        let told = changes.filter { $0.result != nil }
        changes.removeAll { $0.result != nil }
        for change in told {
            let result = change.result!
            note("told: \(change.change) \(result?.message ?? "done")")
            time += 1
            if let error = result {
                switch error.kind {
                case .outOfSpace, .inUse, .noSuchVolume, .exists: break
                case .readOnly where isReadOnly: break
                default:
                    guard isTroubled else {
                        throw WorldFailure(description: "\(change.change): \(error)")
                    }
                }
                if failedAt != nil {
                    uncertain.append(change)
                } else if case .set(let name, let readOnly?, _) = change.change {
                    // It was the other before.
                    models[name]?.access =
                        readOnly ? .writable(since: time) : .readOnly(since: time)
                } else if case .delete(let name) = change.change {
                    models[name]?.isGoing = false
                }
                continue
            }
            if isReadOnly {
                throw WorldFailure(
                    description: "\(change.change) is done, though the pool is read-only")
            }
            happened(change)
            // What it holds is decided: it is read once, and may never change again by itself.
            if case .snapshot(_, let name, _, _) = change.change, let model = models[name],
                failedAt == nil
            {
                try verify(model)
            }
        }
    }

    func happened(_ change: Change) {
        switch change.change {
        case .create(let name, let size, _):
            models[name] = VolumeModel(name: name, sectors: Int(size / 512))
        case .snapshot(let origin, let name, let readOnly, _):
            guard let source = models[origin] else { return }
            models[name] = VolumeModel(
                snapshotOf: source, name: name, askedAt: change.sentAt, now: time)
            if readOnly { models[name]!.access = .readOnly(since: time) }
            counts.snapshots += 1
        case .set(let name, let readOnly?, _):
            models[name]?.access = readOnly ? .readOnly(since: time) : .writable(since: time)
        case .delete(let name):
            models[name] = nil
            counts.deletions += 1
        case .adopt(let id, let name, let size):
            models[name] = VolumeModel(name: name, sectors: Int(size / 512))
            strangers.remove(id)
        case .set, .forget:
            break
        }
    }

    /// The server has ended: whatever was not told done may have happened, as far as `names` say.
    func resolveChanges(_ names: Set<String>) {
        for change in changes + uncertain {
            switch change.change {
            case .create(let name, _, _), .snapshot(_, let name, _, _), .adopt(_, let name, _):
                if names.contains(name), models[name] == nil { happened(change) }
            case .delete(let name):
                if names.contains(name) {
                    models[name]?.isGoing = false
                } else if models[name] != nil {
                    happened(change)
                }
            case .set, .forget:
                // What has become of it is looked at when the pool is open.
                break
            }
        }
        changes = []
        uncertain = []
    }

    /// The pool's volumes and devices are just those that the clients know of.
    func checkNames(_ pool: Pool) throws {
        let names = pool.volumeNames()
        for name in models.keys where !names.contains(name) {
            throw WorldFailure(description: "volume \(name) is lost")
        }
        for name in names where models[name] == nil {
            throw WorldFailure(description: "volume \(name) has come back")
        }
        let unnamed: [VolumeInfo]
        do {
            let list = try pool.volumeList()
            try checkAccess(list)
            unnamed = list.filter { $0.state == .unnamed && !strangers.contains($0.id) }
        } catch {
            // Reading it failed.
            if isTroubled { return }
            throw error
        }
        if let device = unnamed.first {
            throw WorldFailure(description: "thin device \(device.id) has no volume")
        }
    }

    /// Who may be written to is as it was told; what was not told is known from now on.
    private func checkAccess(_ list: [VolumeInfo]) throws {
        for info in list {
            guard let model = info.name.flatMap({ models[$0] }), let readOnly = info.readOnly else {
                continue
            }
            switch model.access {
            case .writable where readOnly, .readOnly where !readOnly:
                throw WorldFailure(
                    description: "volume \(model.name) has become "
                        + (readOnly ? "read-only" : "writable"))
            case .unknown:
                model.access = readOnly ? .readOnly(since: time) : .writable(since: time)
            default: break
            }
        }
    }

    /// Some volume is to be read-only, or writable again; mostly nobody has it open then.
    func changeAccess() {
        guard let model = randomModel(), !model.isGoing else { return }
        let readOnly: Bool
        switch model.access {
        case .writable: readOnly = true
        case .readOnly: readOnly = false
        case .unknown: return
        }
        leaveAll(model)
        if (clients + broken).contains(where: { $0.model === model }), !random.oneIn(8) { return }
        ask(.set(name: model.name, readOnly: readOnly, description: "since \(time)"))
    }

    /// Checks the pool while it is served; others go on between any two reads of the check.
    func check() throws {
        guard failedAt == nil else { return }
        counts.checks += 1
        var isWalking = false
        var isInside = false
        var failure: (any Error)?
        metadataDisk.onRead = { [unowned self] in
            guard isWalking, !isInside, failure == nil else { return }
            isInside = true
            defer { isInside = false }
            do { for _ in 0..<random.below(6) { try progress() } } catch { failure = error }
        }
        let walked = metadataDisk
        defer { walked.onRead = nil }
        let report: PoolCheckReport
        do {
            // From its first word on the check reads without the pool's lock.
            report = try pool.check { _ in
                isWalking = true
                return true
            }!
        } catch {
            if let failure { throw failure }
            if isTroubled || metadataDisk !== walked { return }
            // It gives way to those who write, which is where there is little metadata.
            if error.kind == .changesTooFast { return }
            throw WorldFailure(description: "the check of the pool fails: \(error)")
        }
        isWalking = false
        if let failure { throw failure }
        // The power may have gone meanwhile.
        guard metadataDisk === walked else { return }
        if !report.isClean && !isTroubled {
            throw WorldFailure(
                description: "the check of the served pool finds: "
                    + "\(report.metadata.findings.map(\.description)) \(report.catalogue)")
        }
    }
}
