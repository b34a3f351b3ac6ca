// Reading everything back, with nothing else going on.

import Glibc
import ThinMetadata
import ThinPool

extension World {
    enum Occasion {
        case rest, powerCut, kill
    }

    func verifyAll(after occasion: Occasion = .rest) throws {
        for name in models.keys.sorted() { try verify(models[name]!, after: occasion) }
        if let model = randomModel(), !isDamaged { try verifySharing(model) }
    }

    /// Reads every sector of a volume.
    func verify(_ model: VolumeModel, after occasion: Occasion = .rest) throws {
        guard !isDamaged else { return }
        time += 1
        let bytes: [UInt8]
        switch read(model, in: pool, on: dataDisk) {
        case .success(let read): bytes = read
        case .failure(let failure):
            if isTroubled { return }
            throw failure
        }
        try check(bytes[...], 0..<model.sectors, model) { sector, value in
            occasion == .rest && failedAt == nil
                ? model.allows(sector, value, sentAt: time) : model.allowsAfterCut(sector, value)
        }
        func value(_ sector: Int) -> UInt64 {
            bytes.withUnsafeBytes {
                $0.loadUnaligned(fromByteOffset: sector * 512, as: UInt64.self)
            }
        }
        if model.isUndecided {
            if let sector = model.decide(at: time, value) {
                throw WorldFailure(
                    description: "snapshot \(model.name) is not one point in time: sector "
                        + "\(sector) is older than others")
            }
        } else if occasion != .rest {
            for sector in 0..<model.sectors {
                model.settle(
                    sector, value(sector), at: time, isDurable: occasion == .powerCut)
            }
            time += 1
        }
    }

    /// What a pool that is opened from damaged disks shows of a volume: nothing wrong.
    func examine(
        _ model: VolumeModel, in pool: Pool, on disk: SimulatedDisk, mayFail: Bool
    ) throws {
        switch read(model, in: pool, on: disk) {
        case .failure(let failure):
            if !mayFail { throw failure }
        case .success(let bytes):
            try check(bytes[...], 0..<model.sectors, model) { sector, value in
                model.allowsAfterCut(sector, value)
            }
        }
    }

    /// A whole volume through an engine of its own.
    func read(_ model: VolumeModel, in pool: Pool, on disk: SimulatedDisk)
        -> Result<[UInt8], WorldFailure>
    {
        guard let volume = pool.open(exportNamed: model.name) else {
            return .failure(
                WorldFailure(description: "volume \(model.name) cannot be opened"))
        }
        defer { pool.close(volume) }
        guard Int(volume.size / 512) == model.sectors, pool.volumeSize(model.name) == volume.size
        else {
            return .failure(
                WorldFailure(description: "volume \(model.name) has size \(volume.size)"))
        }
        var bytes = [UInt8](repeating: 0, count: model.sectors * 512)
        let answer = bytes.withUnsafeMutableBytes {
            perform(.read, volume, sector: 0, $0, in: pool, on: disk)
        }
        guard answer == 0 else {
            return .failure(
                WorldFailure(description: "\(model.name) cannot be read: errno \(answer)"))
        }
        return .success(bytes)
    }

    /// One request through an engine of its own; its errno. What it waits for is other's work.
    func perform(
        _ operation: VolumeOperation, _ volume: Volume, sector: Int,
        _ buffer: UnsafeMutableRawBufferPointer, query: ExtentQuery? = nil, in pool: Pool,
        on disk: SimulatedDisk
    ) -> Int32 {
        let io = SimulatedDataIO(disk: disk, draw: nil)
        let engine = VolumeIO(pool: pool, io: io) {}
        defer { engine.close() }
        var answer: Int32?
        engine.beginTurn()
        engine.submit(
            VolumeRequest(
                operation: operation, volume: volume, offset: UInt64(sector) * 512,
                length: query == nil
                    ? UInt64(buffer.count) : volume.size - UInt64(sector) * 512,
                buffer: buffer.baseAddress, query: query, cookie: 0))
        engine.endTurn()
        engine.takeFinished { answer = $1 }
        var patience = 10_000
        while answer == nil {
            patience -= 1
            if patience == 0 {
                fatalError("\(operation) of \(volume.name) is never answered")
            }
            engine.beginTurn()
            if io.pending.isEmpty {
                if pool === self.pool { worker.step(self) }
            } else {
                let (tag, result) = io.complete(0)
                engine.complete(tag: tag, result: result)
            }
            engine.endTurn()
            engine.takeFinished { answer = $1 }
        }
        return answer!
    }
}
