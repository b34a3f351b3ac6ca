// The real tools, where they are installed.

import Foundation

enum Tools {
    static func path(_ name: String) -> String? {
        ["/usr/sbin/", "/sbin/", "/usr/local/sbin/"].map { $0 + name }
            .first { FileManager.default.isExecutableFile(atPath: $0) }
    }
    static let haveThinTools = ["thin_check", "thin_restore", "thin_dump"].allSatisfy {
        path($0) != nil
    }

    /// A thin_check of the 1.x line.
    static let newThinCheck = ProcessInfo.processInfo.environment["WAFER_THIN_CHECK_NEW"]

    @discardableResult
    static func run(_ name: String, _ arguments: [String]) throws -> Int32 {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: path(name) ?? name)
        process.arguments = arguments
        process.standardOutput = FileHandle.nullDevice
        process.standardError = FileHandle.nullDevice
        try process.run()
        process.waitUntilExit()
        return process.terminationStatus
    }

    static func withFile<R>(_ bytes: [UInt8], _ body: (URL) throws -> R) throws -> R {
        let file = FileManager.default.temporaryDirectory
            .appendingPathComponent("wafer-check-\(UUID().uuidString)")
        try Data(bytes).write(to: file)
        defer { try? FileManager.default.removeItem(at: file) }
        return try body(file)
    }

    /// Whether thin_check has no objection.
    static func thinCheckAccepts(_ image: PoolImage) throws -> Bool {
        try withFile(image.bytes) { try run("thin_check", ["-q", $0.path]) == 0 }
    }

    /// The same for the 1.x line; nil if it is not there.
    static func newThinCheckAccepts(_ image: PoolImage) throws -> Bool? {
        guard let newThinCheck else { return nil }
        return try withFile(image.bytes) { try run(newThinCheck, ["-q", $0.path]) == 0 }
    }

    /// What thin_restore makes of a dump.
    static func restore(_ xml: String, blocks: Int) throws -> PoolImage {
        try withFile(Array(repeating: 0, count: blocks * 4096)) { image in
            try withFile(Array(xml.utf8)) { source in
                let status = try run("thin_restore", ["-i", source.path, "-o", image.path])
                guard status == 0 else { throw CocoaError(.executableRuntimeMismatch) }
            }
            return PoolImage(bytes: Array(try Data(contentsOf: image)))
        }
    }
}
