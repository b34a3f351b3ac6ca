// Files of certificates and keys: each that is missing or bad is named, before anything is served.

import Glibc
import Testing

@testable import NBDServer

@Suite struct TLSCredentialsTests {
    private func message(_ body: () throws -> Void) -> String {
        do {
            try body()
            return "nothing is wrong"
        } catch { return "\(error)" }
    }

    private func file(_ contents: String, _ name: String, _ directory: TestDirectory) throws
        -> String
    {
        let path = "\(directory.path)/\(name)"
        let file = try #require(fopen(path, "w"))
        fputs(contents, file)
        fclose(file)
        chmod(path, 0o600)
        return path
    }

    private func keys(_ contents: String) throws -> TLSCredentials {
        let directory = TestDirectory()
        var settings = TLSSettings()
        settings.presharedKeys = try file(contents, "keys.psk", directory)
        return try TLSCredentials(settings)
    }

    @Test func keysAreRead() throws {
        let key = String(repeating: "0f", count: 32)
        #expect(try keys("alice:\(key)\nbob:with:colons:\(key)\n").warnings == [])
        #expect(try keys("#c3BC3A:\(key)\n").warnings == [])
        let longest = String(repeating: "a", count: 128)
        #expect(try keys("\(longest):\(key)\n").warnings == [])
    }

    @Test(arguments: [
        ("", "there is no key"), ("alice\n", "line 1 is not USER:KEY"),
        (":00112233445566778899aabbccddeeff\n", "line 1 is not USER:KEY"),
        ("alice:xyz\n", "hexadecimal"), ("alice:\n", "hexadecimal"),
        ("alice:+0112233445566778899aabbccddeeff0\n", "hexadecimal"),
        ("alice:0011\n", "16 to 64 bytes"),
        (
            "a:00112233445566778899aabbccddeeff\na:00112233445566778899aabbccddeeff\n",
            "line 2 has a user who has a key already"
        ),
        (
            "a:b:00112233445566778899aabbccddeeff\n#613A62:00112233445566778899aabbccddeeff\n",
            "line 2 has a user who has a key already"
        ),
        ("#61g2:00112233445566778899aabbccddeeff\n", "line 1 has # and no user in hexadecimal"),
        ("#616:00112233445566778899aabbccddeeff\n", "line 1 has # and no user in hexadecimal"),
        ("#6100:00112233445566778899aabbccddeeff\n", "line 1 has # and no user in hexadecimal"),
        ("#:00112233445566778899aabbccddeeff\n", "line 1 has # and no user in hexadecimal"),
        (
            String(repeating: "a", count: 129) + ":00112233445566778899aabbccddeeff\n",
            "line 1 has a user of 129 bytes, more than 128"
        ),
    ]) func badKeysAreNamed(contents: String, expected: String) {
        #expect(message { _ = try keys(contents) }.contains(expected))
    }

    @Test func filesThatEveryoneReadsAreMentioned() throws {
        let directory = TestDirectory()
        var settings = TLSSettings()
        let path = try file("a:00112233445566778899aabbccddeeff\n", "keys.psk", directory)
        chmod(path, 0o644)
        settings.presharedKeys = path
        #expect(try TLSCredentials(settings).warnings.first?.contains(path) == true)
    }

    @Test func badDirectoriesAreNamed() throws {
        #expect(
            message { _ = try TestCredentials.server("none") }
                .contains("none/server-cert.pem: no such file or directory"))
        #expect(
            message { _ = try TestCredentials.server("expired") }
                .contains("expired/server-cert.pem: the certificate expired on 2020-01-01"))
        let directory = TestDirectory()
        func copy(_ from: String, _ name: String) throws {
            let bytes = try SecretFile.read("\(TestCredentials.path)/\(from)")
            _ = try file(String(decoding: bytes, as: UTF8.self), name, directory)
        }
        var settings = TLSSettings()
        settings.certificates = directory.path
        settings.verifiesClients = true
        try copy("server/server-cert.pem", "server-cert.pem")
        #expect(
            message { _ = try TLSCredentials(settings) }.contains("server-key.pem: no such file"))
        try copy("alice/client-key.pem", "server-key.pem")
        #expect(
            message { _ = try TLSCredentials(settings) }.contains(
                "use \(directory.path)/server-key.pem"))
        try copy("server/server-cert.pem", "server-key.pem")
        #expect(
            message { _ = try TLSCredentials(settings) }.contains(
                "server-key.pem: there is no private key in it"))
        try copy("server/server-key.pem", "server-key.pem")
        #expect(message { _ = try TLSCredentials(settings) }.contains("ca-cert.pem: no such file"))
        try copy("alice/client-key.pem", "ca-cert.pem")
        #expect(message { _ = try TLSCredentials(settings) }.contains("no certificate in it"))
        try copy("server/ca-cert.pem", "ca-cert.pem")
        try copy("alice/client-key.pem", "ca-crl.pem")
        #expect(
            message { _ = try TLSCredentials(settings) }.contains(
                "ca-crl.pem: there is no list of revoked certificates in it"))
        try copy("outdated/ca-crl.pem", "ca-crl.pem")
        #expect(
            message { _ = try TLSCredentials(settings) }.contains(
                "ca-crl.pem: it was to be renewed by 2020-02-01"))
        try copy("forged/ca-crl.pem", "ca-crl.pem")
        #expect(message { _ = try TLSCredentials(settings) }.contains("nobody in "))
        try copy("revoking/ca-crl.pem", "ca-crl.pem")
        _ = try TLSCredentials(settings)
        unlink("\(directory.path)/ca-crl.pem")
        _ = try TLSCredentials(settings)
        // There is to be a list, and it is not there.
        symlink("nowhere", "\(directory.path)/ca-crl.pem")
        #expect(message { _ = try TLSCredentials(settings) }.contains("ca-crl.pem: no such file"))
    }

    @Test func badPriorityIsNamed() {
        #expect(
            message { _ = try TestCredentials.server { $0.priority = "NORMAL:+NOSUCH" } }
                .contains("+NOSUCH"))
    }

    /// GnuTLS says so only to a session.
    @Test(arguments: ["-CURVE-ALL", "-GROUP-ALL"]) func priorityWithoutGroupsIsNamed(end: String) {
        let problem = message {
            _ = try TestCredentials.server { $0.priority = "NORMAL:-VERS-ALL:+VERS-TLS1.3:" + end }
        }
        #expect(problem.contains("\(end): "))
        #expect(problem.contains("--tls-priority"))
    }

    @Test(arguments: ["", "alice", "*", "CN=alice,Example", "CN=alice, O=Example", "=alice"])
    func whatIsNoNameIsNamed(name: String) {
        #expect(
            message { _ = try TestCredentials.server { $0.allowedNames = [name] } }
                .contains("cannot let in \"\(name)\""))
    }

    @Test func namesMatchPartByPart() throws {
        let pattern = try #require(NamePattern("CN=*,O=Example,C=DE"))
        #expect(pattern.matches("CN=alice,O=Example,C=DE"))
        #expect(pattern.matches("CN=a\\,b,O=Example,C=DE"))
        #expect(!pattern.matches("CN=alice\\,O=Example,C=DE"))
        #expect(!pattern.matches("CN=alice,O=Example"))
        #expect(!pattern.matches("CN=alice,O=Example,C=DE,L=Bonn"))
        #expect(!pattern.matches("UID=alice,O=Example,C=DE"))
        #expect(!pattern.matches("CN=alice+UID=1,O=Example,C=DE"))
        let part = try #require(NamePattern("CN=al*"))
        #expect(!part.matches("CN=alice"))
        #expect(part.matches("CN=al*"))
        #expect(try !#require(NamePattern("CN=a,O=b")).matches("CN=a+O=b"))
        #expect(try #require(NamePattern("CN=a+O=*")).matches("CN=a+O=b"))
        // It makes one character with what follows it.
        let joiner = "\u{600}"
        let two = try #require(NamePattern("CN=*,O=Example"))
        #expect(two.matches("CN=x\(joiner),O=Example"))
        #expect(!two.matches("CN=x\(joiner)\\,O=Example"))
        #expect(!two.matches("CN=bob\(joiner),OU=Guest,O=Example"))
        #expect(!two.matches("CN=bob\(joiner)+UID=1,O=Example"))
        // The Kelvin sign is equal to K for people.
        #expect(try !#require(NamePattern("CN=K")).matches("CN=\u{212A}"))
    }
}
