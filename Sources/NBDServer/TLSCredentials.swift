// What the server proves itself with, and what clients have to: certificates and pre-shared keys,
// read once at the start and shared by all reactors.
//
// 1. Everything is read and checked here. A session neither opens a file nor finds one bad.
//    But time passes: clients with certificates are refused once a list of revoked ones is outdated.
// 2. Nothing changes after `init`: GnuTLS lets threads share credentials that nobody changes.
// 3. The versions and algorithms are the operator's, or TLS 1.2 and 1.3 with ciphers that
//    authenticate, and keys that a stolen certificate's or pre-shared key does not give away.

import CGnuTLS
import Glibc
import NBDProtocol

/// What the operator wants of TLS.
public struct TLSSettings: Sendable {
    /// A directory with server-cert.pem, server-key.pem and, to verify clients, ca-cert.pem and
    /// maybe ca-crl.pem.
    public var certificates: String?
    /// A file of lines "user:key", the key in hexadecimal digits.
    public var presharedKeys: String?
    /// A client without a pre-shared key has to have a certificate that ca-cert.pem vouches for.
    public var verifiesClients = false
    /// The names in certificates that are let in; none: every name that is vouched for.
    public var allowedNames: [String] = []
    /// GnuTLS's priority string.
    public var priority: String?

    public init() {}
}

/// TLS as the server offers it.
public struct TLSConfiguration: Sendable {
    public var credentials: TLSCredentials
    /// Not `.off`.
    public var policy: TLSPolicy
    /// Exports that are for clients with TLS only, whatever the policy.
    public var requiredExports: Set<String>
    public var kernel: KernelTLSUse

    public init(
        credentials: TLSCredentials, policy: TLSPolicy, requiredExports: Set<String> = [],
        kernel: KernelTLSUse = .auto
    ) {
        self.credentials = credentials
        self.policy = policy
        self.requiredExports = requiredExports
        self.kernel = kernel
    }
}

/// - Note: unchecked, because GnuTLS's objects are pointers: see 2 above.
public final class TLSCredentials: @unchecked Sendable {
    private let certificate: gnutls_certificate_credentials_t?
    private let presharedKey: gnutls_psk_server_credentials_t?
    private let priorities: gnutls_priority_t
    private let keys: [String: [UInt8]]
    private let verifiesClients: Bool
    private let allowedNames: [NamePattern]
    /// Of the lists of revoked certificates, if there are any.
    private let revocation: RevocationPeriod?
    private let clock: @Sendable () -> time_t
    /// What to look for in a client's certificate; GnuTLS keeps the pointer for each session.
    private let clientPurpose: UnsafeMutablePointer<gnutls_typed_vdata_st>

    /// What the operator should know, in sentences.
    public let warnings: [String]

    static let certificateFile = "server-cert.pem"
    static let keyFile = "server-key.pem"
    static let authorityFile = "ca-cert.pem"
    static let revocationFile = "ca-crl.pem"

    /// Without CBC, and with elliptic curves only: Diffie-Hellman without them takes a server tens
    /// of milliseconds, for a stranger who asks. The server's order counts, because a client's may
    /// begin with a cipher for which processors have no instructions.
    static let defaultPriority =
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-CIPHER-ALL:+AES-256-GCM:+AES-128-GCM"
        + ":+CHACHA20-POLY1305:-RSA:-DHE-RSA:-GROUP-DH-ALL:%SERVER_PRECEDENCE"
    private static let presharedKeyExchange = ":+ECDHE-PSK"

    /// - Parameter clock: what time it is when a client comes.
    public init(
        _ settings: TLSSettings, clock: @escaping @Sendable () -> time_t = { time(nil) }
    ) throws(ServerError) {
        var warnings: [String] = []
        var revocation: RevocationPeriod?
        let priority =
            (settings.priority ?? Self.defaultPriority)
            + (settings.presharedKeys == nil ? "" : Self.presharedKeyExchange)
        self.clock = clock
        verifiesClients = settings.verifiesClients
        allowedNames = try settings.allowedNames.map { name throws(ServerError) in
            guard let pattern = NamePattern(name) else {
                throw ServerError(
                    operation: "let in \"\(name)\"", code: 0,
                    reason: "that is no name of a certificate; write it as the log does: "
                        + "CN=alice,O=Example")
            }
            return pattern
        }
        keys =
            try settings.presharedKeys.map { path throws(ServerError) in
                try PresharedKeys.read(path, &warnings)
            } ?? [:]
        priorities = try Self.priorities(priority)
        do throws(ServerError) {
            certificate = try settings.certificates.map { directory throws(ServerError) in
                try Self.loadCertificates(directory, settings, &revocation, &warnings)
            }
        } catch {
            gnutls_priority_deinit(priorities)
            throw error
        }
        presharedKey = settings.presharedKeys == nil ? nil : Self.presharedKeyCredentials()
        self.revocation = revocation
        self.warnings = warnings
        clientPurpose = .allocate(capacity: 1)
        clientPurpose.initialize(
            to: gnutls_typed_vdata_st(
                type: GNUTLS_DT_KEY_PURPOSE_OID,
                data: UnsafeMutableRawPointer(strdup(GNUTLS_KP_TLS_WWW_CLIENT))
                    .assumingMemoryBound(to: UInt8.self), size: 0))
        // Some of what a priority lacks, GnuTLS says only to a session.
        do throws(ServerError) { gnutls_deinit(try makeSession()) } catch {
            throw ServerError(
                operation: "use the TLS priority \(priority)", code: 0,
                reason: "\(error.reason); change --tls-priority")
        }
    }

    deinit {
        if let certificate { gnutls_certificate_free_credentials(certificate) }
        if let presharedKey { gnutls_psk_free_server_credentials(presharedKey) }
        gnutls_priority_deinit(priorities)
        free(clientPurpose.pointee.data)
        clientPurpose.deallocate()
    }

    // MARK: - Sessions

    /// A new session that uses them.
    func makeSession() throws(ServerError) -> gnutls_session_t {
        let flags =
            GNUTLS_SERVER.rawValue | GNUTLS_NONBLOCK.rawValue | GNUTLS_NO_TICKETS.rawValue
        var session: gnutls_session_t?
        var result = gnutls_init(&session, flags)
        if let session, result == 0 {
            result = equip(session)
            if result == 0 { return session }
            gnutls_deinit(session)
        }
        throw Self.failure("begin with TLS", result)
    }

    private func equip(_ session: gnutls_session_t) -> Int32 {
        var result = gnutls_priority_set(session, priorities)
        if let certificate, result == 0 {
            result = gnutls_credentials_set(
                session, GNUTLS_CRD_CERTIFICATE, UnsafeMutableRawPointer(certificate))
            let request = verifiesClients ? GNUTLS_CERT_REQUIRE : GNUTLS_CERT_IGNORE
            gnutls_certificate_server_set_request(session, request)
            if verifiesClients {
                gnutls_session_set_verify_cert2(session, clientPurpose, 1, 0)
            }
        }
        if let presharedKey, result == 0 {
            result = gnutls_credentials_set(
                session, GNUTLS_CRD_PSK, UnsafeMutableRawPointer(presharedKey))
            // Where the callback finds the keys: the session must not outlive them.
            gnutls_session_set_ptr(session, Unmanaged.passUnretained(self).toOpaque())
        }
        return result
    }

    var asksForCertificates: Bool { verifiesClients }

    /// Why who has proved to be `identity` may not come in; nil: they may.
    func refusal(of identity: TLSIdentity) -> String? {
        let stranger = "the client is not among those that are let in: \(identity)"
        switch identity {
        case .presharedKey: return nil
        case .certificate(let name):
            if let revocation, clock() > revocation.end { return revocation.isOver }
            let isAllowed = allowedNames.isEmpty || allowedNames.contains { $0.matches(name) }
            return isAllowed ? nil : stranger
        case .none: return verifiesClients ? stranger : nil
        }
    }

    private static func presharedKeyCredentials() -> gnutls_psk_server_credentials_t {
        var credentials: gnutls_psk_server_credentials_t?
        guard gnutls_psk_allocate_server_credentials(&credentials) == 0, let credentials else {
            fatalError("out of memory for credentials")
        }
        gnutls_psk_set_server_credentials_function(credentials) { session, name, key in
            let owner = Unmanaged<TLSCredentials>.fromOpaque(gnutls_session_get_ptr(session)!)
            return owner.takeUnretainedValue().findKey(name, key)
        }
        return credentials
    }

    /// GnuTLS's answer for a name that nobody has: it goes on with a key of its own making, so that
    /// a client does not learn whether the name or the key was wrong.
    private static let unknownName: Int32 = 1

    private func findKey(
        _ name: UnsafePointer<CChar>?, _ key: UnsafeMutablePointer<gnutls_datum_t>?
    ) -> Int32 {
        guard let name, let key, let bytes = keys[String(cString: name)] else {
            return Self.unknownName
        }
        guard let memory = cgnutls_allocate(bytes.count) else { return -1 }
        memory.copyMemory(from: bytes, byteCount: bytes.count)
        key.pointee.data = memory.assumingMemoryBound(to: UInt8.self)
        key.pointee.size = UInt32(bytes.count)
        return 0
    }

    // MARK: - Loading

    private static func priorities(_ text: String) throws(ServerError) -> gnutls_priority_t {
        var priorities: gnutls_priority_t?
        var place: UnsafePointer<CChar>?
        let result = text.withCString { start in
            let result = gnutls_priority_init(&priorities, start, &place)
            return (result, place.map { String(cString: $0) } ?? "")
        }
        guard result.0 == 0, let priorities else {
            throw ServerError(
                operation: "use the TLS priority \(text)", code: 0,
                reason: "it is wrong at \"\(result.1)\"; \"gnutls-cli --list\" names what there is")
        }
        return priorities
    }

    private static func loadCertificates(
        _ directory: String, _ settings: TLSSettings, _ revocation: inout RevocationPeriod?,
        _ warnings: inout [String]
    ) throws(ServerError) -> gnutls_certificate_credentials_t {
        let certificatePath = "\(directory)/\(certificateFile)"
        let keyPath = "\(directory)/\(keyFile)"
        let chain = try SecretFile.read(certificatePath)
        let key = try SecretFile.read(keyPath, warnings: &warnings)
        try CertificateFiles.checkCertificates(chain, certificatePath)
        try CertificateFiles.checkKey(key, keyPath)

        var allocated: gnutls_certificate_credentials_t?
        guard gnutls_certificate_allocate_credentials(&allocated) == 0, let credentials = allocated
        else { fatalError("out of memory for credentials") }
        do throws(ServerError) {
            let result = withData(chain) { chain in
                withData(key) { key in
                    gnutls_certificate_set_x509_key_mem(
                        credentials, chain, key, GNUTLS_X509_FMT_PEM)
                }
            }
            guard result >= 0 else { throw failure("use \(keyPath)", result) }
            if settings.verifiesClients { revocation = try trust(directory, credentials) }
        } catch {
            gnutls_certificate_free_credentials(credentials)
            throw error
        }
        return credentials
    }

    /// Who vouches for clients, and for how long what they have revoked is known.
    private static func trust(
        _ directory: String, _ credentials: gnutls_certificate_credentials_t
    ) throws(ServerError) -> RevocationPeriod? {
        let authorityPath = "\(directory)/\(authorityFile)"
        let authorities = try SecretFile.read(authorityPath)
        try CertificateFiles.checkCertificates(authorities, authorityPath)
        let count = withData(authorities) {
            gnutls_certificate_set_x509_trust_mem(credentials, $0, GNUTLS_X509_FMT_PEM)
        }
        guard count > 0 else { throw failure("use \(authorityPath)", count) }

        let revocationPath = "\(directory)/\(revocationFile)"
        // A link that leads nowhere is a list that is missing, not one that nobody made.
        var status = stat()
        if lstat(revocationPath, &status) != 0 && errno == ENOENT { return nil }
        let revoked = try SecretFile.read(revocationPath)
        var trusted: gnutls_x509_trust_list_t?
        gnutls_certificate_get_trust_list(credentials, &trusted)
        return try CertificateFiles.addRevocation(
            revoked, revocationPath, by: authorities, authorityPath, to: trusted!)
    }

    private static func failure(_ operation: String, _ code: Int32) -> ServerError {
        ServerError(operation: operation, code: 0, reason: TLSWords.error(code))
    }
}

/// Who a client has proved to be.
package enum TLSIdentity: Equatable, Sendable, CustomStringConvertible {
    /// Nobody was asked: the client may be anybody.
    case none
    /// The user of a pre-shared key.
    case presharedKey(String)
    /// The name in a verified certificate, as RFC 4514 writes it; it may be empty.
    case certificate(String)

    /// For the log, where nobody's name may begin a line.
    package var description: String {
        switch self {
        case .none: "anybody"
        case .presharedKey(let name): "PSK user \(Self.printable(name))"
        case .certificate(""): "(no name)"
        case .certificate(let name): Self.printable(name)
        }
    }

    private static func printable(_ name: String) -> String {
        String(String.UnicodeScalarView(name.unicodeScalars.map { $0.value < 0x20 ? "?" : $0 }))
    }
}

/// A name that is let in. Part by part (CN=..., O=...), each as GnuTLS prints it, or with * for a
/// whole value: never for a part of one, where an escaped comma would let it reach over parts.
/// Bytes are compared: a character may hide a comma or an escape, and be equal to another one.
struct NamePattern {
    private typealias Part = ArraySlice<UInt8>
    private let parts: [Part]

    /// Nil: it is no name, each part of which has a type.
    init?(_ text: String) {
        parts = Self.split(text)
        guard parts.allSatisfy(Self.hasType) else { return nil }
    }

    private static func hasType(_ part: Part) -> Bool {
        let part = part.first == UInt8(ascii: "+") ? part.dropFirst() : part
        guard let sign = part.firstIndex(of: UInt8(ascii: "=")), sign > part.startIndex else {
            return false
        }
        return part[..<sign].allSatisfy { byte in
            switch Unicode.Scalar(byte) {
            case "a"..."z", "A"..."Z", "0"..."9", ".": true
            default: false
            }
        }
    }

    func matches(_ name: String) -> Bool {
        let found = Self.split(name)
        return found.count == parts.count
            && zip(parts, found).allSatisfy { part, found in
                part == found
                    || part.suffix(2).elementsEqual("=*".utf8)
                        && found.starts(with: part.dropLast())
            }
    }

    /// At commas that are not escaped. A part with several values (a + that is not escaped) is
    /// split as well, so that * stands for one of them.
    private static func split(_ name: String) -> [Part] {
        let bytes = Array(name.utf8)
        var parts: [Part] = []
        var start = 0
        var isEscaped = false
        for (index, byte) in bytes.enumerated() {
            if isEscaped {
                isEscaped = false
            } else if byte == UInt8(ascii: "\\") {
                isEscaped = true
            } else if byte == UInt8(ascii: ",") || byte == UInt8(ascii: "+") {
                parts.append(bytes[start..<index])
                // With the sign: "a+b" and "a,b" are different names.
                start = byte == UInt8(ascii: "+") ? index : index + 1
            }
        }
        parts.append(bytes[start...])
        return parts
    }
}
