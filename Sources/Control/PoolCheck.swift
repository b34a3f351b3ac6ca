// "wafer pool check": the strict self-check of the metadata, and the catalogue against the devices.

import BlockIO
import ThinMetadata
import ThinPool

public enum PoolCheck {
    /// What a result says in full; the rest is counted.
    private static let shownFindings = 100

    /// Checks a pool that nobody has open. It need not be fit to be opened: then everything that
    /// the superblock reaches is checked all the same.
    ///
    /// - Parameter clearNeedsCheck: take back the metadata's needs_check flag if nothing is found;
    ///   nothing else is ever written.
    public static func checkOffline(
        _ directory: PoolDirectory, clearNeedsCheck: Bool = false,
        progress: (CheckAdvance) -> Void
    ) throws(ControlError) -> CheckResult {
        let metadata: FileDevice
        let data: FileDevice
        do throws(DeviceError) {
            metadata = try FileDevice(
                path: directory.metadataPath, access: clearNeedsCheck ? .readWrite : .readOnly)
            data = try FileDevice(path: directory.dataPath, access: .readOnly)
        } catch { throw ControlError(error) }

        var result: CheckResult
        do throws(PoolError) {
            var options = PoolOptions()
            options.readOnly = true
            let pool = try Pool(metadata: metadata, data: data, options: options)
            let report = try pool.check {
                progress(CheckAdvance($0))
                return true
            }
            result = Self.result(report!)
        } catch {
            result = try checkMetadataAlone(metadata, data, progress: progress)
            if result.isClean {
                // The metadata is sound: what failed is the catalogue, or a device.
                guard error.kind == .metadata else { throw ControlError(error) }
                result.add(catalogue: [error.message])
            }
        }
        if clearNeedsCheck && result.needsCheck && result.isClean {
            do throws(MetadataError) {
                try ThinMetadata.setNeedsCheck(metadata, false)
            } catch { throw ControlError(error) }
            result.needsCheck = false
        }
        return result
    }

    private static func checkMetadataAlone(
        _ metadata: FileDevice, _ data: FileDevice, progress: (CheckAdvance) -> Void
    ) throws(ControlError) -> CheckResult {
        let blockSize = try FirstBlock(metadata).dataBlockSize
        var check = MetadataCheck(
            device: metadata, dataDeviceBlocks: blockSize.map { data.size / $0 })
        let report = check.run {
            progress(CheckAdvance($0))
            return true
        }
        return result(metadata: report!, catalogue: [])
    }

    static func result(_ report: PoolCheckReport) -> CheckResult {
        result(metadata: report.metadata, catalogue: report.catalogue)
    }

    private static func result(metadata: CheckReport, catalogue: [String]) -> CheckResult {
        let worstFirst = metadata.findings.enumerated().sorted {
            ($1.element.severity, $0.offset) < ($0.element.severity, $1.offset)
        }
        var result = CheckResult(
            findings: worstFirst.prefix(shownFindings).map { "\($0.element)" },
            findingCount: metadata.findingCount, worst: metadata.worst?.rawValue,
            devices: metadata.devices, mappings: metadata.mappings,
            metadataBlocksUsed: metadata.metadataBlocksUsed,
            dataBlocksUsed: metadata.dataBlocksUsed, needsCheck: metadata.needsCheck)
        result.add(catalogue: catalogue)
        return result
    }
}

extension CheckResult {
    fileprivate mutating func add(catalogue problems: [String]) {
        guard !problems.isEmpty else { return }
        findings.insert(contentsOf: problems.map { "damage: \($0)" }, at: 0)
        findingCount += problems.count
        worst = CheckFinding.Severity.damage.rawValue
    }
}
