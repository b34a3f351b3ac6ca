// What the tests of this module share: scratch files, queues of both kinds, and waiting with a
// limit, so that a lost completion is a failure and not a hang.

import Foundation
import Testing

@testable import BlockIO

/// A directory of its own for a test, removed with the value. On the file system of the
/// working directory or wherever TMPDIR says, which is a real one where direct I/O can be tested.
final class Scratch {
    let directory: String

    init(in parent: String = NSTemporaryDirectory()) {
        directory = (parent as NSString).appendingPathComponent("blockio-\(UUID().uuidString)")
        try! FileManager.default.createDirectory(
            atPath: directory, withIntermediateDirectories: false)
    }

    deinit {
        try? FileManager.default.removeItem(atPath: directory)
    }

    func path(_ name: String) -> String {
        (directory as NSString).appendingPathComponent(name)
    }

    /// A new sparse file of `size` bytes.
    func file(_ name: String = "device", size: UInt64) throws -> String {
        try FileDevice.create(path: path(name), size: size)
        return path(name)
    }
}

/// Bytes of disk that a file takes.
func allocatedBytes(_ path: String) -> Int {
    var status = stat()
    #expect(stat(path, &status) == 0)
    return Int(status.st_blocks) * 512
}

enum QueueKind: String, CaseIterable, CustomTestStringConvertible {
    case ring, poll

    /// Both, or only the fallback where this machine has no io_uring.
    static let available: [QueueKind] =
        (try? RingQueue(entries: 8)) == nil ? [.poll] : [.ring, .poll]

    func make(entries: Int = 64) throws -> any IOQueue {
        switch self {
        case .ring: try RingQueue(entries: entries)
        case .poll: try PollQueue()
        }
    }

    var testDescription: String { rawValue }
}

/// A queue under test, with the results delivered so far.
final class Harness {
    private static let watchdog = UInt64.max
    private static let patience: UInt64 = 5_000_000_000

    let queue: any IOQueue
    private(set) var results: [UInt64: Int32] = [:]
    private(set) var turns = 0
    private(set) var order: [UInt64] = []

    init(_ kind: QueueKind, entries: Int = 64) throws {
        queue = try kind.make(entries: entries)
        queue.timeout(nanoseconds: Self.patience, tag: Self.watchdog)
    }

    /// Runs turns until `tags` have been delivered; stops with a failure after the patience.
    func wait(_ tags: UInt64..., sourceLocation: SourceLocation = #_sourceLocation) throws {
        try wait(sourceLocation: sourceLocation) { tags.allSatisfy { self.results[$0] != nil } }
    }

    func wait(
        sourceLocation: SourceLocation = #_sourceLocation, until done: () -> Bool
    ) throws {
        var expired = false
        while !done() && !expired {
            turns += 1
            try queue.run(wait: true) { tag, result in
                expired = expired || tag == Self.watchdog
                if tag != Self.watchdog { deliver(tag, result, sourceLocation) }
            }
        }
        #expect(!expired, "operations were not delivered in time", sourceLocation: sourceLocation)
    }

    private func deliver(_ tag: UInt64, _ result: Int32, _ sourceLocation: SourceLocation) {
        #expect(results[tag] == nil, "tag \(tag) delivered twice", sourceLocation: sourceLocation)
        results[tag] = result
        order.append(tag)
    }

    func take(_ tag: UInt64) -> Int32? {
        results.removeValue(forKey: tag)
    }
}

/// A connected pair of stream sockets, closed with the value.
final class SocketPair {
    let a: Int32
    let b: Int32

    init() {
        var ends: [Int32] = [-1, -1]
        #expect(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        (a, b) = (ends[0], ends[1])
    }

    deinit {
        close(a)
        close(b)
    }
}

/// A message with one vector, in place for as long as the value lives.
final class Message {
    let header: UnsafeMutablePointer<msghdr>
    private let vector: UnsafeMutablePointer<iovec>

    init(_ memory: UnsafeMutableRawPointer, _ length: Int) {
        vector = .allocate(capacity: 1)
        vector.initialize(to: iovec(iov_base: memory, iov_len: length))
        header = .allocate(capacity: 1)
        header.initialize(to: msghdr())
        header.pointee.msg_iov = vector
        header.pointee.msg_iovlen = 1
    }

    deinit {
        header.deallocate()
        vector.deallocate()
    }
}

/// The error that `body` throws.
func deviceError(
    sourceLocation: SourceLocation = #_sourceLocation, _ body: () throws(DeviceError) -> Void
) -> DeviceError? {
    do throws(DeviceError) {
        try body()
        Issue.record("no error was thrown", sourceLocation: sourceLocation)
        return nil
    } catch {
        return error
    }
}

/// Runs a program; its exit status and standard output, or nil if there is no such program.
func runProgram(_ path: String, _ arguments: String...) -> (status: Int32, output: String)? {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: path)
    process.arguments = arguments
    let pipe = Pipe()
    process.standardOutput = pipe
    process.standardError = FileHandle.nullDevice
    guard (try? process.run()) != nil else { return nil }
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return (
        process.terminationStatus,
        String(decoding: output, as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines)
    )
}

/// Whether every byte of a range is `byte`; by memcmp, because tests are not optimised.
func isAll(_ byte: UInt8, _ bytes: UnsafeMutableRawBufferPointer, _ range: Range<Int>) -> Bool {
    guard !range.isEmpty, let start = bytes.baseAddress else { return true }
    let first = start + range.lowerBound
    return first.load(as: UInt8.self) == byte && memcmp(first, first + 1, range.count - 1) == 0
}

func threadSeconds() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}

func monotonicSeconds() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}
