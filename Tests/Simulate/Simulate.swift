// Runs simulated histories, by number or by time, and prints how to repeat one that fails.

import ArgumentParser
import Glibc
import Simulation

@main
struct Simulate: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Run the pool against simulated disks, clock and clients.")

    @Option(help: "Run this one seed.") var seed: UInt64?
    @Flag(help: "Say what happens.") var trace = false
    @Option(help: "Run this many seeds.") var seeds: UInt64 = 100
    @Option(help: "First of the seeds.") var first: UInt64 = 1
    @Option(help: "Run for this long instead.") var minutes: Double?
    @Option(help: "Have every n-th final state checked by the thin_checks that are installed.")
    var inspectEvery: UInt64 = 10

    func run() throws {
        try hashDeterministically()
        var total = WorldCounts()
        var done: UInt64 = 0
        let inspection = Inspection.installed
        let start = Self.seconds()
        var current = seed ?? first
        while true {
            do {
                let inspects = done % inspectEvery == 0
                let counts = try History(seed: current).run(log: trace ? { print($0) } : nil) {
                    try (inspects ? inspection : Inspection(tools: [])).inspect($0)
                }
                total = total + counts
            } catch {
                print("seed \(current) failed: \(error)")
                print("repeat it with: Scripts/simulate --seed \(current)")
                throw ExitCode(1)
            }
            done += 1
            current += 1
            if seed != nil { break }
            if let minutes {
                if Self.seconds() - start > minutes * 60 { break }
            } else if done >= seeds {
                break
            }
        }
        let elapsed = Self.seconds() - start
        print(
            "\(done) seeds in \(Int(elapsed)) s: "
                + total.words.map { "\($0.1) \($0.0)" }.joined(separator: ", "))
    }

    /// The order of dictionaries must not differ from run to run. The runtime reads the variable
    /// when the process starts.
    private func hashDeterministically() throws {
        guard getenv(Self.hashing) == nil else { return }
        setenv(Self.hashing, "1", 1)
        var arguments = CommandLine.arguments.map { strdup($0) } + [nil]
        execv("/proc/self/exe", &arguments)
        throw ValidationError("cannot start again: \(String(cString: strerror(errno)))")
    }
    private static let hashing = "SWIFT_DETERMINISTIC_HASHING"

    private static func seconds() -> Double {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}
