// One connection's TLS, without its socket: ciphertext in and out through memory.
//
//   socket ──▶ received ──▶ read ──▶ what the protocol has room for
//   socket ◀── nextMessage, sent ◀── seal ◀── the protocol's message
//
// 1. No more is decrypted than there is room for: what is left stays ciphertext, and while there
//    is any nothing more is received. So memory is bounded by `inputCapacity` and one record.
// 2. Of a message at most `sealLimit` bytes are encrypted at once, and the next ones only when all
//    of their ciphertext has been sent. The protocol hears that bytes were sent when their
//    ciphertext was: so a client that does not read its replies keeps their slots, and is stopped,
//    as it is without TLS.
// 3. Two outputs: one is filled, the other belongs to the kernel until it has been sent whole.
// 4. Renegotiation is refused, tickets are not given: no secret outlives the connection.
// 5. After a failure the session is good for nothing but sending what is in the output.

import CGnuTLS
import Glibc

package final class TLSSession {
    /// How far a step has come.
    package enum Progress: Equatable {
        case done
        /// More ciphertext is needed.
        case again
        /// What went wrong, in words. An alert for the client may be in the output.
        case failed(String)
    }

    package enum Reading: Equatable {
        /// So many bytes, at least one.
        case bytes(Int)
        case again
        /// The client has ended the stream, with or without saying so.
        case end
        case failed(String)
    }

    /// One receive takes up to this much; the longest record is a quarter of it.
    private static let inputCapacity = 64 << 10
    /// Plaintext that is encrypted at once.
    static let sealLimit = 256 << 10

    private let session: gnutls_session_t
    private let credentials: TLSCredentials

    // Ciphertext that GnuTLS has not taken yet.
    private let input: UnsafeMutableRawBufferPointer
    private var inputStart = 0
    private var inputEnd = 0
    private var hasEnded = false
    /// GnuTLS wanted more than there was.
    private var isStarved = false
    private var framing = RecordFraming()

    private var filling = CiphertextBuffer()
    private var sending = CiphertextBuffer()
    private let message: UnsafeMutablePointer<msghdr>
    private let vector: UnsafeMutablePointer<iovec>
    /// Where small parts of a message become one record.
    private let gathered: UnsafeMutableRawPointer
    /// Plaintext bytes whose ciphertext is in `sending`.
    private var sealed = 0

    package private(set) var isEstablished = false
    package private(set) var hasSaidGoodbye = false
    /// The client has ended the stream without a goodbye: GnuTLS encrypts nothing more.
    package private(set) var wasCutOff = false
    /// Who the client is, once the session is established.
    package private(set) var identity = TLSIdentity.none

    package init(_ credentials: TLSCredentials) throws(ServerError) {
        session = try credentials.makeSession()
        self.credentials = credentials
        input = .allocate(byteCount: Self.inputCapacity, alignment: 64)
        gathered = .allocate(byteCount: Self.recordSize, alignment: 64)
        message = .allocate(capacity: 1)
        message.initialize(to: msghdr())
        vector = .allocate(capacity: 1)
        vector.initialize(to: iovec())

        let own = Unmanaged.passUnretained(self).toOpaque()
        gnutls_transport_set_ptr(session, own)
        gnutls_transport_set_pull_function(session) { own, memory, length in
            TLSSession.from(own).pull(memory, length)
        }
        gnutls_transport_set_pull_timeout_function(session) { own, _ in
            let session = TLSSession.from(own)
            return session.inputStart < session.inputEnd || session.hasEnded ? 1 : 0
        }
        gnutls_transport_set_push_function(session) { own, memory, length in
            TLSSession.from(own).filling.append(memory!, length)
            return length
        }
    }

    deinit {
        gnutls_deinit(session)
        input.deallocate()
        gathered.deallocate()
        message.deallocate()
        vector.deallocate()
    }

    private static func from(_ own: gnutls_transport_ptr_t?) -> TLSSession {
        Unmanaged<TLSSession>.fromOpaque(own!).takeUnretainedValue()
    }

    // MARK: - Ciphertext in

    /// Where received bytes go.
    ///
    /// - Precondition: `read` or `handshake` has said that it needs more.
    package func receiveSpace() -> UnsafeMutableRawBufferPointer {
        precondition(inputStart == inputEnd, "ciphertext is left, and more is asked for")
        inputStart = 0
        inputEnd = 0
        return input
    }

    /// `count` bytes have been received into `receiveSpace`; 0: the stream has ended.
    package func received(_ count: Int) {
        inputEnd += count
        if count == 0 { hasEnded = true }
    }

    private func pull(_ memory: UnsafeMutableRawPointer?, _ length: Int) -> Int {
        let count = min(length, inputEnd - inputStart)
        if count == 0 {
            if hasEnded { return 0 }
            isStarved = true
            gnutls_transport_set_errno(session, EAGAIN)
            return -1
        }
        let source = UnsafeRawBufferPointer(rebasing: input[inputStart..<inputStart + count])
        memory!.copyMemory(from: source.baseAddress!, byteCount: count)
        framing.passed(source)
        inputStart += count
        return count
    }

    // MARK: - Handshake

    /// Goes on with the handshake as far as the ciphertext lasts.
    package func handshake() -> Progress {
        isStarved = false
        while true {
            let result = gnutls_handshake(session)
            if result == 0 { return establish() }
            if gnutls_error_is_fatal(result) != 0 {
                let reason = TLSWords.failure(of: session, result)
                gnutls_alert_send_appropriate(session, result)
                return .failed(reason)
            }
            if isStarved { return .again }
        }
    }

    private func establish() -> Progress {
        guard let identity = findIdentity() else {
            gnutls_alert_send(session, GNUTLS_AL_FATAL, GNUTLS_A_INTERNAL_ERROR)
            return .failed("the client's name cannot be read")
        }
        if let reason = credentials.refusal(of: identity) {
            gnutls_alert_send(session, GNUTLS_AL_FATAL, GNUTLS_A_ACCESS_DENIED)
            return .failed(reason)
        }
        self.identity = identity
        isEstablished = true
        return .done
    }

    private func findIdentity() -> TLSIdentity? {
        if gnutls_auth_client_get_type(session) == GNUTLS_CRD_PSK
            || gnutls_auth_server_get_type(session) == GNUTLS_CRD_PSK
        {
            return gnutls_psk_server_get_username(session).map {
                .presharedKey(String(cString: $0))
            }
        }
        var count: UInt32 = 0
        // Only what was asked for has been verified.
        guard credentials.asksForCertificates else { return TLSIdentity.none }
        guard let chain = gnutls_certificate_get_peers(session, &count), count > 0 else {
            return TLSIdentity.none
        }
        var certificate: gnutls_x509_crt_t?
        guard gnutls_x509_crt_init(&certificate) == 0, let certificate else { return nil }
        defer { gnutls_x509_crt_deinit(certificate) }
        var name = gnutls_datum_t()
        guard gnutls_x509_crt_import(certificate, chain, GNUTLS_X509_FMT_DER) == 0 else {
            return nil
        }
        let result = gnutls_x509_crt_get_dn3(certificate, &name, 0)
        // Who it is for may be said elsewhere in it.
        if result == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE { return .certificate("") }
        guard result == 0, let data = name.data else { return nil }
        defer { cgnutls_free(data) }
        let bytes = UnsafeBufferPointer(start: data, count: Int(name.size))
        return String(validating: bytes, as: UTF8.self).map { .certificate($0) }
    }

    /// Version and cipher, for the log.
    var summary: String {
        [gnutls_protocol_get_name(version), gnutls_cipher_get_name(cipher)]
            .map { $0.map { String(cString: $0) } ?? "?" }.joined(separator: " ")
    }

    // MARK: - Plaintext in

    /// Decrypts into `space`.
    package func read(into space: UnsafeMutableRawBufferPointer) -> Reading {
        isStarved = false
        while true {
            let result = gnutls_record_recv(session, space.baseAddress, space.count)
            if result > 0 { return .bytes(result) }
            switch Int32(result) {
            case 0:
                return .end
            case GNUTLS_E_PREMATURE_TERMINATION:
                wasCutOff = true
                return .end
            case GNUTLS_E_REHANDSHAKE:
                return .failed("the client wants to negotiate TLS anew")
            case let code where gnutls_error_is_fatal(code) != 0:
                return .failed(TLSWords.failure(of: session, code))
            default:
                // A warning, or a record without contents: the next may say more.
                if isStarved { return .again }
            }
        }
    }

    // MARK: - Out

    /// Encrypts the beginning of the message, if all earlier ciphertext has been sent.
    package func seal(_ message: UnsafePointer<msghdr>) -> Progress {
        guard sending.isEmpty && filling.isEmpty else { return .again }
        let vectors = UnsafeBufferPointer(
            start: message.pointee.msg_iov, count: message.pointee.msg_iovlen)
        var left = Self.sealLimit
        var waiting = 0
        for vector in vectors where left > 0 {
            var part = UnsafeRawBufferPointer(start: vector.iov_base, count: vector.iov_len)
            part = UnsafeRawBufferPointer(rebasing: part.prefix(left))
            left -= part.count
            while !part.isEmpty {
                if waiting == 0 && part.count >= Self.recordSize {
                    guard write(part.baseAddress!, Self.recordSize) else { return sealingFailed }
                    part = UnsafeRawBufferPointer(rebasing: part.dropFirst(Self.recordSize))
                    continue
                }
                let count = min(part.count, Self.recordSize - waiting)
                (gathered + waiting).copyMemory(from: part.baseAddress!, byteCount: count)
                waiting += count
                part = UnsafeRawBufferPointer(rebasing: part.dropFirst(count))
                if waiting == Self.recordSize {
                    guard write(gathered, waiting) else { return sealingFailed }
                    waiting = 0
                }
            }
        }
        if waiting > 0 {
            guard write(gathered, waiting) else { return sealingFailed }
        }
        sealed = Self.sealLimit - left
        return .done
    }

    /// What a record holds at most.
    private static let recordSize = 16 << 10
    private var sealingFailed: Progress { .failed("encrypting failed") }

    /// One record, or several if the client has asked for shorter ones.
    private func write(_ bytes: UnsafeRawPointer, _ count: Int) -> Bool {
        var written = 0
        while written < count {
            let result = gnutls_record_send(session, bytes + written, count - written)
            guard result > 0 else { return false }
            written += result
        }
        return true
    }

    /// Says that nothing more will come.
    package func sayGoodbye() {
        hasSaidGoodbye = true
        gnutls_bye(session, GNUTLS_SHUT_WR)
    }

    /// The ciphertext to send next, or nil. Valid until `sent`.
    package func nextMessage() -> UnsafePointer<msghdr>? {
        if sending.isEmpty { swap(&sending, &filling) }
        guard !sending.isEmpty else { return nil }
        vector.pointee = sending.rest
        message.pointee.msg_iov = vector
        message.pointee.msg_iovlen = 1
        return UnsafePointer(message)
    }

    /// `count` bytes of the message have been sent.
    /// - Returns: how many of the protocol's bytes have gone with them.
    package func sent(_ count: Int) -> Int {
        sending.drop(count)
        guard sending.isEmpty else { return 0 }
        defer { sealed = 0 }
        return sealed
    }

    package var isFlushed: Bool { sending.isEmpty && filling.isEmpty }

    // MARK: - Leaving it to the kernel

    /// Nothing is in between: whoever has the keys can go on with the next record.
    var isQuiet: Bool {
        isEstablished && !hasEnded && isFlushed && inputStart == inputEnd
            && framing.isAtBoundary && gnutls_record_check_pending(session) == 0
    }

    var version: gnutls_protocol_t { gnutls_protocol_get_version(session) }
    var cipher: gnutls_cipher_algorithm_t { gnutls_cipher_get(session) }

    /// Key, nonce and number of the next record of one direction. Valid while the session lives.
    func state(ofReading: Bool) -> (key: [UInt8], nonce: [UInt8], sequence: [UInt8])? {
        var key = gnutls_datum_t()
        var nonce = gnutls_datum_t()
        var sequence = [UInt8](repeating: 0, count: 8)
        guard
            gnutls_record_get_state(
                session, ofReading ? 1 : 0, nil, &nonce, &key, &sequence) == 0
        else { return nil }
        func bytes(_ data: gnutls_datum_t) -> [UInt8] {
            Array(UnsafeBufferPointer(start: data.data, count: Int(data.size)))
        }
        return (bytes(key), bytes(nonce), sequence)
    }
}

/// Where records begin and end in a stream of ciphertext.
private struct RecordFraming {
    /// type, version (2), length (2, the most significant first).
    private static let headerSize = 5
    private var headerBytes = 0
    private var length = 0
    /// Bytes of the present record's body that are missing.
    private var missing = 0

    var isAtBoundary: Bool { headerBytes == 0 }

    mutating func passed(_ bytes: UnsafeRawBufferPointer) {
        var index = 0
        while index < bytes.count {
            if headerBytes < Self.headerSize {
                if headerBytes >= 3 { length = length << 8 & 0xFFFF | Int(bytes[index]) }
                headerBytes += 1
                index += 1
                missing = length
            } else {
                let count = min(missing, bytes.count - index)
                missing -= count
                index += count
            }
            if headerBytes == Self.headerSize && missing == 0 { headerBytes = 0 }
        }
    }
}

/// Ciphertext on its way out; grows to what the longest message needs.
private struct CiphertextBuffer: ~Copyable {
    private var memory: UnsafeMutableRawBufferPointer?
    private var start = 0
    private var end = 0

    private static let leastCapacity = 16 << 10

    deinit { memory?.deallocate() }

    var isEmpty: Bool { start == end }
    /// Valid until the buffer changes.
    var rest: iovec { iovec(iov_base: memory!.baseAddress! + start, iov_len: end - start) }

    mutating func append(_ bytes: UnsafeRawPointer, _ count: Int) {
        guard count > 0 else { return }
        let needed = end + count
        if needed > memory?.count ?? 0 {
            let larger = UnsafeMutableRawBufferPointer.allocate(
                byteCount: max(needed, 2 * end, Self.leastCapacity), alignment: 64)
            if let memory {
                larger.copyMemory(from: UnsafeRawBufferPointer(rebasing: memory[..<end]))
                memory.deallocate()
            }
            memory = larger
        }
        (memory!.baseAddress! + end).copyMemory(from: bytes, byteCount: count)
        end += count
    }

    mutating func drop(_ count: Int) {
        precondition(count <= end - start, "more sent than there was")
        start += count
        if start == end {
            start = 0
            end = 0
        }
    }
}
