// wafer serve --pid-file: what it replaces, and what it leaves alone.

import Foundation
import Testing

@Suite struct PIDFileTests {
    let scratch: Scratch
    init() throws {
        scratch = try Scratch()
        try scratch.makePool()
    }

    private var file: String { scratch.path("pid") }

    private func contents() throws -> String { try String(contentsOfFile: file, encoding: .utf8) }
    private func write(_ text: String) throws {
        try text.write(toFile: file, atomically: false, encoding: .utf8)
    }

    private func expectRefusal(
        _ path: String, _ words: String, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let server = try Program.Running(
            Program.wafer, ["serve", scratch.pool, "--pid-file", path], in: scratch.folder)
        // One that is not refused would run on.
        _ = until(20) { !server.process.isRunning || server.outputSoFar.hasPrefix("listening") }
        server.kill(SIGTERM)
        let outcome = server.wait()
        let line = outcome.error.split(separator: "\n").last ?? ""
        #expect(
            outcome.status == 1 && outcome.output.isEmpty && line.hasPrefix("wafer: ")
                && line.contains(words), "\(outcome)", sourceLocation: sourceLocation)
    }

    @Test(arguments: ["data", "metadata"]) func thePoolStaysWhole(name: String) throws {
        try expectRefusal("\(scratch.pool)/\(name)", "something else in it")
        try scratch.expectIntact()
    }

    @Test(arguments: [
        "remember the milk\n", "12 13\n", "-1\n", "0\n", "1" + String(repeating: " ", count: 40),
    ])
    func otherFilesStay(text: String) throws {
        try write(text)
        try expectRefusal(file, "something else in it")
        #expect(try contents() == text)
    }

    @Test func whatIsNoRegularFileStays() throws {
        try #require(mkfifo(file, 0o600) == 0)
        try expectRefusal(file, "not a regular file")
        var status = stat()
        #expect(lstat(file, &status) == 0 && status.st_mode & S_IFMT == S_IFIFO)
        symlink(scratch.path("elsewhere"), scratch.path("link"))
        try expectRefusal(scratch.path("link"), "not a regular file")
        #expect(scratch.exists(scratch.path("link")) && !scratch.exists(scratch.path("elsewhere")))
        try expectRefusal(scratch.pool, "not a regular file")
    }

    /// A server that was killed leaves its file; the number may be another program's by now.
    @Test func whatADeadServerLeftIsReplaced() throws {
        for text in ["", "2147483647\n", "\(getpid())\n", " \(getpid()) "] {
            try write(text)
            let server = try TestServer(scratch, ["--pid-file", file])
            #expect(try contents() == "\(server.running.process.processIdentifier)\n")
            #expect(server.stop().status == 0)
            #expect(!scratch.exists(file))
        }
    }

    @Test func anotherServersFileStays() throws {
        let first = try TestServer(scratch, ["--pid-file", file])
        let other = try Scratch()
        try other.makePool()
        let outcome = try other.run("serve", other.pool, "--pid-file", file)
        #expect(outcome.status == 1 && outcome.error.contains("which runs"), "\(outcome)")
        #expect(try contents() == "\(first.running.process.processIdentifier)\n")
        // Whoever has written over it meanwhile keeps it.
        try write("1\n")
        #expect(first.stop().status == 0)
        #expect(try contents() == "1\n")
    }

    @Test func aRestartInPlaceKeepsIt() throws {
        let server = try TestServer(scratch, ["--pid-file", file])
        server.running.kill(SIGUSR2)
        #expect(until(20) { server.running.errorSoFar.contains("took over") })
        #expect(try contents() == "\(server.running.process.processIdentifier)\n")
        #expect(server.stop().status == 0)
        #expect(!scratch.exists(file))
    }
}
