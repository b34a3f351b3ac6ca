// Collects findings: keeps the first ones, counts all.

extension MetadataCheck {
    final class FindingLog {
        private(set) var findings: [CheckFinding] = []
        private(set) var count = 0
        private(set) var countBySeverity: [CheckFinding.Severity: Int] = [:]

        func add(
            _ severity: CheckFinding.Severity, _ kind: CheckFinding.Kind,
            block: UInt64? = nil, metadataBlocks: Range<UInt64>? = nil,
            dataBlocks: Range<UInt64>? = nil, device: UInt64? = nil,
            virtualBlock: UInt64? = nil, _ what: @autoclosure () -> String
        ) {
            count += 1
            countBySeverity[severity, default: 0] += 1
            guard findings.count < MetadataCheck.findingLimit else { return }
            findings.append(
                CheckFinding(
                    severity: severity, kind: kind,
                    metadataBlocks: metadataBlocks ?? block.flatMap(Self.single),
                    dataBlocks: dataBlocks, device: device,
                    virtualBlock: virtualBlock.map { VirtualBlock($0) }, what: what()))
        }

        /// Names the device of the findings whose block `owner` knows.
        func attribute(owner: (UInt64) -> UInt64?) {
            for i in findings.indices where findings[i].device == nil {
                if let blocks = findings[i].metadataBlocks, blocks.count == 1 {
                    findings[i].device = owner(blocks.lowerBound)
                }
            }
        }

        private static func single(_ block: UInt64) -> Range<UInt64>? {
            block == .max ? nil : block..<block + 1
        }
    }
}
