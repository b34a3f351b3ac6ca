// libnbd, with errors that are thrown.

import CLibNBD
import Foundation

/// What libnbd says, with the errno that the server sent.
struct ClientError: Error, CustomStringConvertible {
    var code: Int32
    var text: String
    var description: String { "\(text) (\(String(cString: strerror(code))))" }
}

/// The errno that something fails with; 0: it does not fail.
func code(_ body: () throws -> Void) throws -> Int32 {
    do {
        try body()
        return 0
    } catch let error as ClientError { return error.code }
}

/// One connection. libnbd locks it, so that any thread may use it.
final class Client: @unchecked Sendable {
    let handle: OpaquePointer

    static let fua = UInt32(LIBNBD_CMD_FLAG_FUA)
    static let noHole = UInt32(LIBNBD_CMD_FLAG_NO_HOLE)

    enum Transport: CaseIterable { case unix, tcp }

    /// Not connected; nothing is checked on this side, so that the server is what refuses.
    init() throws {
        guard let handle = nbd_create() as OpaquePointer? else { throw Self.failure() }
        self.handle = handle
        try check(nbd_set_strict_mode(handle, 0))
    }

    /// Connected to an export.
    convenience init(_ server: Server, _ export: String, via transport: Transport = .unix) throws {
        try self.init()
        try check(nbd_set_export_name(handle, export))
        try connect(server, via: transport)
    }

    deinit { nbd_close(handle) }

    func connect(_ server: Server, via transport: Transport = .unix) throws {
        switch transport {
        case .unix: try check(nbd_connect_unix(handle, server.unixPath))
        case .tcp: try check(nbd_connect_tcp(handle, "127.0.0.1", "\(server.port)"))
        }
    }

    /// Says good-bye.
    func disconnect() throws { try check(nbd_shutdown(handle, 0)) }

    static func failure() -> ClientError {
        var text = "libnbd failed"
        if let words = nbd_get_error() as UnsafePointer<CChar>? { text = String(cString: words) }
        return ClientError(code: nbd_get_errno(), text: text)
    }

    @discardableResult
    func check<Result: SignedInteger>(_ result: Result) throws -> Result {
        if result < 0 { throw Self.failure() }
        return result
    }

    func size() throws -> UInt64 { UInt64(try check(nbd_get_size(handle))) }

    // MARK: - Commands

    func read(_ offset: UInt64, _ length: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xdb, count: length)
        try bytes.withUnsafeMutableBytes {
            _ = try check(nbd_pread(handle, $0.baseAddress!, length, offset, 0))
        }
        return bytes
    }

    func write(_ offset: UInt64, _ bytes: [UInt8], flags: UInt32 = 0) throws {
        try bytes.withUnsafeBytes {
            _ = try check(nbd_pwrite(handle, $0.baseAddress!, bytes.count, offset, flags))
        }
    }

    func zero(_ offset: UInt64, _ length: UInt64, flags: UInt32 = 0) throws {
        try check(nbd_zero(handle, length, offset, flags))
    }

    func trim(_ offset: UInt64, _ length: UInt64, flags: UInt32 = 0) throws {
        try check(nbd_trim(handle, length, offset, flags))
    }

    func cache(_ offset: UInt64, _ length: UInt64) throws {
        try check(nbd_cache(handle, length, offset, 0))
    }

    func flush() throws { try check(nbd_flush(handle, 0)) }

    // MARK: - Export lists

    /// Needs opt mode.
    func list() throws -> [String] {
        final class Names { var names: [String] = [] }
        let names = Names()
        let pointer = Unmanaged.passRetained(names)
        defer { pointer.release() }
        var callback = nbd_list_callback()
        callback.user_data = pointer.toOpaque()
        callback.callback = { user, name, _ in
            guard let user = user as UnsafeMutableRawPointer?,
                let name = name as UnsafePointer<CChar>?
            else { return -1 }
            Unmanaged<Names>.fromOpaque(user).takeUnretainedValue().names
                .append(String(cString: name))
            return 0
        }
        try check(nbd_opt_list(handle, callback))
        return names.names
    }

    /// The exports that a server lists.
    static func exports(of server: Server) throws -> [String] {
        let client = try Client()
        try client.check(nbd_set_opt_mode(client.handle, true))
        try client.connect(server)
        defer { nbd_opt_abort(client.handle) }
        return try client.list()
    }
}

/// Commands under way on one connection, and the memory that they use.
final class Batch {
    private let client: Client
    private var commands: [(cookie: Int64, memory: UnsafeMutableRawPointer?, length: Int)] = []

    init(_ client: Client) { self.client = client }

    deinit {
        _ = try? wait()
        for command in commands { command.memory?.deallocate() }
    }

    var outstanding: Int { Int(nbd_aio_in_flight(client.handle)) }

    func write(_ offset: UInt64, _ bytes: [UInt8], flags: UInt32 = 0) throws {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: bytes.count, alignment: 4096)
        bytes.withUnsafeBytes { memory.copyMemory(from: $0.baseAddress!, byteCount: bytes.count) }
        let cookie = nbd_aio_pwrite(
            client.handle, memory, bytes.count, offset, nbd_completion_callback(), flags)
        try add(cookie, memory, bytes.count)
    }

    func read(_ offset: UInt64, _ length: Int) throws {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: length, alignment: 4096)
        let cookie = nbd_aio_pread(
            client.handle, memory, length, offset, nbd_completion_callback(), 0)
        try add(cookie, memory, length)
    }

    func zero(_ offset: UInt64, _ length: UInt64, flags: UInt32 = 0) throws {
        let cookie = nbd_aio_zero(client.handle, length, offset, nbd_completion_callback(), flags)
        try add(cookie, nil, 0)
    }

    func trim(_ offset: UInt64, _ length: UInt64) throws {
        let cookie = nbd_aio_trim(client.handle, length, offset, nbd_completion_callback(), 0)
        try add(cookie, nil, 0)
    }

    func flush() throws {
        try add(nbd_aio_flush(client.handle, nbd_completion_callback(), 0), nil, 0)
    }

    private func add(_ cookie: Int64, _ memory: UnsafeMutableRawPointer?, _ length: Int) throws {
        guard cookie >= 0 else {
            memory?.deallocate()
            throw Client.failure()
        }
        commands.append((cookie, memory, length))
    }

    /// The errno of each command, in their order; 0 is success. The connection must not be lost.
    @discardableResult
    func wait(seconds: Double = 60) throws -> [Int32] {
        let end = Date(timeIntervalSinceNow: seconds)
        while outstanding > 0 {
            // 0: nothing has come for a second.
            if try client.check(nbd_poll(client.handle, 1000)) == 0, Date() > end {
                throw Failure("\(outstanding) commands are not answered")
            }
        }
        results = commands.map { command in
            guard command.length > 0, let memory = command.memory else { return [] }
            return [UInt8](UnsafeRawBufferPointer(start: memory, count: command.length))
        }
        return try commands.map { command in
            let done = nbd_aio_command_completed(client.handle, UInt64(command.cookie))
            if done == 0 { throw Failure("a command is neither in flight nor done") }
            return done > 0 ? 0 : nbd_get_errno()
        }
    }

    /// After `wait`: what the commands' memory holds.
    private(set) var results: [[UInt8]] = []
}
