// TLS with other people's clients: libnbd's tools and QEMU's, with certificates and with keys.

import Foundation
import Testing

/// Certificates and keys of Tests/TLS/make-credentials.
final class Credentials: Sendable {
    private let scratch: Scratch

    init() throws {
        scratch = try Scratch()
        let script = URL(filePath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().appending(path: "TLS/make-credentials").path
        let outcome = try Program.run(script, [scratch.path], in: scratch)
        guard outcome.status == 0 else { throw Failure("make-credentials: \(outcome)") }
    }

    subscript(name: String) -> String { scratch.file(name) }
    var keys: String { scratch.file("psk/keys.psk") }
    var certificates: [String] { ["--tls-certificates", self["server"]] }
}

@Suite struct TLSTests {
    private let pool: TestPool
    private let credentials: Credentials
    private static let size = 24 * mebibyte

    init() throws {
        pool = try TestPool(volumes: [("alpha", Self.size)])
        credentials = try Credentials()
    }

    private func serve(_ options: String..., engine: Engine = .ring) throws -> Server {
        try Server(pool, engine: engine, options: options)
    }

    private func run(_ tool: String, _ arguments: [String]) throws -> Outcome {
        try Program.run(tool, arguments, in: pool.scratch)
    }

    private func must(_ tool: String, _ arguments: String...) throws -> String {
        let outcome = try run(tool, arguments)
        try #require(outcome.status == 0, "\(tool) \(arguments): \(outcome)")
        return outcome.output
    }

    /// Over TCP and over the Unix socket, with a certificate and with a key.
    private func uris(_ server: Server) -> [String] {
        let certificate = "tls-certificates=\(credentials["alice"])"
        let key = "tls-psk-file=\(credentials.keys)"
        return [
            "nbds://localhost:\(server.port)/alpha?\(certificate)",
            "nbds://alice@127.0.0.1:\(server.port)/alpha?\(key)",
            "nbds+unix:///alpha?socket=\(server.unixPath)&tls-hostname=localhost&\(certificate)",
            "nbds+unix://alice@/alpha?socket=\(server.unixPath)&\(key)",
        ]
    }

    @Test(arguments: Engine.allCases) func libnbdCopiesThereAndBack(engine: Engine) throws {
        let server = try serve(
            "--tls=require", "--tls-certificates", credentials["server"], "--tls-psk",
            credentials.keys, "--tls-verify-peer", engine: engine)
        let source = pool.scratch.file("source")
        for (index, uri) in uris(server).enumerated() {
            let bytes = Data(pattern(UInt64(index + 1), 0, Int(Self.size)))
            try bytes.write(to: URL(filePath: source))
            #expect(try must("nbdinfo", "--size", uri) == "\(Self.size)\n")
            _ = try must("nbdcopy", "--flush", source, uri)
            let back = pool.scratch.newFile("back")
            _ = try must("nbdcopy", uri, back)
            #expect(try Data(contentsOf: URL(filePath: back)) == bytes)
        }
        try server.stop()
        let log = server.program.error
        #expect(log.contains("client=CN=alice,O=Example"))
        #expect(log.contains("client=PSK user alice"))
        #expect(!log.contains(" warning "), "\(log)")
    }

    @Test func qemuReadsAndWrites() throws {
        let server = try serve(
            "--tls=require", "--tls-certificates", credentials["server"], "--tls-psk",
            credentials.keys)
        let objects = [
            "tls-creds-x509,id=t,endpoint=client,dir=\(credentials["alice"])",
            "tls-creds-psk,id=t,endpoint=client,username=alice,dir=\(credentials["psk"])",
        ]
        for (index, object) in objects.enumerated() {
            let image = "driver=nbd,host=localhost,port=\(server.port),export=alpha,tls-creds=t"
            let output = try must(
                "qemu-io", "--object", object, "--image-opts", image, "-c",
                "write -P \(index + 3) 1M 3M", "-c", "flush", "-c", "read -P \(index + 3) 1M 3M")
            #expect(!output.contains("failed"), "\(output)")
            #expect(
                try must("qemu-img", "info", "--object", object, "--image-opts", image)
                    .contains("24 MiB"))
        }
        try server.stop()
        #expect(server.program.error.contains("anybody who reaches the server"))
    }

    // MARK: - What is refused

    @Test func requiredTLSKeepsPlaintextOut() throws {
        let server = try serve("--tls=require", "--tls-psk", credentials.keys)
        let lines = server.program.output.split(separator: "\n")
        #expect(lines.first?.hasPrefix("listening on nbds+unix:///?socket=") == true)
        #expect(lines.last == "listening on nbds://127.0.0.1:\(server.port)")
        for uri in [server.uri("alpha"), server.tcpURI("alpha")] {
            let outcome = try run("nbdinfo", [uri])
            #expect(outcome.status != 0, "\(outcome)")
        }
        #expect(try run("qemu-img", ["info", server.uri("alpha")]).status != 0)
        try server.stop()
        #expect(!server.program.error.contains("client connected"))
    }

    @Test func withoutTLSThereIsNone() throws {
        let server = try serve()
        let outcome = try run("nbdinfo", [uris(server)[1]])
        #expect(outcome.status != 0)
        #expect(!outcome.output.contains("\(Self.size)"))
        #expect(try must("nbdinfo", "--size", server.tcpURI("alpha")) == "\(Self.size)\n")
        try server.stop()
    }

    @Test func optionalTLSIsSaidAndExportsMayInsist() throws {
        try pool.create("secret", mebibyte)
        let server = try serve(
            "--tls=on", "--tls-psk", credentials.keys, "--tls-require-export", "secret",
            "--tls-require-export", "absent")
        #expect(try must("nbdinfo", "--size", server.uri("alpha")) == "\(Self.size)\n")
        #expect(try must("nbdinfo", "--size", uris(server)[3]) == "\(Self.size)\n")
        #expect(try run("nbdinfo", [server.uri("secret")]).status != 0)
        let secret = uris(server)[3].replacing("/alpha", with: "/secret")
        #expect(try must("nbdinfo", "--size", secret) == "\(mebibyte)\n")
        try server.stop()
        let log = server.program.error
        #expect(log.contains("TLS is optional (--tls=on)"))
        #expect(log.contains("tls=none: plaintext"))
        #expect(log.contains("no volume absent"))
    }

    /// Neither is it there itself for others, nor by what its snapshot is compared with.
    @Test func anExportThatInsistsIsNoContextOfOthers() throws {
        try pool.create("secret", mebibyte)
        try pool.snapshot("secret", "open")
        let server = try serve(
            "--tls=on", "--tls-psk", credentials.keys, "--tls-require-export", "secret")
        let context = "wafer:changed-since:secret"
        let secure = uris(server)[3].replacing("/alpha", with: "/open")
        #expect(try must("nbdinfo", "--json", secure).contains(context))
        #expect(try must("nbdinfo", "--map=\(context)", secure).contains("\(mebibyte)"))
        #expect(!(try must("nbdinfo", "--json", server.uri("open")).contains(context)))
        let client = try RawClient(server, "open", .structured, contexts: [context])
        try client.send(RawClient.header(.structured, RawClient.blockStatus, length: mebibyte))
        #expect(try client.answer(.structured).error == UInt32(EINVAL))
        // Nobody holds it.
        try pool.delete("secret")
        client.leave()
        try server.stop()
    }

    @Test func wrongProofsAreRefused() throws {
        let server = try serve(
            "--tls=require", "--tls-certificates", credentials["revoking"], "--tls-psk",
            credentials.keys, "--tls-verify-peer", "--tls-allow-dn", "CN=alice,O=Example")
        let base = "nbds://localhost:\(server.port)/alpha?"
        let keyed = "nbds://alice@localhost:\(server.port)/alpha?tls-psk-file="
        for uri in [
            base + "tls-certificates=\(credentials["bob"])",
            base + "tls-certificates=\(credentials["stranger"])",
            base + "tls-certificates=\(credentials["distrustful"])",
            keyed + credentials["wrong/keys.psk"],
        ] {
            let outcome = try run("nbdinfo", [uri])
            #expect(outcome.status != 0, "\(uri)")
        }
        #expect(try must("nbdinfo", "--size", uris(server)[0]) == "\(Self.size)\n")
        try server.stop()
        let failures = server.program.error.split(separator: "\n")
            .filter { $0.contains("TLS handshake failed: ") }
        #expect(failures.count == 4, "\(failures)")
        #expect(failures.allSatisfy { $0.contains("peer=127.0.0.1") || $0.contains("peer=[::1]") })
    }

    @Test func plaintextBehindSTARTTLSIsRefused() throws {
        let server = try serve("--tls=on", "--tls-psk", credentials.keys)
        let client = try RawClient(server)
        _ = try client.receive(18)
        let startTLS =
            Array("IHAVEOPT".utf8) + bigEndianBytes(UInt32(5)) + bigEndianBytes(UInt32(0))
        let list = Array("IHAVEOPT".utf8) + bigEndianBytes(UInt32(3)) + bigEndianBytes(UInt32(0))
        try client.send(bigEndianBytes(UInt32(3)) + startTLS + list)
        #expect(client.isHungUpOn())
        try server.stop()
        #expect(server.program.error.contains("in plaintext behind STARTTLS"))
    }

    @Test func handshakeThatDoesNotGoOnEnds() throws {
        let server = try serve("--tls=require", "--tls-psk", credentials.keys)
        let client = try RawClient(server)
        _ = try client.receive(18)
        try client.send(
            bigEndianBytes(UInt32(3)) + Array("IHAVEOPT".utf8) + bigEndianBytes(UInt32(5))
                + bigEndianBytes(UInt32(0)))
        _ = try client.receive(20)
        #expect(client.isHungUpOn())
        try server.stop()
        #expect(server.program.error.contains("the handshake took too long"))
    }

    // MARK: - Wrong commands

    @Test func wrongOptionsAreNamedAtTheStart() throws {
        let wrong: [([String], Int32, String)] = [
            (credentials.certificates, 64, "add --tls=require, or --tls=on"),
            (["--tls-psk", credentials.keys], 64, "add --tls=require, or --tls=on"),
            (["--tls=require"], 64, "needs --tls-certificates, --tls-psk or both"),
            (
                ["--tls=on", "--tls-psk", credentials.keys, "--tls-verify-peer"], 64,
                "--tls-verify-peer needs --tls-certificates"
            ),
            (
                ["--tls=on", "--tls-allow-dn", "CN=*"] + credentials.certificates, 64,
                "--tls-allow-dn needs --tls-verify-peer"
            ),
            (
                ["--tls=on", "--tls-certificates", credentials["expired"]], 1,
                "the certificate expired on 2020-01-01"
            ),
            (
                ["--tls=on", "--tls-certificates", credentials["outdated"], "--tls-verify-peer"],
                1, "outdated/ca-crl.pem: it was to be renewed by 2020-02-01"
            ),
            (
                ["--tls=on", "--tls-certificates", credentials["forged"], "--tls-verify-peer"],
                1, "forged/ca-crl.pem: nobody in"
            ),
            (
                ["--tls=on", "--tls-verify-peer", "--tls-allow-dn", "alice"]
                    + credentials.certificates, 1, "cannot let in \"alice\""
            ),
            (["--tls=on", "--tls-psk", credentials["none"]], 1, "no such file or directory"),
        ]
        for (options, status, words) in wrong {
            let outcome = try run(Program.wafer, ["serve", pool.path] + options)
            #expect(outcome.status == status, "\(options): \(outcome)")
            #expect(outcome.error.contains(words), "\(options): \(outcome)")
        }
    }
}
