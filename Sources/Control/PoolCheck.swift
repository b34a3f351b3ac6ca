// "wafer pool check": the strict self-check of the metadata, and the catalogue against the devices.

import BlockIO
import ThinMetadata
import ThinPool

public enum PoolCheck {
    /// What a report says in full; the rest is counted.
    private static let shownFindings = 100

    /// Checks a pool that nobody has open, writing nothing.
    ///
    /// - Parameter clearNeedsCheck: take back the metadata's needs_check flag if nothing is found.
    public static func checkOffline(
        _ directory: PoolDirectory, clearNeedsCheck: Bool = false,
        progress: (CheckAdvance) -> Void
    ) throws(ControlError) -> CheckResult {
        let access: FileDevice.Access = clearNeedsCheck ? .readWrite : .readOnly
        let metadata: FileDevice
        let data: FileDevice
        do throws(DeviceError) {
            metadata = try FileDevice(path: directory.metadataPath, access: access)
            data = try FileDevice(path: directory.dataPath, access: .readOnly)
        } catch { throw ControlError(error) }
        var result = try run(metadata, data, progress: progress)
        // A damaged superblock or tree is told above: here only what the catalogue adds.
        if result.isClean { add(try catalogueProblems(metadata, data), to: &result) }
        if clearNeedsCheck && result.needsCheck && result.isClean {
            do throws(MetadataError) {
                try ThinMetadata.setNeedsCheck(metadata, false)
            } catch { throw ControlError(error) }
            result.needsCheck = false
        }
        return result
    }

    /// Checks the last committed state of a pool that is in use.
    static func checkOpenPool(_ pool: LocalPool, progress: (CheckAdvance) -> Void)
        throws(ControlError) -> CheckResult
    {
        throw ControlError(
            .busy,
            "\(pool.directory.path) is being served, and only a pool at rest can be checked: stop "
                + "its server first")
    }

    private static func run(
        _ metadata: FileDevice, _ data: FileDevice, progress: (CheckAdvance) -> Void
    ) throws(ControlError) -> CheckResult {
        let blockSize = try FirstBlock(metadata).dataBlockSize
        var check = MetadataCheck(
            device: metadata, dataDeviceBlocks: blockSize.map { data.size / $0 })
        let report = check.run { advance in
            progress(
                CheckAdvance(
                    phase: words(advance.phase), blocksRead: advance.blocksRead,
                    blocksExpected: advance.blocksExpected))
        }
        let worstFirst = report.findings.enumerated().sorted {
            ($1.element.severity, $0.offset) < ($0.element.severity, $1.offset)
        }
        return CheckResult(
            findings: worstFirst.prefix(shownFindings).map { "\($0.element)" },
            findingCount: report.findingCount, worst: report.worst?.rawValue,
            devices: report.devices, mappings: report.mappings,
            metadataBlocksUsed: report.metadataBlocksUsed, dataBlocksUsed: report.dataBlocksUsed,
            needsCheck: report.needsCheck)
    }

    private static func catalogueProblems(_ metadata: FileDevice, _ data: FileDevice)
        throws(ControlError) -> [String]
    {
        var options = PoolOptions()
        options.readOnly = true
        do throws(PoolError) {
            return try Pool(metadata: metadata, data: data, options: options).status().problems
        } catch {
            guard error.kind == .metadata else { throw ControlError(error) }
            return [error.message]
        }
    }

    private static func add(_ problems: [String], to result: inout CheckResult) {
        guard !problems.isEmpty else { return }
        result.findings += problems.map { "damage: \($0)" }
        result.findingCount += problems.count
        result.worst = CheckFinding.Severity.damage.rawValue
    }

    private static func words(_ phase: CheckProgress.Phase) -> String {
        switch phase {
        case .superblock: "superblock"
        case .spaceMaps: "space maps"
        case .devices: "devices"
        case .mappings: "mappings"
        case .dataCounts: "data block counts"
        case .metadataCounts: "metadata block counts"
        }
    }
}
