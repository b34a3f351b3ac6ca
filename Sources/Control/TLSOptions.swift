// What an operator says about TLS, and what becomes of it.

import Logging
import NBDProtocol
import NBDServer

public struct TLSOptions: Sendable {
    public enum Use: String, Sendable, CaseIterable {
        /// Clients may begin with TLS, and need not.
        case on
        /// Nothing is served without TLS.
        case require
    }
    public enum Kernel: String, Sendable, CaseIterable {
        case off, auto, always
    }

    public var use: Use
    public var credentials = TLSSettings()
    public var requiredExports: Set<String> = []
    public var kernel = Kernel.auto

    public init(_ use: Use) { self.use = use }

    /// Reads certificates and keys.
    func configuration(_ logger: Logger) throws(ControlError) -> TLSConfiguration {
        do throws(ServerError) {
            let credentials = try TLSCredentials(credentials)
            for warning in credentials.warnings { logger.warning("\(warning)") }
            if use == .on {
                logger.warning(
                    """
                    TLS is optional (--tls=on): clients may come in plaintext, and who controls \
                    the network can make them; --tls=require ends that
                    """)
            }
            return TLSConfiguration(
                credentials: credentials, policy: use == .on ? .on : .require,
                requiredExports: requiredExports, kernel: KernelTLSUse(rawValue: kernel.rawValue)!)
        } catch { throw ControlError(.device, error.description) }
    }
}
