// Random histories of the metadata alone against a model, and the tools' opinion of what is left.
//
// A few, with every assertion on; `Scripts/simulate --metadata` runs as many as there is time for.

import Simulation
import Testing

@Suite struct MetadataHistoryTests {
    @Test func historiesOfTheMetadataAgreeWithTheModelAndTheTools() throws {
        let inspection = Inspection.installed
        try #require(!inspection.tools.isEmpty, "no thin_check: run Scripts/setup")
        var total = MetadataCounts()
        for seed in UInt64(1)...10 {
            do {
                let counts = try MetadataHistory(seed: seed).run(inspect: {
                    try inspection.inspect($0)
                })
                total = total + counts
            } catch {
                let again = "Scripts/simulate --metadata --seed \(seed)"
                Issue.record("seed \(seed): \(error); repeat it with \(again)")
                return
            }
        }
        // The histories did what they are for.
        #expect(total.powerCuts > 0 && total.snapshots > 0 && total.insertions > 10_000)
    }
}
