// What wafer serve is told about TLS.

import ArgumentParser
import Control
import NBDProtocol
import NBDServer

struct TLSArguments: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "TLS: off (default), on (clients may come in plaintext, too) or require.",
            valueName: "off|on|require"))
    var tls: TLSPolicy?
    @Option(
        help: ArgumentHelp(
            "Directory of server-cert.pem, server-key.pem, ca-cert.pem and maybe ca-crl.pem.",
            valueName: "dir"))
    var tlsCertificates: String?
    @Option(
        help: ArgumentHelp(
            "File of pre-shared keys, lines \"user:key\" as psktool writes them.",
            valueName: "file"))
    var tlsPsk: String?
    @Flag(help: "Let in only clients with a certificate that ca-cert.pem vouches for, or a key.")
    var tlsVerifyPeer = false
    @Option(
        parsing: .singleValue,
        help: ArgumentHelp(
            "Of those certificates only this name (repeatable); * stands for one value, \"CN=*\".",
            valueName: "name"))
    var tlsAllowDn: [String] = []
    @Option(
        parsing: .singleValue,
        help: ArgumentHelp(
            "An export for clients with TLS only, with --tls=on (repeatable).", valueName: "name"))
    var tlsRequireExport: [String] = []
    @Option(help: ArgumentHelp("GnuTLS's priority string.", valueName: "string"))
    var tlsPriority: String?
    @Option(
        help: ArgumentHelp(
            "TLS by the kernel: off, auto (default: where no client's new key can end the "
                + "connection) or always.", valueName: "off|auto|always"))
    var tlsKernel: KernelTLSUse?

    func validate() throws {
        guard let tls else {
            if let option = given {
                throw ValidationError(
                    "\(option) does nothing alone: add --tls=require, or --tls=on if clients may "
                        + "come in plaintext as well")
            }
            return
        }
        guard tls != .off else { return }
        if tlsCertificates == nil && tlsPsk == nil {
            throw ValidationError(
                "--tls=\(tls.rawValue) needs --tls-certificates, --tls-psk or both")
        }
        if tlsVerifyPeer && tlsCertificates == nil {
            throw ValidationError(
                "--tls-verify-peer needs --tls-certificates (clients with a key are always asked)")
        }
        if !tlsAllowDn.isEmpty && !tlsVerifyPeer {
            throw ValidationError(
                "--tls-allow-dn needs --tls-verify-peer: other clients are not asked for a name")
        }
    }

    /// An option that means something only with --tls.
    private var given: String? {
        if tlsCertificates != nil { return "--tls-certificates" }
        if tlsPsk != nil { return "--tls-psk" }
        if tlsVerifyPeer { return "--tls-verify-peer" }
        if !tlsAllowDn.isEmpty { return "--tls-allow-dn" }
        if !tlsRequireExport.isEmpty { return "--tls-require-export" }
        if tlsPriority != nil { return "--tls-priority" }
        return tlsKernel == nil ? nil : "--tls-kernel"
    }

    var options: TLSOptions? {
        guard let tls, tls != .off else { return nil }
        var options = TLSOptions(tls)
        options.credentials.certificates = tlsCertificates
        options.credentials.presharedKeys = tlsPsk
        options.credentials.verifiesClients = tlsVerifyPeer
        options.credentials.allowedNames = tlsAllowDn
        options.credentials.priority = tlsPriority
        options.requiredExports = Set(tlsRequireExport)
        if let tlsKernel { options.kernel = tlsKernel }
        return options
    }
}

extension TLSPolicy: ExpressibleByArgument {}
extension KernelTLSUse: ExpressibleByArgument {}
