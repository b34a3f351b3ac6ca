// wafer pool create, status, check, grow

import ArgumentParser
import Control
import ThinPool

struct PoolCreate: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "create", abstract: "Make a pool: a directory that names two devices.",
        discussion: """
            Without --metadata and --data the devices are files in the directory; then --data-size says \
            how large the pool is to be. The data file is sparse, the metadata file is not.
            """)

    @OptionGroup var pool: PoolArgument
    @Option(
        help: ArgumentHelp("An existing block device or file for the metadata.", valueName: "dev"))
    var metadata: String?
    @Option(help: ArgumentHelp("An existing block device or file for the data.", valueName: "dev"))
    var data: String?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp("Size of the data file.", valueName: "size"), transform: size)
    var dataSize: ByteSize?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "Size of the metadata file (default: 64 bytes a data block, at least 64MiB).",
            valueName: "size"), transform: size)
    var metadataSize: ByteSize?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "Size of a data block: a multiple of 64KiB up to 1GiB (default: 64KiB).",
            valueName: "size"), transform: size)
    var blockSize: ByteSize?
    @Flag(help: "Overwrite a metadata device that is not blank.")
    var force = false

    func validate() throws {
        if data == nil && dataSize == nil {
            throw ValidationError("give --data-size, or --data with an existing device")
        }
        if let data, dataSize != nil {
            throw ValidationError("--data-size is for a new file: \(data) has its size already")
        }
        if let metadata, metadataSize != nil {
            throw ValidationError(
                "--metadata-size is for a new file: \(metadata) has its size already")
        }
    }

    func run() throws {
        var plan = PoolPlan()
        plan.metadata = metadata
        plan.data = data
        plan.dataSize = dataSize?.bytes
        plan.metadataSize = metadataSize?.bytes
        if let blockSize { plan.blockSize = blockSize.bytes }
        plan.force = force
        _ = try PoolDirectory.create(pool.path, plan)
        print("created pool \(pool.path)")
    }
}

struct PoolShow: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "status", abstract: "Show a pool's space, mode and problems.")

    @OptionGroup var pool: PoolArgument
    @Flag(help: "Print JSON.")
    var json = false

    func run() throws {
        let manager = try PoolAccess.open(pool.path, changing: false)
        let status = try manager.status()
        if json {
            try Output.json(status)
            return
        }
        Output.table(Self.rows(pool.path, status, isServed: manager.isRemote))
        for problem in status.problems { print("problem: \(problem)") }
    }

    static func rows(_ path: String, _ status: PoolStatus, isServed: Bool) -> [[String]] {
        var rows = [
            ["pool", path],
            ["mode", status.mode.rawValue + (status.reason.map { ": \($0)" } ?? "")],
            ["served", isServed ? "yes" : "no"],
            [
                "data",
                Output.used(status.dataBlocksUsed, of: status.dataBlocks, status.blockSize)
                    + ", blocks of \(ByteSize(bytes: status.blockSize))",
            ],
            ["metadata", Output.used(status.metadataBlocksUsed, of: status.metadataBlocks, 4096)],
            [
                "volumes",
                "\(status.volumes)"
                    + (status.deleting > 0 ? ", and \(status.deleting) being deleted" : ""),
            ],
            ["transaction", "\(status.transactionID), time \(status.time)"],
        ]
        if status.needsCheck { rows.append(["needs check", "yes"]) }
        if let root = status.heldRoot { rows.append(["held root", "metadata block \(root)"]) }
        return rows
    }
}

struct PoolCheckCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "check", abstract: "Check a pool's metadata and catalogue.",
        discussion: "Reads everything, writes nothing. The exit status is 1 if there are findings.")

    @OptionGroup var pool: PoolArgument
    @Flag(help: "If nothing is found, take back the metadata's needs_check flag.")
    var clearNeedsCheck = false

    func run() throws {
        let result = try check()
        for finding in result.findings { print(finding) }
        if result.findingCount > result.findings.count {
            print("and \(result.findingCount - result.findings.count) more")
        }
        guard result.isClean else {
            throw ControlError(
                .refused,
                "\(pool.path): \(result.findingCount) findings, the worst: "
                    + "\(result.worst ?? "unknown"); keep a copy of the metadata, then see "
                    + "thin_check and thin_repair")
        }
        print(
            "clean: \(result.devices) devices, \(result.mappings) mappings; in use: "
                + "\(result.metadataBlocksUsed) metadata blocks, "
                + "\(result.dataBlocksUsed) data blocks"
        )
        if result.needsCheck {
            print("the needs_check flag is set: --clear-needs-check takes it back")
        }
    }

    private func check() throws -> CheckResult {
        let progress = Progress()
        defer { progress.end() }
        return try PoolAccess.check(pool.path, clearNeedsCheck: clearNeedsCheck) { advance in
            progress.show(
                "checking \(advance.phase)", advance.blocksRead, of: advance.blocksExpected)
        }
    }
}

struct PoolGrow: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "grow", abstract: "Enlarge a pool of files that is not being served.",
        discussion: "A pool on block devices takes up their new size when it is next opened.")

    @OptionGroup var pool: PoolArgument
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp("New size of the data file.", valueName: "size"), transform: size)
    var dataSize: ByteSize?
    @Option(
        parsing: .unconditional,
        help: ArgumentHelp("New size of the metadata file.", valueName: "size"), transform: size)
    var metadataSize: ByteSize?

    func validate() throws {
        if dataSize == nil && metadataSize == nil {
            throw ValidationError("give --data-size, --metadata-size or both")
        }
    }

    func run() throws {
        let directory = try PoolDirectory.locate(pool.path)
        let status = try PoolGrowth.grow(
            directory, dataSize: dataSize?.bytes, metadataSize: metadataSize?.bytes)
        Output.table(PoolShow.rows(pool.path, status, isServed: false))
    }
}
