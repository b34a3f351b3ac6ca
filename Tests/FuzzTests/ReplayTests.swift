// What fuzzing has kept, fed to the targets again without libFuzzer: a small corpus that reaches most of
// the code, and every input that has found something.

import Foundation
import FuzzTargets
import Testing

/// The corpus and the regressions of one target.
struct KeptInputs: CustomTestStringConvertible, Sendable {
    let target: String
    let files: [URL]
    var testDescription: String { "\(target): \(files.count) inputs" }

    static let all: [KeptInputs] = {
        let home = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().appendingPathComponent("Fuzz")
        return FuzzTargets.all.map { target in
            let files = ["Corpus", "Regressions"].flatMap { kind in
                let directory = home.appendingPathComponent("\(kind)/\(target.name)")
                return
                    (try? FileManager.default.contentsOfDirectory(
                        at: directory, includingPropertiesForKeys: nil)) ?? []
            }
            return KeptInputs(target: target.name, files: files)
        }
    }()
}

@Suite struct ReplayTests {
    /// A target that finds something stops the program.
    @Test(arguments: KeptInputs.all) func nothingIsFoundAgain(inputs: KeptInputs) throws {
        #expect(!inputs.files.isEmpty)
        let target = try #require(FuzzTargets.named(inputs.target))
        for file in inputs.files {
            try Data(contentsOf: file).withUnsafeBytes { target.run($0) }
        }
    }
}
