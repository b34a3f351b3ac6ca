// thin_check, thin_dump and thin_restore as oracles, a seeded generator, a place for images.

import Foundation
import Testing

struct Generator: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
        return z ^ z >> 31
    }
    mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(limit)) }
    mutating func chance(_ percent: Int) -> Bool { below(100) < percent }
}

/// A directory that goes away with the value.
final class TemporaryDirectory {
    let url: URL
    init() throws {
        url = FileManager.default.temporaryDirectory.appendingPathComponent(
            "thin-metadata-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }
    deinit { try? FileManager.default.removeItem(at: url) }
    func file(_ name: String) -> URL { url.appendingPathComponent(name) }
}

func run(_ tool: String, _ arguments: [String]) throws -> (status: Int32, output: String) {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: tool)
    process.arguments = arguments
    let pipe = Pipe()
    process.standardOutput = pipe
    process.standardError = pipe
    try process.run()
    let data = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return (process.terminationStatus, String(decoding: data, as: UTF8.self))
}

let thinCheck = "/usr/sbin/thin_check"
let thinDump = "/usr/sbin/thin_dump"
let thinRestore = "/usr/sbin/thin_restore"
/// A thin_check of the 1.x line, stricter than 0.9.
let newThinCheck = ProcessInfo.processInfo.environment["WAFER_THIN_CHECK_NEW"]

/// Both generations of thin_check, as far as they are installed, find nothing.
func expectClean(_ device: TestDevice, _ directory: TemporaryDirectory) throws {
    let file = directory.file("image")
    try device.save(to: file)
    for tool in [thinCheck, newThinCheck ?? ""]
    where FileManager.default.isExecutableFile(atPath: tool) {
        let result = try run(tool, [file.path])
        try #require(result.status == 0, "\(tool): \(result.output)")
    }
}

/// The devices as thin_dump sees them.
func dump(_ device: TestDevice, _ directory: TemporaryDirectory) throws -> [UInt64: ImageDevice] {
    let file = directory.file("image")
    try device.save(to: file)
    let result = try run(thinDump, [file.path])
    try #require(result.status == 0, "thin_dump: \(result.output)")
    var devices: [UInt64: ImageDevice] = [:]
    var current = ImageDevice()
    var id: UInt64 = 0
    for line in result.output.split(separator: "\n") {
        func attribute(_ name: String) -> UInt64 {
            guard let start = line.range(of: " \(name)=\"") else { return 0 }
            return UInt64(line[start.upperBound...].prefix { $0 != "\"" }) ?? 0
        }
        if line.contains("<device ") {
            id = attribute("dev_id")
            current = ImageDevice(
                mapped: attribute("mapped_blocks"), transaction: attribute("transaction"),
                created: UInt32(attribute("creation_time")), snapped: UInt32(attribute("snap_time"))
            )
        } else if line.contains("<single_mapping") {
            current.mappings[attribute("origin_block")] =
                attribute("data_block") << 24 | attribute("time")
        } else if line.contains("<range_mapping") {
            for step in 0..<attribute("length") {
                current.mappings[attribute("origin_begin") + step] =
                    (attribute("data_begin") + step) << 24 | attribute("time")
            }
        } else if line.contains("</device>") {
            devices[id] = current
        }
    }
    return devices
}
