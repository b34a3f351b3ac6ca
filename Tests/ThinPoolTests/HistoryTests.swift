// Random histories of a pool against the clients' model, and the tools' opinion of what is left.
//
// A few, with every assertion on; `Scripts/simulate` runs as many as there is time for.

import Simulation
import Testing

@Suite struct HistoryTests {
    @Test func historiesAgreeWithTheModelAndTheTools() throws {
        let inspection = Inspection.installed
        try #require(!inspection.tools.isEmpty, "no thin_check: run Scripts/setup")
        var cuts = 0
        var snapshots = 0
        for seed in UInt64(1)...40 {
            do {
                let counts = try History(seed: seed).run(inspect: { try inspection.inspect($0) })
                cuts += counts.powerCuts
                snapshots += counts.snapshots
            } catch {
                Issue.record(
                    "seed \(seed): \(error); repeat it with Scripts/simulate --seed \(seed)")
                return
            }
        }
        // The histories did what they are for.
        #expect(cuts > 0 && snapshots > 0)
    }

    /// A read in flight of a block that its volume has unmapped meanwhile, so that the block became
    /// another volume's alone and was written in place: the read must not see that.
    @Test func readInFlightSeesNothingOfTheBlocksNextOwner() throws {
        _ = try History(seed: 639).run()
    }
}
