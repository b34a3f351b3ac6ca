// What the self-check and the thin tools say of a final state.

import Foundation
import ThinMetadata

public struct Inspection {
    /// Paths of thin_check programs; every generation that is there.
    public let tools: [String]

    public init(tools: [String]) { self.tools = tools }

    /// The installed thin_check, and the one that WAFER_THIN_CHECK_NEW names.
    public static var installed: Inspection {
        let other = ProcessInfo.processInfo.environment["WAFER_THIN_CHECK_NEW"] ?? ""
        return Inspection(
            tools: ["/usr/sbin/thin_check", other].filter {
                FileManager.default.isExecutableFile(atPath: $0)
            })
    }

    /// Throws what the first that finds anything has to say.
    public func inspect(_ metadata: [UInt8]) throws {
        var check = MetadataCheck(device: SimulatedDisk(path: "final state", bytes: metadata))
        let report = check.run()
        guard report.isClean else {
            throw WorldFailure(
                description: "self-check: \(report.findings.map(\.description))")
        }
        if tools.isEmpty { return }
        let file = FileManager.default.temporaryDirectory
            .appendingPathComponent("wafer-history-\(UUID().uuidString)")
        defer { try? FileManager.default.removeItem(at: file) }
        try Data(metadata).write(to: file)
        for tool in tools {
            let process = Process()
            process.executableURL = URL(fileURLWithPath: tool)
            process.arguments = [file.path]
            let pipe = Pipe()
            process.standardOutput = pipe
            process.standardError = pipe
            try process.run()
            let output = String(
                decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
            process.waitUntilExit()
            guard process.terminationStatus == 0 else {
                throw WorldFailure(description: "\(tool): \(output)")
            }
        }
    }
}
