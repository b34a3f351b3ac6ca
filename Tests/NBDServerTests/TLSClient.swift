// A client with GnuTLS, and a connection of the server, without a socket in between: what one
// sends is handed to the other in pieces of any size.

import CGnuTLS
import Glibc
import NBDProtocol
import ThinPool

@testable import NBDServer

/// Certificates and keys made by Tests/TLS/make-credentials, once for all tests.
enum TestCredentials {
    static let path: String = {
        let directory = TestDirectory()
        let script = #filePath.split(separator: "/").dropLast(2).joined(separator: "/")
        let path = directory.path + "-tls"
        let status = system("/\(script)/TLS/make-credentials \(path) && touch \(path)/made")
        precondition(status == 0, "make-credentials failed: run Scripts/setup")
        atexit { _ = system("rm -rf '\(TestCredentials.path)'") }
        return path
    }()

    /// - Parameter later: seconds from the start to the clients.
    static func server(
        _ directory: String? = "server", psk: String? = nil,
        later: time_t = 0,
        _ change: (inout TLSSettings) -> Void = { _ in }
    ) throws -> TLSCredentials {
        var settings = TLSSettings()
        settings.certificates = directory.map { "\(path)/\($0)" }
        settings.presharedKeys = psk.map { "\(path)/\($0)/keys.psk" }
        change(&settings)
        return try TLSCredentials(settings, clock: { time(nil) + later })
    }
}

/// What a client comes with.
enum Proof: Equatable {
    /// Nothing, and it believes whatever it is shown.
    case nothing
    /// A directory of make-credentials.
    case certificate(String)
    /// A directory with keys, and whose.
    case key(String, user: String)
}

final class TLSClient {
    static let tls12 = "NORMAL:-VERS-ALL:+VERS-TLS1.2"
    static let tls13 = "NORMAL:-VERS-ALL:+VERS-TLS1.3"

    let connection: Connection
    let sink: TestSink
    /// Bytes that are handed over at once, in either direction.
    var piece = Int.max
    /// Bytes for the server after which its stream ends.
    var cut = Int.max
    private(set) var delivered = 0
    var toServer: [UInt8] = []
    private var toServerStart = 0
    private var toClient: [UInt8] = []
    private var toClientStart = 0
    private var saidEnd = false
    /// The most ciphertext that the server wanted to send at once.
    private(set) var longestMessage = 0
    /// Nothing reaches the server for now.
    var isHeld = false
    /// The client reads nothing.
    var isDeaf = false

    private var session: gnutls_session_t?
    private var certificates: gnutls_certificate_credentials_t?
    private var keys: gnutls_psk_client_credentials_t?

    init(_ connection: Connection, _ sink: TestSink) {
        self.connection = connection
        self.sink = sink
        connection.begin(sink)
    }

    deinit {
        if let session { gnutls_deinit(session) }
        if let certificates { gnutls_certificate_free_credentials(certificates) }
        if let keys { gnutls_psk_free_client_credentials(keys) }
    }

    // MARK: - The wire

    /// Moves bytes until nothing moves any more.
    func pump() {
        while step() {}
    }

    private func step() -> Bool {
        var moved = false
        while !sink.waiting.isEmpty {
            let request = sink.waiting.removeFirst()
            sink.perform(request)
            _ = connection.finish(slot: Transmission.place(of: request.cookie).slot, code: 0)
            moved = true
        }
        if connection.isDrained { connection.breakOff(nil) }
        if !isDeaf || !connection.isSending, let message = connection.nextMessage() {
            let vectors = UnsafeBufferPointer(
                start: message.pointee.msg_iov, count: Int(message.pointee.msg_iovlen))
            longestMessage = max(longestMessage, vectors.reduce(0) { $0 + $1.iov_len })
            connection.isSending = true
            if !isDeaf {
                let count = min(piece, vectors[0].iov_len)
                toClient += UnsafeRawBufferPointer(start: vectors[0].iov_base, count: count)
                connection.isSending = false
                connection.sent(Int32(count), sink)
                moved = true
            }
        }
        if !isHeld, let space = connection.receiveSpace() {
            let left = min(toServer.count - toServerStart, cut - delivered)
            let count = min(piece, space.count, left)
            if count > 0 {
                toServer[toServerStart..<toServerStart + count].withUnsafeBytes {
                    space.copyMemory(from: $0)
                }
                toServerStart += count
                delivered += count
                if toServerStart == toServer.count {
                    toServer = []
                    toServerStart = 0
                }
                connection.received(Int32(count), sink)
                moved = true
            } else if delivered == cut && !saidEnd {
                saidEnd = true
                connection.received(0, sink)
                moved = true
            }
        }
        return moved
    }

    /// The client's stream ends with what it has sent so far.
    func hangUp() {
        cut = delivered + toServer.count - toServerStart
        pump()
    }

    /// Bytes that the server has sent and nobody has read.
    var unread: Int { toClient.count - toClientStart }

    // MARK: - Plaintext

    func sendPlain(_ bytes: [UInt8]) {
        toServer += bytes
        pump()
    }

    func receivePlain(_ count: Int) throws -> [UInt8] {
        pump()
        guard unread >= count else { throw ClientError("the server said \(unread) bytes") }
        defer { toClientStart += count }
        return Array(toClient[toClientStart..<toClientStart + count])
    }

    static func option(_ number: UInt32, _ data: [UInt8] = []) -> [UInt8] {
        Array("IHAVEOPT".utf8) + bigEndianBytes(number) + bigEndianBytes(UInt32(data.count)) + data
    }

    static func go(_ name: String) -> [UInt8] {
        option(
            7,
            bigEndianBytes(UInt32(name.utf8.count)) + Array(name.utf8)
                + bigEndianBytes(UInt16(0)))
    }

    /// Says hello and asks for TLS.
    func startTLS() throws {
        _ = try receivePlain(18)
        sendPlain(bigEndianBytes(UInt32(3)) + Self.option(5))
        let reply = try receivePlain(20)
        guard bigEndian(reply, 12, as: UInt32.self) == 1 else {
            throw ClientError("STARTTLS is refused")
        }
    }

    // MARK: - TLS

    private func prepare(_ proof: Proof, _ priority: String) {
        gnutls_init(&session, GNUTLS_CLIENT.rawValue | GNUTLS_NONBLOCK.rawValue)
        var priority = priority
        gnutls_certificate_allocate_credentials(&certificates)
        let all = TestCredentials.path
        switch proof {
        case .nothing: break
        case .certificate(let name):
            gnutls_certificate_set_x509_trust_file(
                certificates, "\(all)/\(name)/ca-cert.pem", GNUTLS_X509_FMT_PEM)
            gnutls_certificate_set_x509_key_file(
                certificates, "\(all)/\(name)/client-cert.pem", "\(all)/\(name)/client-key.pem",
                GNUTLS_X509_FMT_PEM)
            gnutls_session_set_verify_cert(session, "localhost", 0)
        case .key(let directory, let user):
            priority += ":-KX-ALL:+ECDHE-PSK"
            gnutls_psk_allocate_client_credentials(&keys)
            let line = try! String(
                decoding: SecretFile.read("\(all)/\(directory)/keys.psk"), as: UTF8.self)
            let digits = line.split(separator: "\n")[0].split(separator: ":")[1]
            var bytes = Array(digits.utf8)
            bytes.withUnsafeMutableBufferPointer {
                var key = gnutls_datum_t(data: $0.baseAddress, size: UInt32($0.count))
                gnutls_psk_set_client_credentials(keys, user, &key, GNUTLS_PSK_KEY_HEX)
            }
            gnutls_credentials_set(session, GNUTLS_CRD_PSK, UnsafeMutableRawPointer(keys!))
        }
        gnutls_credentials_set(
            session, GNUTLS_CRD_CERTIFICATE, UnsafeMutableRawPointer(certificates!))
        gnutls_priority_set_direct(session, priority, nil)
        gnutls_transport_set_ptr(session, Unmanaged.passUnretained(self).toOpaque())
        gnutls_transport_set_push_function(session) { own, bytes, count in
            let client = Unmanaged<TLSClient>.fromOpaque(own!).takeUnretainedValue()
            client.toServer += UnsafeRawBufferPointer(start: bytes, count: count)
            return count
        }
        gnutls_transport_set_pull_function(session) { own, memory, count in
            Unmanaged<TLSClient>.fromOpaque(own!).takeUnretainedValue().pull(memory!, count)
        }
        gnutls_transport_set_pull_timeout_function(session) { own, _ in
            Unmanaged<TLSClient>.fromOpaque(own!).takeUnretainedValue().unread > 0 ? 1 : 0
        }
    }

    private func pull(_ memory: UnsafeMutableRawPointer, _ wanted: Int) -> Int {
        let count = min(wanted, unread)
        if count == 0 {
            if connection.phase == .closed { return 0 }
            gnutls_transport_set_errno(session, EAGAIN)
            return -1
        }
        toClient[toClientStart..<toClientStart + count].withUnsafeBytes {
            memory.copyMemory(from: $0.baseAddress!, byteCount: count)
        }
        toClientStart += count
        if toClientStart == toClient.count {
            toClient = []
            toClientStart = 0
        }
        return count
    }

    private static func error(_ code: Int) -> ClientError {
        ClientError(String(cString: gnutls_strerror(Int32(code))))
    }

    /// Tries until it succeeds, fails, or nothing moves any more.
    @discardableResult
    private func persist(_ body: () -> Int) throws -> Int {
        while true {
            let result = body()
            let before = unread
            pump()
            if result >= 0 { return result }
            guard gnutls_error_is_fatal(Int32(result)) == 0 else { throw Self.error(result) }
            if unread == before && unread == 0 && connection.phase != .closed {
                throw ClientError("the server is silent")
            }
        }
    }

    func handshake(_ proof: Proof, _ priority: String = TLSClient.tls13) throws {
        if session == nil { prepare(proof, priority) }
        try persist { Int(gnutls_handshake(session)) }
    }

    func send(_ bytes: [UInt8]) throws {
        var sent = 0
        while sent < bytes.count {
            sent += try persist {
                bytes.withUnsafeBytes {
                    gnutls_record_send(session, $0.baseAddress! + sent, $0.count - sent)
                }
            }
        }
    }

    func receive(_ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var received = 0
        while received < count {
            let result = try persist {
                bytes.withUnsafeMutableBytes {
                    gnutls_record_recv(session, $0.baseAddress! + received, count - received)
                }
            }
            guard result > 0 else { throw ClientError("the server ended the stream") }
            received += result
        }
        return bytes
    }

    /// Whether the server says that nothing more will come; not if it only hangs up.
    func hearsGoodbye() -> Bool {
        var byte: UInt8 = 0
        return (try? persist { gnutls_record_recv(session, &byte, 1) }) == 0
    }

    func sayGoodbye() {
        gnutls_bye(session, GNUTLS_SHUT_WR)
        pump()
    }

    /// New keys for what the client sends, and for what it receives.
    func renewKeys() throws {
        try persist { Int(gnutls_session_key_update(session, UInt32(GNUTLS_KU_PEER))) }
    }

    /// Everything up to transmission.
    func enter(_ proof: Proof, _ priority: String = TLSClient.tls13) throws {
        try startTLS()
        try handshake(proof, priority)
        try send(Self.go("v"))
        while true {
            let header = try receive(20)
            _ = try receive(Int(bigEndian(header, 16, as: UInt32.self)))
            let type = bigEndian(header, 12, as: UInt32.self)
            if type == 1 { return }
            guard type == 3 else { throw ClientError("GO is answered with \(type)") }
        }
    }

    func write(_ offset: UInt64, _ bytes: [UInt8]) throws -> UInt32 {
        try send(
            Client.request(.write, cookie: 1, offset: offset, length: UInt32(bytes.count)) + bytes)
        return bigEndian(try receive(16), 4, as: UInt32.self)
    }

    func read(_ offset: UInt64, _ length: Int) throws -> [UInt8] {
        try send(Client.request(.read, cookie: 2, offset: offset, length: UInt32(length)))
        guard bigEndian(try receive(16), 4, as: UInt32.self) == 0 else {
            throw ClientError("READ fails")
        }
        return try receive(length)
    }
}
