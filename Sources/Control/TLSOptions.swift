// What an operator says about TLS, and what becomes of it.

import Logging
import NBDProtocol
import NBDServer

public struct TLSOptions: Sendable {
    /// Not `.off`.
    public var policy: TLSPolicy
    public var credentials = TLSSettings()
    public var requiredExports: Set<String> = []
    public var kernel = KernelTLSUse.auto

    public init(_ policy: TLSPolicy) { self.policy = policy }

    /// Reads certificates and keys. Without a logger: to see whether they can be.
    func configuration(_ logger: Logger?) throws(ControlError) -> TLSConfiguration {
        do throws(ServerError) {
            let credentials = try TLSCredentials(credentials)
            for warning in credentials.warnings { logger?.warning("\(warning)") }
            if policy == .on {
                logger?.warning(
                    """
                    TLS is optional (--tls=on): clients may come in plaintext, and who controls \
                    the network can make them; --tls=require ends that
                    """)
            }
            if self.credentials.certificates != nil && !self.credentials.verifiesClients {
                logger?.warning(
                    """
                    clients with TLS need neither a certificate nor a key: anybody who reaches the \
                    server may connect, encrypted; --tls-verify-peer ends that
                    """)
            }
            return TLSConfiguration(
                credentials: credentials, policy: policy, requiredExports: requiredExports,
                kernel: kernel)
        } catch { throw ControlError(.device, error.description) }
    }
}
