// A TLS session of the server's, with a client of GnuTLS's that shares a key with it. The input decides
// what is said, in which pieces it moves and which byte on the way is changed.
//
// 1. What arrives is a beginning of what was sent, in either direction, whatever happens on the way.
// 2. If nothing happens on the way all of it arrives.

import CGnuTLS
import Glibc
import NBDServer

public enum TLSTarget: FuzzTarget {
    public static let name = "tls"

    public static func run(_ bytes: UnsafeRawBufferPointer) {
        var input = FuzzInput(bytes)
        let pair = TLSPair(&input)
        for _ in 0..<150 where !input.isAtEnd { pair.act(&input) }
        pair.end()
    }
}

private final class TLSPair {
    private static let key = "00112233445566778899aabbccddeeff"
    private static let credentials: TLSCredentials = {
        var path = Array("/tmp/wafer-fuzz-keys-XXXXXX".utf8CString)
        let file = mkstemp(&path)
        let line = "fuzz:\(key)\n"
        require(file >= 0 && write(file, line, line.utf8.count) > 0, "no file for a key")
        close(file)
        defer { unlink(path) }
        var settings = TLSSettings()
        settings.presharedKeys = path.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
        do { return try TLSCredentials(settings) } catch {
            fatalError("fuzz: no credentials: \(error)")
        }
    }()

    /// A direction: what was said, and how much of it has arrived.
    private struct Speech {
        var said: [UInt8] = []
        var heard: [UInt8] = []

        mutating func hear(_ bytes: some Sequence<UInt8>) {
            let start = heard.count
            heard += bytes
            require(
                heard.count <= said.count && heard[start...] == said[start..<heard.count],
                "what is heard was never said")
        }
    }

    private let server = try! TLSSession(TLSPair.credentials)
    private var client: gnutls_session_t!
    private var clientKeys: gnutls_psk_client_credentials_t!
    private var fromClient = Speech()
    private var fromServer = Speech()
    /// Of what the server has to say: so much has gone.
    private var serverSent = 0
    private var clientSent = 0
    private var toServer: [UInt8] = []
    private var toClient: [UInt8] = []
    private var isClientReady = false
    private var serverWantsMore = false
    private var hasServerEnded = false
    private var isUndisturbed = true

    init(_ input: inout FuzzInput) {
        let version = input.byte() & 1 == 0 ? "TLS1.2" : "TLS1.3"
        gnutls_init(&client, GNUTLS_CLIENT.rawValue | GNUTLS_NONBLOCK.rawValue)
        gnutls_psk_allocate_client_credentials(&clientKeys)
        var bytes = Array(Self.key.utf8)
        bytes.withUnsafeMutableBufferPointer {
            var datum = gnutls_datum_t(data: $0.baseAddress, size: UInt32($0.count))
            gnutls_psk_set_client_credentials(clientKeys, "fuzz", &datum, GNUTLS_PSK_KEY_HEX)
        }
        gnutls_credentials_set(client, GNUTLS_CRD_PSK, UnsafeMutableRawPointer(clientKeys))
        let result = gnutls_priority_set_direct(
            client, "NORMAL:-VERS-ALL:+VERS-\(version):-KX-ALL:+ECDHE-PSK", nil)
        require(result == 0, "the client has no priorities")
        gnutls_transport_set_ptr(client, Unmanaged.passUnretained(self).toOpaque())
        gnutls_transport_set_pull_function(client) { own, memory, length in
            TLSPair.from(own).pull(memory!, length)
        }
        gnutls_transport_set_pull_timeout_function(client) { own, _ in
            TLSPair.from(own).toClient.isEmpty ? 0 : 1
        }
        gnutls_transport_set_push_function(client) { own, memory, length in
            TLSPair.from(own).toServer += UnsafeRawBufferPointer(start: memory, count: length)
            return length
        }
    }

    deinit {
        gnutls_deinit(client)
        gnutls_psk_free_client_credentials(clientKeys)
    }

    private static func from(_ own: gnutls_transport_ptr_t?) -> TLSPair {
        Unmanaged<TLSPair>.fromOpaque(own!).takeUnretainedValue()
    }

    private func pull(_ memory: UnsafeMutableRawPointer, _ length: Int) -> Int {
        guard !toClient.isEmpty else {
            gnutls_transport_set_errno(client, EAGAIN)
            return -1
        }
        let count = min(length, toClient.count)
        toClient.withUnsafeBytes { memory.copyMemory(from: $0.baseAddress!, byteCount: count) }
        toClient.removeFirst(count)
        return count
    }

    // MARK: - What happens

    func act(_ input: inout FuzzInput) {
        let action = input.byte()
        switch action & 7 {
        case 0: say(&fromClient, &input)
        case 1: say(&fromServer, &input)
        case 2: receive(1 + Int(input.byte()))
        case 3: send(1 + Int(input.byte()))
        case 4: read(1 + Int(input.byte()) * 16)
        case 5 where action >> 4 == 15 && !toServer.isEmpty:
            isUndisturbed = false
            toServer[input.below(toServer.count)] ^= max(1, input.byte())
        case 6 where action >> 4 == 15:
            isUndisturbed = false
            if serverWantsMore { endOfStream() }
        default: flow()
        }
    }

    private func say(_ speech: inout Speech, _ input: inout FuzzInput) {
        let count = Int(input.word(UInt16.self)) % 40_000
        let first = speech.said.count
        guard first < 400_000 else { return }
        speech.said += (0..<count).map { UInt8(truncatingIfNeeded: (first + $0) &* 31) }
    }

    private func flow() {
        moveClient()
        receive(.max)
        read(20_000)
        seal()
        send(.max)
        moveClient()
    }

    /// The client goes on with its handshake, says what it has to and listens.
    private func moveClient() {
        if !isClientReady {
            let result = gnutls_handshake(client)
            if result != 0 { return }
            isClientReady = true
        }
        while clientSent < fromClient.said.count {
            let count = fromClient.said.withUnsafeBytes {
                gnutls_record_send(client, $0.baseAddress! + clientSent, $0.count - clientSent)
            }
            if count <= 0 { break }
            clientSent += count
        }
        var buffer = [UInt8](repeating: 0, count: 20_000)
        while true {
            let count = gnutls_record_recv(client, &buffer, buffer.count)
            if count <= 0 { break }
            fromServer.hear(buffer[..<count])
        }
    }

    private func receive(_ limit: Int) {
        if !server.isEstablished && !hasServerEnded { read(1) }
        guard serverWantsMore, !toServer.isEmpty else { return }
        let space = server.receiveSpace()
        let count = min(limit, space.count, toServer.count)
        toServer.withUnsafeBytes { space.copyMemory(from: .init(rebasing: $0[..<count])) }
        toServer.removeFirst(count)
        serverWantsMore = false
        server.received(count)
    }

    private func endOfStream() {
        _ = server.receiveSpace()
        serverWantsMore = false
        server.received(0)
    }

    private func read(_ limit: Int) {
        guard !serverWantsMore, !hasServerEnded else { return }
        if !server.isEstablished {
            switch server.handshake() {
            case .done: break
            case .again: serverWantsMore = true
            case .failed(let reason): fail(reason)
            }
            return
        }
        let space = UnsafeMutableRawBufferPointer.allocate(byteCount: limit, alignment: 16)
        defer { space.deallocate() }
        while !serverWantsMore && !hasServerEnded {
            switch server.read(into: space) {
            case .bytes(let count):
                require(count > 0 && count <= limit, "\(count) bytes are read")
                fromClient.hear(UnsafeRawBufferPointer(rebasing: space[..<count]))
            case .again: serverWantsMore = true
            case .end: hasServerEnded = true
            case .failed(let reason): fail(reason)
            }
        }
    }

    private func fail(_ reason: String) {
        require(!isUndisturbed, "an undisturbed session fails: \(reason)")
        hasServerEnded = true
    }

    private func seal() {
        guard server.isEstablished, !hasServerEnded, server.isFlushed,
            serverSent < fromServer.said.count
        else { return }
        var rest = Array(fromServer.said[serverSent...])
        rest.withUnsafeMutableBytes {
            // As replies are: a header, and what follows it.
            let first = min(16, $0.count)
            var vectors = [
                iovec(iov_base: $0.baseAddress, iov_len: first),
                iovec(iov_base: $0.baseAddress! + first, iov_len: $0.count - first),
            ]
            vectors.withUnsafeMutableBufferPointer {
                var message = msghdr()
                message.msg_iov = $0.baseAddress
                message.msg_iovlen = $0.count
                if case .failed(let reason) = server.seal(&message) { fail(reason) }
            }
        }
    }

    private func send(_ limit: Int) {
        guard let message = server.nextMessage() else { return }
        let vector = message.pointee.msg_iov[0]
        let count = min(limit, vector.iov_len)
        toClient += UnsafeRawBufferPointer(start: vector.iov_base, count: count)
        serverSent += server.sent(count)
        require(serverSent <= fromServer.said.count, "more has gone than was said")
    }

    private var isAllHeard: Bool {
        server.isEstablished && isClientReady && fromClient.heard.count == fromClient.said.count
            && fromServer.heard.count == fromServer.said.count
    }

    func end() {
        for _ in 0..<(isUndisturbed ? 200 : 10) where !isAllHeard { flow() }
        guard isUndisturbed else { return }
        require(server.isEstablished && isClientReady, "an undisturbed handshake does not end")
        require(fromClient.heard.count == fromClient.said.count, "the server has not heard all")
        require(fromServer.heard.count == fromServer.said.count, "the client has not heard all")
    }
}
