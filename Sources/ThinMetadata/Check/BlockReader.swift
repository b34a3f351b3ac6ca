// Reads the metadata blocks that the check asks for, neighbours in one request, and verifies
// what all blocks have in common: checksum and block number.

import BlockIO

extension MetadataCheck {
    final class BlockReader {
        /// Blocks per request. 1 MiB: larger ones were not faster, neither cached nor direct.
        static let runLimit: UInt64 = 256
        /// Unwanted blocks that are read along rather than starting another request.
        static let gapLimit: UInt64 = 8

        private let device: any BlockDevice
        private let log: FindingLog
        private let buffer: UnsafeMutableRawBufferPointer
        /// Blocks that lie on the device whole.
        let blockCount: UInt64
        private(set) var blocksRead: UInt64 = 0
        /// Called once a request; false ends the check.
        var progress: () -> Bool = { true }
        /// No block has bytes any more, and no findings come of that: the report is of no use.
        private(set) var isEnded = false

        init(device: any BlockDevice, log: FindingLog) {
            self.device = device
            self.log = log
            blockCount = min(device.size / UInt64(Layout.blockSize), Layout.maxMetadataBlocks)
            buffer = .allocate(
                byteCount: Int(Self.runLimit) * Layout.blockSize, alignment: Layout.blockSize)
        }

        deinit { buffer.deallocate() }

        /// Calls `body` with each block's position in `blocks` and its bytes, which are nil where
        /// the device failed (that is logged) or the check has ended, and which `body` must not keep.
        /// - Precondition: ascending, all below `blockCount`.
        func forEach(_ blocks: [UInt64], _ body: (Int, UnsafeRawPointer?) -> Void) {
            var start = 0
            while start < blocks.count {
                let first = blocks[start]
                var end = start + 1
                while end < blocks.count, blocks[end] - blocks[end - 1] <= Self.gapLimit + 1,
                    blocks[end] - first < Self.runLimit
                {
                    end += 1
                }
                readRun(blocks, start..<end, body)
                blocksRead += UInt64(end - start)
                start = end
                report()
            }
        }

        func report() { isEnded = !progress() || isEnded }

        /// One block, as `forEach`.
        func withBlock<R>(_ block: UInt64, _ body: (UnsafeRawPointer?) -> R) -> R {
            var result: R?
            forEach([block]) { _, bytes in result = body(bytes) }
            return result!
        }

        private func readRun(
            _ blocks: [UInt64], _ run: Range<Int>, _ body: (Int, UnsafeRawPointer?) -> Void
        ) {
            if isEnded {
                for i in run { body(i, nil) }
                return
            }
            let first = blocks[run.lowerBound]
            let span = Int(blocks[run.upperBound - 1] - first) + 1
            if read(first, count: span) == nil {
                for i in run {
                    let offset = Int(blocks[i] - first) * Layout.blockSize
                    body(i, UnsafeRawPointer(buffer.baseAddress! + offset))
                }
                return
            }
            // Something in the run cannot be read: find out what.
            for i in run {
                if let error = read(blocks[i], count: 1) {
                    log.add(.damage, .unreadable, block: blocks[i], "\(error)")
                    body(i, nil)
                } else {
                    body(i, UnsafeRawPointer(buffer.baseAddress!))
                }
            }
        }

        private func read(_ block: UInt64, count: Int) -> DeviceError? {
            do throws(DeviceError) {
                try device.read(
                    at: block * UInt64(Layout.blockSize),
                    into: UnsafeMutableRawBufferPointer(
                        rebasing: buffer[0..<count * Layout.blockSize]))
                return nil
            } catch {
                return error
            }
        }

        /// Whether the block is what it has to be: a whole one of this kind, in its own place.
        func verify(
            _ bytes: UnsafeRawPointer, as kind: BlockKind, number: UInt64, role: Role
        ) -> Bool {
            let stored = bytes.le32(Layout.csum)
            let computed = bytes.checksum(as: kind)
            if stored != computed {
                let unsalted = computed ^ kind.rawValue
                let other = BlockKind.allCases.first { unsalted ^ $0.rawValue == stored }
                log.add(
                    .damage, .checksum, block: number,
                    other.map { "a \($0) block is in the place of a \(role.words)" }
                        ?? "the checksum of this \(role.words) does not match its contents")
                return false
            }
            let recorded = bytes.le64(Layout.blocknr)
            if recorded != number {
                log.add(
                    .damage, .blockNumber, block: number,
                    "this \(role.words) says that it is block \(recorded)")
                return false
            }
            return true
        }
    }
}
