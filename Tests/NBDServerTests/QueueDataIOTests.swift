// The data device of a reactor, on a real file.

import BlockIO
import Foundation
import Testing

@testable import NBDServer

@Suite struct QueueDataIOTests {
    /// Far more than are done at once. Taking one out must not move the others: with as many as
    /// sixteen clients may have waiting, that was minutes.
    @Test(.timeLimit(.minutes(1))) func manyZeroingsWait() throws {
        let path = NSTemporaryDirectory() + "zeroings-\(UUID().uuidString)"
        try FileDevice.create(path: path, size: 1 << 20)
        defer { unlink(path) }
        let device = try FileDevice(path: path, access: .readWrite)
        let queue = try PollQueue()
        let io = QueueDataIO(queue: queue, fd: device.fileDescriptor, memory: nil)
        let count: UInt64 = 300_000
        for tag in 0..<count { io.zero(at: 0, length: 4096, tag: tag) }
        var ended: [UInt64] = []
        while queue.outstanding > 0 {
            try queue.run(wait: true) { tag, result in
                guard let done = io.completed(Tag(rawValue: tag), result) else { return }
                #expect(done.result == 0)
                ended.append(done.tag)
            }
        }
        #expect(ended.elementsEqual(0..<count))
        withExtendedLifetime(device) {}
    }
}
