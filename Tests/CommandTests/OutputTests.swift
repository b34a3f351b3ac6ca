// What the command says arrives, or its exit status tells; and what it was told is what was typed.

import Foundation
import Testing

@Suite struct OutputTests {
    let scratch: Scratch
    init() throws { scratch = try Scratch() }

    /// Runs the command as `"$@"` in a line of shell.
    private func shell(_ line: String, _ arguments: [String]) throws -> Outcome {
        try Program.Running(
            "/bin/sh", ["-c", line, "sh", Program.wafer] + arguments, in: scratch.folder
        ).wait()
    }

    private func everyKind() throws -> [[String]] {
        try scratch.makePool()
        return [
            ["volume", "list", scratch.pool, "--json"], ["volume", "list", scratch.pool],
            ["pool", "status", scratch.pool], ["pool", "check", scratch.pool], ["--help"],
            ["help", "serve"], ["--version"],
        ]
    }

    @Test func whatCannotBeWrittenIsAFailure() throws {
        for arguments in try everyKind() {
            let outcome = try shell("exec \"$@\" > /dev/full", arguments)
            #expect(outcome.isFailure && outcome.error.contains("standard output"), "\(outcome)")
        }
    }

    @Test func aReaderThatHasGoneIsNone() throws {
        for arguments in try everyKind() {
            let outcome = try shell(
                "{ sleep 0.1; \"$@\"; echo $? >&2; } | true", arguments)
            #expect(outcome.error == "0\n", "\(arguments): \(outcome)")
        }
    }

    @Test func aLimitOfFileSizesIsAnError() throws {
        let outcome = try shell(
            "ulimit -f 64; exec env --default-signal=XFSZ \"$@\"",
            ["pool", "create", scratch.pool, "--data-size", "64MiB"])
        #expect(outcome.isFailure, "\(outcome)")
        #expect(!scratch.exists(scratch.pool + "/metadata"))
    }

    @Test func argumentsThatAreNotText() throws {
        let outcome = try shell(
            "cd \(scratch.folder.path); exec \"$@\" \"$(printf 'p\\377')\" --data-size 64MiB",
            ["pool", "create"])
        #expect(outcome.status == 64 && outcome.error.contains("not UTF-8"), "\(outcome)")
        let names = try FileManager.default.contentsOfDirectory(atPath: scratch.folder.path)
        #expect(names.allSatisfy { $0.hasSuffix(".out") || $0.hasSuffix(".err") }, "\(names)")
    }
}
