// dm-thin's own tools, in two generations, as judges of a pool's metadata.

import Foundation
import Testing

enum ThinTools {
    static let check = "/usr/sbin/thin_check"
    static let dump = "/usr/sbin/thin_dump"

    /// A thin_check of the 1.x line, stricter than 0.9: where WAFER_THIN_CHECK_NEW says, or the one
    /// that Scripts/thin-tools keeps.
    static let newCheck: String? = {
        let environment = ProcessInfo.processInfo.environment
        if let path = environment["WAFER_THIN_CHECK_NEW"] { return path }
        var checkout = URL(filePath: #filePath)
        for _ in 0..<3 { checkout.deleteLastPathComponent() }
        let script = checkout.appending(path: "Scripts/thin-tools").path
        guard let scratch = try? Scratch(),
            let outcome = try? Program(script, ["trixie"], in: scratch).wait(seconds: 300),
            outcome.status == 0
        else { return nil }
        return outcome.output.trimmingCharacters(in: .whitespacesAndNewlines) + "/thin_check"
    }()

    /// Those that are there; one test says if one is not.
    static let checks = [check, newCheck].compactMap { $0 }.filter { access($0, X_OK) == 0 }
}

/// A thin device as thin_dump sees it.
struct DumpedDevice {
    /// What the device's details say.
    var mappedBlocks: UInt64 = 0
    /// Virtual block to data block.
    var mappings: [UInt64: UInt64] = [:]
}

extension TestPool {
    /// Both generations of thin_check find nothing. The pool is at rest: either nobody has it
    /// open, or its server has nothing to commit.
    func expectClean(sourceLocation: SourceLocation = #_sourceLocation) throws {
        for tool in ThinTools.checks {
            let outcome = try Program(tool, [path + "/metadata"], in: scratch).wait()
            try #require(outcome.status == 0, "\(tool): \(outcome)", sourceLocation: sourceLocation)
        }
    }

    /// The thin devices, by number.
    func dump() throws -> [UInt32: DumpedDevice] {
        let outcome = try Program.run(ThinTools.dump, [path + "/metadata"], in: scratch)
        guard outcome.status == 0 else { throw Failure("thin_dump: \(outcome)") }
        var devices: [UInt32: DumpedDevice] = [:]
        var id: UInt32 = 0
        for line in outcome.output.split(separator: "\n") {
            func attribute(_ name: String) throws -> UInt64 {
                guard let start = line.range(of: " \(name)=\""),
                    let value = UInt64(line[start.upperBound...].prefix { $0 != "\"" })
                else { throw Failure("thin_dump: no \(name) in \(line)") }
                return value
            }
            if line.contains("<device ") {
                id = UInt32(try attribute("dev_id"))
                devices[id] = DumpedDevice(mappedBlocks: try attribute("mapped_blocks"))
            } else if line.contains("<single_mapping ") {
                devices[id]!.mappings[try attribute("origin_block")] = try attribute("data_block")
            } else if line.contains("<range_mapping ") {
                let (origin, data) = (try attribute("origin_begin"), try attribute("data_begin"))
                for step in 0..<(try attribute("length")) {
                    devices[id]!.mappings[origin + step] = data + step
                }
            }
        }
        return devices
    }
}

@Test func bothGenerationsOfThinCheckAreThere() throws {
    #expect(Program.find("thin_check") == ThinTools.check)
    let new = try #require(ThinTools.newCheck, "run Scripts/thin-tools trixie")
    #expect(access(new, X_OK) == 0, "\(new)")
}
