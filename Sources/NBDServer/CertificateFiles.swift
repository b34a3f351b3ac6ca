// Files of certificates, private keys and lists of revoked certificates: what is wrong with one is
// said before anything is served with it. GnuTLS itself takes a list whoever has signed it, and goes
// on with it when it is outdated.

import CGnuTLS
import Glibc

/// Until when it is known which certificates are revoked.
struct RevocationPeriod: Sendable {
    let path: String
    /// The earliest day on which one of the lists was to be renewed.
    let end: time_t

    var isOver: String {
        "\(path) was to be renewed by \(CertificateFiles.day(end)); "
            + "renew it (certtool --generate-crl) and restart the server"
    }
}

enum CertificateFiles {
    /// Throws unless there is a first certificate, and it is valid now. (Behind the server's own
    /// come those of authorities, in whose dates clients take an interest.)
    static func checkCertificates(_ bytes: [UInt8], _ path: String) throws(ServerError) {
        let list = try FileContents.certificates(bytes, path)
        let now = time(nil)
        let end = gnutls_x509_crt_get_expiration_time(list[0])
        let start = gnutls_x509_crt_get_activation_time(list[0])
        guard now <= end else {
            throw unusable(path, "the certificate expired on \(day(end)); make a new one")
        }
        guard now >= start else {
            throw unusable(
                path, "the certificate is not valid before \(day(start)); check the clock")
        }
    }

    static func checkKey(_ bytes: [UInt8], _ path: String) throws(ServerError) {
        var key: gnutls_x509_privkey_t?
        guard gnutls_x509_privkey_init(&key) == 0, let key else {
            fatalError("out of memory for a key")
        }
        defer { gnutls_x509_privkey_deinit(key) }
        let result = withData(bytes) {
            gnutls_x509_privkey_import2(key, $0, GNUTLS_X509_FMT_PEM, nil, 0)
        }
        guard result >= 0 else {
            throw unusable(
                path,
                "there is no private key in it, or one with a password "
                    + "(\(TLSWords.error(result)))")
        }
    }

    /// Lets `trusted` look at the lists. Throws unless each is of one of the authorities, and of now.
    static func addRevocation(
        _ bytes: [UInt8], _ path: String, by authorities: [UInt8], _ authorityPath: String,
        to trusted: gnutls_x509_trust_list_t
    ) throws(ServerError) -> RevocationPeriod {
        let authorities = try FileContents.certificates(authorities, authorityPath)
        let lists = try FileContents.revocationLists(bytes, path)
        let now = time(nil)
        var end = time_t.max
        for index in 0..<lists.count {
            let list = lists[index]
            let start = gnutls_x509_crl_get_this_update(list)
            guard now >= start else {
                throw unusable(path, "it is not valid before \(day(start)); check the clock")
            }
            let next = gnutls_x509_crl_get_next_update(list)
            guard next >= 0 else {
                throw unusable(path, "it does not say when it is to be renewed")
            }
            guard now <= next else {
                throw unusable(
                    path,
                    "it was to be renewed by \(day(next)); make a new one "
                        + "(certtool --generate-crl)")
            }
            try checkSignature(list, path, authorities, authorityPath)
            end = min(end, next)
        }
        // Not by gnutls_certificate_set_x509_crl_mem: of lists with one name it keeps the newest, and
        // an authority with a new key has a list for each of its keys.
        let added = gnutls_x509_trust_list_add_crls(
            trusted, lists.list, UInt32(lists.count), 0, 0)
        lists.forget()
        guard added == lists.count else { throw unusable(path, TLSWords.error(added)) }
        return RevocationPeriod(path: path, end: end)
    }

    /// Each authority by itself: GnuTLS asks only the first of several with one name.
    private static func checkSignature(
        _ list: gnutls_x509_crl_t, _ path: String,
        _ authorities: borrowing FileContents, _ authorityPath: String
    ) throws(ServerError) {
        var problem: UInt32 = 0
        for index in 0..<authorities.count {
            var authority: gnutls_x509_crt_t? = authorities[index]
            var status: UInt32 = 0
            if gnutls_x509_crl_verify(list, &authority, 1, 0, &status) == 0 && status == 0 {
                return
            }
            problem |= status
        }
        throw unusable(
            path,
            "nobody in \(authorityPath) who may sign such lists (crl_signing_key) has signed it"
                + (TLSWords.verification(problem).map { " (\($0))" } ?? ""))
    }

    fileprivate static func unusable(_ path: String, _ reason: String) -> ServerError {
        ServerError(operation: "use \(path)", code: 0, reason: reason)
    }

    fileprivate static func day(_ time: time_t) -> String {
        var time = time
        var parts = tm()
        gmtime_r(&time, &parts)
        func figures(_ number: Int32) -> String { (number < 10 ? "0" : "") + "\(number)" }
        return "\(1900 + parts.tm_year)-\(figures(parts.tm_mon + 1))-\(figures(parts.tm_mday))"
    }
}

/// What GnuTLS finds in a file that may hold several of a kind, at least one.
private struct FileContents: ~Copyable {
    typealias List = UnsafeMutablePointer<OpaquePointer?>

    let list: List
    private let release: (OpaquePointer?) -> Void
    let count: Int

    private init(
        _ bytes: [UInt8], _ path: String, _ kind: String,
        parse: (
            UnsafeMutablePointer<List?>, UnsafeMutablePointer<UInt32>, UnsafePointer<gnutls_datum_t>
        ) -> Int32,
        release: @escaping (OpaquePointer?) -> Void
    ) throws(ServerError) {
        var list: List?
        var count: UInt32 = 0
        let result = withData(bytes) { parse(&list, &count, $0) }
        guard result >= 0, let list, count > 0 else {
            throw CertificateFiles.unusable(
                path, "there is no \(kind) in it (\(TLSWords.error(result)))")
        }
        self.list = list
        self.release = release
        self.count = Int(count)
    }

    static func certificates(_ bytes: [UInt8], _ path: String) throws(ServerError) -> Self {
        try Self(
            bytes, path, "certificate",
            parse: { gnutls_x509_crt_list_import2($0, $1, $2, GNUTLS_X509_FMT_PEM, 0) },
            release: { gnutls_x509_crt_deinit($0) })
    }

    static func revocationLists(_ bytes: [UInt8], _ path: String) throws(ServerError) -> Self {
        try Self(
            bytes, path, "list of revoked certificates",
            parse: { gnutls_x509_crl_list_import2($0, $1, $2, GNUTLS_X509_FMT_PEM, 0) },
            release: { gnutls_x509_crl_deinit($0) })
    }

    /// Somebody else releases the objects.
    func forget() { list.update(repeating: nil, count: count) }

    deinit {
        for index in 0..<count { release(list[index]) }
        cgnutls_free(list)
    }

    subscript(index: Int) -> OpaquePointer { list[index]! }
}

/// Calls `body` with the bytes as GnuTLS wants them; it only reads them.
func withData<Result>(
    _ bytes: [UInt8], _ body: (UnsafePointer<gnutls_datum_t>) -> Result
) -> Result {
    bytes.withUnsafeBufferPointer { bytes in
        var data = gnutls_datum_t(
            data: UnsafeMutablePointer(mutating: bytes.baseAddress), size: UInt32(bytes.count))
        return body(&data)
    }
}
