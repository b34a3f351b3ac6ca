// GnuTLS's words, as parts of sentences.

import CGnuTLS
import Glibc

enum TLSWords {
    static func error(_ code: Int32) -> String { tidied(String(cString: gnutls_strerror(code))) }

    /// Why a session has failed: the peer's alert, or what is wrong with its certificate, where
    /// that is the reason.
    static func failure(of session: gnutls_session_t, _ code: Int32) -> String {
        switch code {
        case GNUTLS_E_FATAL_ALERT_RECEIVED:
            let alert = gnutls_alert_get_name(gnutls_alert_get(session))
            return "the client refused: "
                + (alert.map { tidied(String(cString: $0)) } ?? "no reason")
        case GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR:
            return verification(gnutls_session_get_verify_cert_status(session)) ?? error(code)
        default:
            return error(code)
        }
    }

    /// What is wrong with a certificate, or a list of them.
    static func verification(_ status: UInt32) -> String? {
        var text = gnutls_datum_t()
        guard
            gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &text, 0) == 0,
            let data = text.data
        else { return nil }
        defer { cgnutls_free(data) }
        let bytes = UnsafeBufferPointer(start: data, count: Int(text.size))
        return tidied(String(decoding: bytes, as: UTF8.self))
    }

    /// Without the full stop, beginning in lower case unless it is an abbreviation.
    private static func tidied(_ text: String) -> String {
        var text = Substring(text)
        while let last = text.last, last == "." || last == " " || last == "\0" { text.removeLast() }
        guard let second = text.dropFirst().first, second.isLowercase || second == " " else {
            return String(text)
        }
        return text.prefix(1).lowercased() + text.dropFirst()
    }
}
