// Queries of the map (block status) among everything else, and what may be told.
//
// 1. A hole reads as zeroes at some moment between the question and the answer.
// 2. What is told to be the same in two volumes has the same contents at some such moment.
// 3. What nobody has ever been asked to change is a hole, not shared, and the same in its snapshots.
// 4. At rest, what two volumes have in one block is shared, and nothing else is.

import ThinMetadata
import ThinPool

extension World {
    /// A query under way.
    final class AskedExtents {
        let query: ExtentQuery
        let model: VolumeModel
        let other: VolumeModel
        let sectors: Range<Int>
        let begun: UInt64

        init(
            _ query: ExtentQuery, _ model: VolumeModel, _ other: VolumeModel, _ sectors: Range<Int>,
            begun: UInt64
        ) {
            self.query = query
            self.model = model
            self.other = other
            self.sectors = sectors
            self.begun = begun
        }
    }

    /// Asks for everything about a part of some volume.
    func askExtents() {
        guard let model = randomModel(), let other = randomModel(), !model.isGoing, !other.isGoing,
            let volume = pool.open(exportNamed: model.name)
        else { return }
        guard let base = pool.open(exportNamed: other.name) else { return pool.close(volume) }
        let first = random.below(model.sectors)
        let sectors =
            random.oneIn(2)
            ? 0..<model.sectors : first..<first + 1 + random.below(model.sectors - first)
        let query = ExtentQuery(
            kinds: [.allocation, .sharing, .difference(from: base)],
            limit: [1, 2, 1000][random.below(3)])
        let asked = AskedExtents(query, model, other, sectors, begun: time)
        time += 1
        counts.queries += 1
        queries.append(asked)
        note("extents of \(model.name) \(sectors), and from \(other.name)")
        let pool = pool!
        nonisolated(unsafe) weak let world = self
        reactors[random.below(reactors.count)].ask(query, volume, sectors: sectors) { error in
            pool.close(volume)
            pool.close(base)
            guard let world, let index = world.queries.firstIndex(where: { $0 === asked }) else {
                return
            }
            world.queries.remove(at: index)
            do { try world.check(asked, error) } catch {
                world.wrong = world.wrong ?? (error as? WorldFailure)
            }
        }
    }

    private func check(_ asked: AskedExtents, _ error: Int32) throws {
        note("extents of \(asked.model.name)@\(asked.begun) answered \(error)")
        if isDamaged { return }
        if error != 0 {
            if isTroubled { return }
            throw WorldFailure(
                description: "the extents of \(asked.model.name) are not told: errno \(error)")
        }
        for (kind, extents) in asked.query.extents.enumerated() {
            var at = asked.sectors.lowerBound
            var last: UInt32?
            for extent in extents {
                let end = at + Int(extent.length / 512)
                guard extent.length > 0, extent.length % 512 == 0, extent.status != last,
                    end <= asked.sectors.upperBound
                else {
                    throw WorldFailure(
                        description: "\(extents) are no extents of sectors \(asked.sectors)")
                }
                try check(asked, kind, at..<end, extent.status)
                last = extent.status
                at = end
            }
            guard !extents.isEmpty, extents.count <= asked.query.limit else {
                throw WorldFailure(
                    description: "\(extents.count) extents, not 1 to \(asked.query.limit)")
            }
        }
    }

    private func check(
        _ asked: AskedExtents, _ kind: Int, _ sectors: Range<Int>, _ status: UInt32
    ) throws {
        let model = asked.model
        func wrong(_ what: String, _ sector: Int) -> WorldFailure {
            WorldFailure(
                description: "sector \(sector) of \(model.name) is told to be \(what) at \(time); "
                    + "allowed are \(model.describe(sector)), in \(asked.other.name) "
                    + (sector < asked.other.sectors ? asked.other.describe(sector) : "none"))
        }
        func possible(_ model: VolumeModel, _ sector: Int) -> Set<UInt64> {
            sector < model.sectors
                ? model.possible(sector, sentAt: asked.begun, afterCut: failedAt != nil) : [0]
        }
        switch asked.query.kinds[kind] {
        case .allocation:
            for sector in sectors {
                if status == 0 {
                    if !model.isTouched(sector / sectorsPerBlock) { throw wrong("data", sector) }
                } else if !possible(model, sector).contains(0) {
                    throw wrong("a hole", sector)
                }
            }
        case .sharing:
            for sector in sectors where status == Extent.shared {
                if !model.hasRelatives || !model.isTouched(sector / sectorsPerBlock) {
                    throw wrong("shared", sector)
                }
            }
        case .difference:
            for sector in sectors {
                let block = sector / sectorsPerBlock
                if status == Extent.changed {
                    if !model.isTouched(block), !asked.other.isTouched(block) {
                        throw wrong("changed", sector)
                    }
                } else if possible(model, sector).isDisjoint(with: possible(asked.other, sector)) {
                    throw wrong("unchanged", sector)
                }
            }
        }
    }

    // MARK: - At rest

    /// Of every block of a volume it is told that it is shared if, and only if, another volume has it.
    func verifySharing(_ model: VolumeModel) throws {
        guard failedAt == nil, let volume = pool.open(exportNamed: model.name) else { return }
        defer { pool.close(volume) }
        let isDeleting = pool.status().deleting > 0
        guard let isHole = try blocks(volume, .allocation),
            let isShared = try blocks(volume, .sharing)
        else { return }
        var hasTwin = [Bool](repeating: false, count: isHole.count)
        for name in models.keys.sorted() where name != model.name {
            guard let other = pool.open(exportNamed: name) else { continue }
            defer { pool.close(other) }
            guard let isChanged = try blocks(volume, .difference(from: other)) else { return }
            for block in hasTwin.indices where isChanged[block] == 0 && isHole[block] == 0 {
                hasTwin[block] = true
            }
        }
        for block in hasTwin.indices {
            let isTold = isShared[block] == Extent.shared
            if hasTwin[block] && !isTold || isTold && !hasTwin[block] && !isDeleting {
                throw WorldFailure(
                    description: "block \(block) of \(model.name) is told to be "
                        + (isTold ? "shared, and no other volume has it" : "its own, and is not"))
            }
        }
    }

    /// The status of every block; nil if some fault keeps it from being told.
    private func blocks(_ volume: Volume, _ kind: ExtentKind) throws -> [UInt32]? {
        var statuses: [UInt32] = []
        var at: UInt64 = 0
        while at < volume.size {
            let query = ExtentQuery(kinds: [kind], limit: 8)
            let error = perform(
                .extents, volume, sector: Int(at / 512),
                UnsafeMutableRawBufferPointer(start: nil, count: 0), query: query, in: pool,
                on: dataDisk)
            guard error == 0 else {
                if isTroubled { return nil }
                throw WorldFailure(description: "extents at rest: errno \(error)")
            }
            for extent in query.extents[0] {
                at += extent.length
                let end = (at + UInt64(blockSize) - 1) / UInt64(blockSize)
                statuses += Array(repeating: extent.status, count: Int(end) - statuses.count)
            }
        }
        return statuses
    }
}
