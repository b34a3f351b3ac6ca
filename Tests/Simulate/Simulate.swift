// Runs simulated histories, of pools or of the metadata alone, by number or by time, or all small
// worlds, or all I/Os of short histories; prints how to repeat one that fails.

import ArgumentParser
import Glibc
import Simulation

extension SmallOperation: ExpressibleByArgument {}
extension EveryIO.Trouble: ExpressibleByArgument {}

@main
struct Simulate: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Run the pool against simulated disks, clock and clients.")

    @Option(help: "Run this one seed.") var seed: UInt64?
    @Flag(help: "Say what happens.") var trace = false
    @Option(help: "Run this many seeds.") var seeds: UInt64 = 100
    @Option(help: "First of the seeds.") var first: UInt64 = 1
    @Option(help: "End after this long.") var minutes: Double?
    @Option(help: "Have every n-th final state checked by the thin_checks that are installed.")
    var inspectEvery: UInt64 = 10

    @Flag(help: "Run histories of the metadata alone: large trees, many devices, little space.")
    var metadata = false

    @Flag(help: "Run all sequences of one, two and three operations, cut at every step.")
    var smallWorlds = false
    @Option(parsing: .upToNextOption, help: "Run this one sequence.")
    var smallWorld: [SmallOperation] = []
    @Option(help: "Of the small worlds, those of this part...") var part = 0
    @Option(help: "...of so many.") var parts = 1

    @Flag(help: "In short histories make each I/O fail, and all from it on, and cut before it.")
    var everyIO = false
    @Option(help: "Of the I/Os only every n-th.") var stride = 1
    @Option(help: "With --seed: this I/O only...") var io: Int?
    @Option(help: "...and this trouble.") var trouble = EveryIO.Trouble.failsOnce

    func run() throws {
        try startAgain()
        let start = Self.seconds()
        let isOver = { minutes.map { Self.seconds() - start > $0 * 60 } ?? false }
        if smallWorlds || !smallWorld.isEmpty {
            try runSmallWorlds(isOver)
        } else if everyIO {
            try runEveryIO(isOver)
        } else if metadata {
            try runMetadataHistories(isOver)
        } else {
            try runHistories(isOver)
        }
    }

    private func runHistories(_ isOver: () -> Bool) throws {
        var total = WorldCounts()
        let start = Self.seconds()
        let log = log
        let done = try runSeeds("", isOver) { seed, inspection in
            total = total + (try History(seed: seed).run(log: log) { try inspection.inspect($0) })
        }
        let elapsed = Self.seconds() - start
        print(
            "\(done) seeds in \(Int(elapsed)) s: \(total.simulated / 1_000_000_000) simulated seconds, "
                + total.words.map { "\($0.1) \($0.0)" }.joined(separator: ", "))
    }

    private func runMetadataHistories(_ isOver: () -> Bool) throws {
        var total = MetadataCounts()
        let start = Self.seconds()
        let log = log
        let done = try runSeeds("--metadata ", isOver) { seed, inspection in
            total =
                total
                + (try MetadataHistory(seed: seed).run(log: log) { try inspection.inspect($0) })
        }
        print(
            "\(done) metadata seeds in \(Int(Self.seconds() - start)) s: "
                + total.words.map { "\($0.1) \($0.0)" }.joined(separator: ", "))
    }

    /// Runs the seeds that were asked for, and says how many.
    private func runSeeds(
        _ mode: String, _ isOver: () -> Bool, _ run: (UInt64, Inspection) throws -> Void
    ) throws -> UInt64 {
        var done: UInt64 = 0
        let installed = Inspection.installed
        var current = seed ?? first
        while true {
            let inspection = done % inspectEvery == 0 ? installed : Inspection(tools: [])
            try report("seed \(current)", "\(mode)--seed \(current)") {
                try run(current, inspection)
            }
            done += 1
            current += 1
            if seed != nil || isOver() || done >= seeds { return done }
        }
    }

    private func runSmallWorlds(_ isOver: () -> Bool) throws {
        let start = Self.seconds()
        var worlds = SmallWorlds()
        let sequences =
            smallWorld.isEmpty
            ? (1...3).flatMap { SmallWorlds.sequences(of: $0) } : [smallWorld]
        var left = 0
        for (number, sequence) in sequences.enumerated() where number % parts == part {
            if isOver() {
                left += 1
                continue
            }
            let words = sequence.map(\.rawValue).joined(separator: " ")
            try report("small world \"\(words)\"", "--small-world \(words)") {
                try worlds.run(sequence)
            }
        }
        print(
            "\(worlds.worlds) small worlds in \(Int(Self.seconds() - start)) s: "
                + "\(worlds.states) states after a power cut"
                + (left > 0 ? ", \(left) worlds left for want of time" : ""))
    }

    private func runEveryIO(_ isOver: () -> Bool) throws {
        let start = Self.seconds()
        var every = EveryIO(stride: stride)
        if let seed, let io {
            let (log, trouble) = (log, trouble)
            try report("seed \(seed)", "") {
                try every.run(seed: seed, number: io, trouble: trouble, log: log)
            }
        } else {
            var current = seed ?? first
            let end = seed.map { $0 + 1 } ?? first + seeds
            while current < end, !isOver() {
                try report("seed \(current)", "--every-io --seed \(current) --io N --trouble T") {
                    try every.run(seed: current)
                }
                current += 1
            }
        }
        print("\(every.runs) runs with one I/O in trouble in \(Int(Self.seconds() - start)) s")
    }

    private var log: ((String) -> Void)? { trace ? { print($0) } : nil }

    /// Runs `body`; a failure is said with the command that repeats it.
    private func report(_ what: String, _ repeating: String, _ body: () throws -> Void) throws {
        do { try body() } catch {
            print("\(what) failed: \(error)")
            print("repeat it with: Scripts/simulate \(repeating)")
            throw ExitCode(1)
        }
    }

    /// Starts the program again with what the runtime reads from the environment when it starts:
    /// the order of dictionaries must not differ from run to run; and disks are copied and thrown
    /// away all the time, so their memory stays in the process.
    private func startAgain() throws {
        let settings = [
            ("SWIFT_DETERMINISTIC_HASHING", "1"), ("MALLOC_MMAP_THRESHOLD_", "33554432"),
            ("MALLOC_TRIM_THRESHOLD_", "1073741824"),
        ]
        if settings.allSatisfy({ getenv($0.0) != nil }) { return }
        for (name, value) in settings { setenv(name, value, 1) }
        var arguments = CommandLine.arguments.map { strdup($0) } + [nil]
        execv("/proc/self/exe", &arguments)
        throw ValidationError("cannot start again: \(String(cString: strerror(errno)))")
    }

    private static func seconds() -> Double {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}
