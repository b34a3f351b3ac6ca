// TLS by the kernel: once the session is there, the socket gets its keys, and the reactor sends
// and receives plaintext as on any other socket.
//
// 1. Both directions or none, and only while nothing of the stream is in between (`isQuiet`) and
//    the kernel neither sends nor receives.
// 2. A session whose client may renew its keys is not given away: the kernels that Debian has
//    cannot follow, so the connection would end. In TLS 1.3 GnuTLS's clients do that after 2^24
//    records, except with ChaCha20-Poly1305. (`.always` gives those away, too.)
// 3. What is no data arrives as an error (EIO) and is fetched by itself: the end of the stream, or
//    something that ends the connection.

import BlockIO
import CGnuTLS
import Glibc

public enum KernelTLSUse: String, Sendable, CaseIterable {
    case off
    /// Where it cannot end a connection: see 2 above.
    case auto
    case always
}

enum KernelTLS {
    enum Outcome: Equatable {
        case done
        /// The socket is as it was.
        case unavailable(String)
        /// The socket is of no use any more.
        case broken(String)
    }

    // linux/tcp.h, linux/socket.h, linux/tls.h
    private static let upperLayer: Int32 = 31  // TCP_ULP
    static let level: Int32 = 282  // SOL_TLS
    private static let transmit: Int32 = 1  // TLS_TX
    private static let receive: Int32 = 2  // TLS_RX
    private static let setRecordType: Int32 = 1  // TLS_SET_RECORD_TYPE
    private static let getRecordType: Int32 = 2  // TLS_GET_RECORD_TYPE

    /// The kernel has no such module.
    static func isMissing(_ outcome: Outcome) -> Bool {
        outcome == .unavailable(noModule)
    }
    private static let noModule = "the kernel has no TLS (\"modprobe tls\" loads it)"

    /// Record types and the alert's first byte and second byte (RFC 8446, 5.1 and 6).
    private enum Record {
        static let alert: UInt8 = 21
        static let handshake: UInt8 = 22
        static let warning: UInt8 = 1
        static let closeNotify: UInt8 = 0
    }

    static func mayTakeOver(_ session: TLSSession, _ use: KernelTLSUse) -> Bool {
        switch use {
        case .off: false
        case .always: Cipher.of(session) != nil
        case .auto:
            session.version == GNUTLS_TLS1_2 && Cipher.of(session) != nil
                || Cipher.of(session) == .chacha20
        }
    }

    /// Gives the socket the session's keys.
    static func install(_ session: TLSSession, on socket: Int32) -> Outcome {
        guard let sending = parameters(session, ofReading: false),
            let receiving = parameters(session, ofReading: true)
        else { return .unavailable("GnuTLS does not give the session's keys") }
        let name = Array("tls".utf8)
        if let code = set(socket, Int32(IPPROTO_TCP), upperLayer, name) {
            switch code {
            case ENOENT: return .unavailable(noModule)
            case EOPNOTSUPP, ENOPROTOOPT: return .unavailable("this is not TCP")
            default: return .unavailable(SystemError.words(code))
            }
        }
        // Without keys the layer lets everything through as it is.
        if let code = set(socket, level, transmit, sending) {
            return .unavailable("the kernel does not take the keys: \(SystemError.words(code))")
        }
        if let code = set(socket, level, receive, receiving) {
            return .broken("the kernel took half of the TLS keys: \(SystemError.words(code))")
        }
        return .done
    }

    /// struct tls12_crypto_info_*: version and cipher (16 bits each, the machine's order), nonce,
    /// key, salt (a nonce's part that never changes), number of the next record.
    private static func parameters(_ session: TLSSession, ofReading: Bool) -> [UInt8]? {
        guard let cipher = Cipher.of(session), let state = session.state(ofReading: ofReading),
            state.key.count == cipher.keySize
        else { return nil }
        let isOld = session.version == GNUTLS_TLS1_2
        let version: UInt16 = isOld ? 0x0303 : 0x0304
        var bytes: [UInt8] = []
        for word in [version, cipher.number] {
            withUnsafeBytes(of: word) { bytes.append(contentsOf: $0) }
        }
        let salt = state.nonce.prefix(cipher.saltSize)
        // In TLS 1.2 with GCM the rest of the nonce is in each record: any that is new will do.
        let rest = isOld && cipher.saltSize > 0 ? state.sequence[...] : state.nonce[salt.count...]
        guard salt.count == cipher.saltSize, rest.count == cipher.nonceSize else { return nil }
        return bytes + rest + state.key + salt + state.sequence
    }

    private enum Cipher {
        case aes128, aes256, chacha20

        static func of(_ session: TLSSession) -> Cipher? {
            switch session.cipher {
            case GNUTLS_CIPHER_AES_128_GCM: .aes128
            case GNUTLS_CIPHER_AES_256_GCM: .aes256
            case GNUTLS_CIPHER_CHACHA20_POLY1305: .chacha20
            default: nil
            }
        }

        /// TLS_CIPHER_*
        var number: UInt16 {
            switch self {
            case .aes128: 51
            case .aes256: 52
            case .chacha20: 54
            }
        }
        var keySize: Int { self == .aes128 ? 16 : 32 }
        var saltSize: Int { self == .chacha20 ? 0 : 4 }
        var nonceSize: Int { self == .chacha20 ? 12 : 8 }
    }

    /// An errno, or nil.
    private static func set(
        _ socket: Int32, _ level: Int32, _ option: Int32, _ value: [UInt8]
    ) -> Int32? {
        setsockopt(socket, level, option, value, socklen_t(value.count)) == 0 ? nil : errno
    }

    // MARK: - What is no data

    /// Why receiving failed: nil, the client has ended the stream, or in words what is wrong.
    static func explain(_ code: Int32, on socket: Int32) -> String? {
        switch code {
        case EIO: break
        case EBADMSG: return "a TLS record does not decrypt"
        case EMSGSIZE, EINVAL: return "what arrives are not TLS records"
        default: return "receiving failed: \(SystemError.words(code))"
        }
        var contents: (UInt8, UInt8) = (0, 0)
        var control = RecordTypeControl()
        let count = withUnsafeMutableBytes(of: &contents) { contents in
            withUnsafeMutableBytes(of: &control) { control in
                var vector = iovec(iov_base: contents.baseAddress, iov_len: contents.count)
                return withUnsafeMutablePointer(to: &vector) { vector in
                    var message = msghdr()
                    message.msg_iov = vector
                    message.msg_iovlen = 1
                    message.msg_control = control.baseAddress
                    message.msg_controllen = control.count
                    return recvmsg(socket, &message, Int32(MSG_DONTWAIT))
                }
            }
        }
        guard count > 0, control.level == level, control.kind == getRecordType else {
            return "receiving failed: \(SystemError.words(code))"
        }
        switch (control.recordType, contents.0, contents.1) {
        case (Record.alert, _, Record.closeNotify): return nil
        case (Record.alert, _, let number): return "the client sent the TLS alert \(number)"
        case (Record.handshake, _, _):
            return "the client renewed its TLS keys, which the kernel cannot follow: "
                + "--tls-kernel off does"
        case (let type, _, _): return "the client sent a TLS record of type \(type)"
        }
    }

    /// struct cmsghdr with one byte of data, and its padding.
    private struct RecordTypeControl {
        var length = MemoryLayout<cmsghdr>.size + 1
        var level: Int32 = 0
        var kind: Int32 = 0
        var recordType: UInt8 = 0
        var padding: (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8) = (0, 0, 0, 0, 0, 0, 0)
    }

    /// The message that says that nothing more will come.
    final class Goodbye {
        let message: UnsafeMutablePointer<msghdr>
        private let memory: UnsafeMutablePointer<Contents>

        private struct Contents {
            var control = RecordTypeControl()
            var vector = iovec()
            var alert = (Record.warning, Record.closeNotify)
        }

        init() {
            message = .allocate(capacity: 1)
            message.initialize(to: msghdr())
            memory = .allocate(capacity: 1)
            memory.initialize(to: Contents())
            memory.pointee.control.level = KernelTLS.level
            memory.pointee.control.kind = KernelTLS.setRecordType
            memory.pointee.control.recordType = Record.alert
            let base = UnsafeMutableRawPointer(memory)
            memory.pointee.vector = iovec(
                iov_base: base + MemoryLayout<Contents>.offset(of: \.alert)!, iov_len: 2)
            message.pointee.msg_iov = (base + MemoryLayout<Contents>.offset(of: \.vector)!)
                .assumingMemoryBound(to: iovec.self)
            message.pointee.msg_iovlen = 1
            message.pointee.msg_control = base
            message.pointee.msg_controllen = MemoryLayout<RecordTypeControl>.size
        }

        deinit {
            message.deallocate()
            memory.deallocate()
        }
    }
}
