// A pool on files in a directory of its own, and a server on it. Everything goes with the value.

import BlockIO
import Dispatch
import Glibc
import Logging
import NBDServer
import Synchronization
import Testing
import ThinMetadata
import ThinPool

let mebibyte: UInt64 = 1 << 20

/// Collects what is logged, so that a test can wait for it and look at it.
final class LogRecorder: LogHandler, Sendable {
    struct Line: Sendable {
        var level: Logger.Level
        var text: String
    }
    private let lines = Mutex<[Line]>([])

    var metadata: Logger.Metadata {
        get { [:] }
        set {}
    }
    var logLevel: Logger.Level {
        get { .trace }
        set {}
    }
    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { nil }
        set {}
    }
    func log(event: LogEvent) {
        let line = Line(level: event.level, text: "\(event.message) \(event.metadata ?? [:])")
        lines.withLock { $0.append(line) }
    }
    func all(_ level: Logger.Level) -> [String] {
        lines.withLock { $0.filter { $0.level == level }.map(\.text) }
    }
    func has(_ level: Logger.Level, _ part: String) -> Bool {
        all(level).contains { $0.contains(part) }
    }
}

/// A temporary directory that goes with the value.
final class TestDirectory: Sendable {
    let path: String
    init() {
        var template = Array("/tmp/wafer-nbd-XXXXXX".utf8CString)
        path = template.withUnsafeMutableBufferPointer { String(cString: mkdtemp($0.baseAddress!)) }
    }
    deinit {
        // Flat: no test makes directories in it.
        if let entries = opendir(path) {
            while let entry = readdir(entries) {
                let name = withUnsafePointer(to: &entry.pointee.d_name) {
                    $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
                }
                unlink(path + "/" + name)
            }
            closedir(entries)
        }
        rmdir(path)
    }
}

/// Waits until something becomes true; false if it does not in good time.
func eventually(within seconds: Double = 5, _ condition: () -> Bool) -> Bool {
    var left = Int(seconds * 200)
    while !condition() {
        if left == 0 { return false }
        left -= 1
        usleep(5000)
    }
    return true
}

/// A pool on files, with volumes in it.
final class TestPool {
    let pool: Pool
    let data: FileDevice
    private let thread: PoolThread
    private var mayFail = false

    init(in directory: TestDirectory, volumes: [(String, UInt64)], ring: Bool) throws {
        let metadataPath = directory.path + "/metadata"
        let dataPath = directory.path + "/data"
        let blockSectors: UInt32 = 128
        let dataBlocks: UInt64 = 4096
        try FileDevice.create(path: metadataPath, size: 4 * mebibyte)
        try FileDevice.create(
            path: dataPath, size: dataBlocks * UInt64(blockSectors) * 512)
        let metadata = try FileDevice(path: metadataPath, access: .readWrite)
        data = try FileDevice(path: dataPath, access: .readWrite)
        try ThinMetadata.format(
            metadata, dataBlockSectors: blockSectors, dataBlocks: dataBlocks)
        var options = PoolOptions()
        options.allowRing = ring
        pool = try Pool(metadata: metadata, data: data, options: options)
        thread = PoolThread(pool: pool, metadata: metadata, data: data)
        try thread.start()
        for (name, size) in volumes { try change(.create(name: name, size: size)) }
    }

    func change(_ change: VolumeChange) throws {
        let done = DispatchSemaphore(value: 0)
        let failure = Mutex<PoolError?>(nil)
        pool.request(change) { error in
            failure.withLock { $0 = error }
            done.signal()
        }
        done.wait()
        if let failure = failure.withLock({ $0 }) { throw failure }
    }

    /// Meanwhile what is written to the data device is lost, and a flush of it fails, and with it
    /// the pool.
    func withBrokenData<Result>(_ body: () throws -> Result) rethrows -> Result {
        mayFail = true
        let data = data.fileDescriptor
        let whole = dup(data)
        let broken = open("/dev/null", O_RDWR)
        dup2(broken, data)
        defer {
            dup2(whole, data)
            close(whole)
            close(broken)
        }
        return try body()
    }

    deinit {
        let failure = thread.stop()
        precondition(failure == nil || mayFail, "the pool failed: \(failure!)")
    }
}

final class TestServer {
    let directory = TestDirectory()
    let log = LogRecorder()
    let pool: TestPool
    let server: Server
    private(set) var uris: [String] = []
    let socketPath: String

    init(
        volumes: [(String, UInt64)] = [("alpha", 64 * mebibyte)], ring: Bool = true,
        _ configure: (inout Server.Configuration) -> Void = { _ in }
    ) throws {
        pool = try TestPool(in: directory, volumes: volumes, ring: ring)
        socketPath = directory.path + "/nbd.sock"
        var configuration = Server.Configuration(
            dataFileDescriptor: pool.data.fileDescriptor)
        configuration.listening.unixPaths = [socketPath]
        configure(&configuration)
        let recorder = log
        server = Server(
            pool: pool.pool, configuration: configuration,
            logger: Logger(label: "test", factory: { _ in recorder }))
        uris = try server.start()
    }

    deinit {
        server.stop()
    }
}
