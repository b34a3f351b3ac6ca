// Power cuts: what may be on the two media when the power fails at one instant.
//
// Of what was written since a device's last flush anything may have reached the medium: each write
// or none, wholly or by sectors. A flush covers the writes that had ended when it began, no others;
// a write with FUA covers its own sectors. What is in flight may have had its effect or not.

import Glibc
import Simulation

/// The two media after a cut.
struct Survivors {
    var metadata: Platter
    var data: Platter
    /// When, in times of the recording.
    var time: Int
    /// Which choice was made, to find a failure again.
    var what: String
    /// Shared by the cuts of one scenario.
    var checked: CheckedStates
}

struct PowerCut {
    /// Up to this many unflushed writes every subset of them is tried, else a sample.
    var exhaustiveLimit = 7
    /// Subsets drawn at each I/O besides all and all of one device; more of them just before
    /// something becomes certain.
    var samples = 3
    var seed: UInt64 = 1
    static let sector = 512

    private let checked = CheckedStates()
    private let recording: Recording
    private let disks: [DeviceName: RecordedDisk]

    init(_ bench: Bench) {
        recording = bench.recording
        disks = [.metadata: bench.metadataDisk, .data: bench.dataDisk]
    }

    // MARK: - One device at one instant

    /// What is on the medium for certain, and what may be.
    private struct Medium {
        var certain: Platter
        /// I/Os that have ended and that no flush has covered, in that order.
        var ended: [Loose] = []
        /// Begun and not ended: they may have had their effect.
        var inFlight: [Loose] = []

        var loose: [Loose] { ended + inFlight }
    }

    private struct Loose {
        var index: Int
        /// Sectors that a later durable write has overtaken.
        var overtaken: Set<Int> = []
    }

    private final class State {
        var media: [DeviceName: Medium] = [:]
    }

    private func advance(_ state: State, _ index: Int, begins: Bool) {
        let io = recording.ios[index]
        if io.kind == .flush {
            if !begins && io.error == 0 { flushed(&state.media[io.device]!, io) }
        } else if begins {
            state.media[io.device]!.inFlight.append(Loose(index: index))
        } else {
            ended(&state.media[io.device]!, index, io)
        }
    }

    private func ended(_ medium: inout Medium, _ index: Int, _ io: RecordedIO) {
        let position = medium.inFlight.firstIndex { $0.index == index }!
        let entry = medium.inFlight.remove(at: position)
        guard io.isDurable && io.error == 0 else {
            medium.ended.append(entry)
            return
        }
        let sectors = (io.offset / Self.sector)..<(io.range.upperBound / Self.sector)
        for i in medium.ended.indices
        where recording.ios[medium.ended[i].index].range.overlaps(io.range) {
            medium.ended[i].overtaken.formUnion(sectors)
        }
        apply(entry, to: &medium.certain)
    }

    private func flushed(_ medium: inout Medium, _ flush: RecordedIO) {
        let covered = medium.ended.prefix { recording.ios[$0.index].end! < flush.begin }
        for entry in covered where recording.ios[entry.index].hasEffect {
            apply(entry, to: &medium.certain)
        }
        medium.ended.removeFirst(covered.count)
    }

    private func apply(_ entry: Loose, to platter: inout Platter) {
        let io = recording.ios[entry.index]
        if entry.overtaken.isEmpty { return platter.apply(io, in: io.range) }
        apply(entry, to: &platter) { _ in true }
    }

    private func apply(_ entry: Loose, to platter: inout Platter, _ chosen: (Int) -> Bool) {
        let io = recording.ios[entry.index]
        for sector in (io.offset / Self.sector)..<(io.range.upperBound / Self.sector)
        where !entry.overtaken.contains(sector) && chosen(sector) {
            platter.apply(io, in: (sector * Self.sector)..<((sector + 1) * Self.sector))
        }
    }

    // MARK: - States

    /// Every cut after `start`: at each I/O that changes what may be lost, with none and all of the
    /// unflushed writes, those of one device, and subsets of them, also torn ones.
    ///
    /// - Returns: how many states there were.
    @discardableResult
    func forEachState(after start: Int = 0, _ body: (Survivors) throws -> Void) throws -> Int {
        var events: [(time: Int, index: Int, begins: Bool)] = []
        for (index, io) in recording.ios.enumerated() where io.kind != .read {
            events.append((io.begin, index, true))
            if let end = io.end { events.append((end, index, false)) }
        }
        events.sort { $0.time < $1.time }
        let state = initialState()
        var random = SeededRandom(seed: seed)
        var count = 0
        for (position, event) in events.enumerated() {
            advance(state, event.index, begins: event.begins)
            let isLast = position + 1 == events.count
            if event.time < start && !isLast { continue }
            let io = recording.ios[event.index]
            // An end that makes nothing certain leaves the same states behind as its begin did.
            let matters =
                event.begins ? io.changesDevice : io.kind == .flush || io.isDurable
            guard matters || isLast else { continue }
            // Everything up to the next I/O has happened, replies included.
            let until = isLast ? recording.now : events[position + 1].time - 1
            // All that this epoch has written is loose just before something becomes certain.
            let isFullest =
                isLast
                || (!events[position + 1].begins
                    && (recording.ios[events[position + 1].index].kind == .flush
                        || recording.ios[events[position + 1].index].isDurable))
            count += try yieldStates(
                state, until, isExhaustive: isFullest, &random, body)
        }
        return count
    }

    /// Every cut now, with nothing more said than what has happened so far.
    @discardableResult
    func forEachStateNow(_ body: (Survivors) throws -> Void) throws -> Int {
        let state = stateNow()
        var random = SeededRandom(seed: seed)
        return try yieldStates(state, recording.now, isExhaustive: true, &random, body)
    }

    /// Every subset of the sectors of the one write of metadata that is in flight now; what else
    /// is unflushed is lost.
    func forEachTear(_ body: (Survivors) throws -> Void) throws {
        let state = stateNow()
        let loose = state.media[.metadata]!.loose
        precondition(loose.count == 1, "one write is to be torn")
        let io = recording.ios[loose[0].index]
        let sectors = io.length / Self.sector
        for subset in 0..<(1 << sectors) {
            var torn = survivors(state, recording.now, "tear \(subset)") { _, _ in .none }
            for sector in 0..<sectors where subset >> sector & 1 == 1 {
                let start = io.offset + sector * Self.sector
                torn.metadata.apply(io, in: start..<(start + Self.sector))
            }
            try body(torn)
        }
    }

    /// The cut now that loses all it can.
    func nothingUnflushed() -> Survivors {
        survivors(stateNow(), recording.now, "nothing unflushed survives") { _, _ in .none }
    }

    /// One cut now, drawn.
    func drawn(_ random: inout SeededRandom) -> Survivors {
        let chance = random.below(4)
        return survivors(stateNow(), recording.now, "drawn") { _, _ in
            chance == 0 ? .none : chance == 1 ? .all : .torn(seed: random.next())
        }
    }

    private func initialState() -> State {
        let state = State()
        for (name, disk) in disks { state.media[name] = Medium(certain: disk.first) }
        return state
    }

    private func stateNow() -> State {
        let state = initialState()
        var events: [(time: Int, index: Int, begins: Bool)] = []
        for (index, io) in recording.ios.enumerated() where io.kind != .read {
            events.append((io.begin, index, true))
            if let end = io.end { events.append((end, index, false)) }
        }
        for event in events.sorted(by: { $0.time < $1.time }) {
            advance(state, event.index, begins: event.begins)
        }
        return state
    }

    private func looseNow(_ state: State) -> [(DeviceName, Int)] {
        [DeviceName.metadata, .data].flatMap { name in
            state.media[name]!.loose.map { (name, $0.index) }
        }
    }

    private enum Part {
        case none, all
        /// Half of its sectors, drawn.
        case torn(seed: UInt64)
    }

    private func survivors(
        _ state: State, _ time: Int, _ what: String, _ part: (DeviceName, Int) -> Part
    ) -> Survivors {
        var platters: [DeviceName: Platter] = [:]
        for name in [DeviceName.metadata, .data] {
            let medium = state.media[name]!
            var platter = medium.certain
            for entry in medium.loose {
                switch part(name, entry.index) {
                case .none: break
                case .all: apply(entry, to: &platter)
                case .torn(let seed):
                    var random = SeededRandom(seed: seed)
                    apply(entry, to: &platter) { _ in random.oneIn(2) }
                }
            }
            platters[name] = platter
        }
        return Survivors(
            metadata: platters[.metadata]!, data: platters[.data]!, time: time,
            what: "cut at \(time): \(what)", checked: checked)
    }

    private func yieldStates(
        _ state: State, _ time: Int, isExhaustive: Bool, _ random: inout SeededRandom,
        _ body: (Survivors) throws -> Void
    ) throws -> Int {
        let loose = looseNow(state)
        var count = 0
        func yield(_ what: String, _ part: (DeviceName, Int) -> Part) throws {
            count += 1
            try body(survivors(state, time, what, part))
        }
        if loose.count <= exhaustiveLimit && isExhaustive {
            for subset in 0..<(1 << loose.count) {
                let kept = Set(loose.indices.filter { subset >> $0 & 1 == 1 }.map { loose[$0].1 })
                try yield("writes \(kept.sorted()) survive") { kept.contains($1) ? .all : .none }
            }
        } else {
            try yield("all survives") { _, _ in .all }
            let hasBoth = Set(loose.map(\.0)).count == 2
            if hasBoth {
                try yield("metadata survives") { name, _ in name == .metadata ? .all : .none }
            }
            // What is certain stays so until the fullest point, where most is promised.
            if isExhaustive {
                try yield("nothing unflushed survives") { _, _ in .none }
                if hasBoth {
                    try yield("data survives") { name, _ in name == .data ? .all : .none }
                }
            }
        }
        if loose.isEmpty { return count }
        for sample in 0..<(isExhaustive ? 4 * samples : samples) {
            let torn = sample % 2 == 1
            try yield("sample \(sample)") { _, _ in
                if !torn { return random.oneIn(2) ? .all : .none }
                return .torn(seed: random.next())
            }
        }
        return count
    }
}
