// IP addresses and ranges of them, as numbers. An IPv4 address that reaches an IPv6 socket
// (::ffff:192.0.2.1) is the IPv4 address that it stands for, in clients and in ranges alike.

import Glibc

/// An IPv4 or IPv6 address.
package struct IPAddress: Hashable, Sendable {
    /// IPv4 in its IPv6 form, ::ffff:a.b.c.d: an address has one value, however it was written.
    private let bits: UInt128

    private static let ipv4Bits = 32
    private static let ipv6Bits = 128
    /// Bits before the IPv4 address in its IPv6 form, and what they are.
    private static let mappedPrefix = 96
    private static let mapped: UInt128 = 0xFFFF << 32

    package var isIPv4: Bool { bits >> 32 == 0xFFFF }

    private init(bits: UInt128) { self.bits = bits }

    /// In figures, as inet_pton reads them: no names, no zones, no octets left out.
    package init?(_ text: String) {
        var v4 = in_addr()
        var v6 = in6_addr()
        if inet_pton(AF_INET, text, &v4) == 1 {
            self.init(v4)
        } else if inet_pton(AF_INET6, text, &v6) == 1 {
            self.init(v6)
        } else {
            return nil
        }
    }

    init(_ address: in_addr) {
        bits = Self.mapped | UInt128(UInt32(bigEndian: address.s_addr))
    }

    init(_ address: in6_addr) {
        bits = withUnsafeBytes(of: address) { bytes in
            bytes.reduce(0) { $0 << 8 | UInt128($1) }
        }
    }

    /// The site that it probably belongs to: an IPv6 host has a whole /64 to choose addresses from.
    /// Neighbours on a link share theirs, so there it is the address itself.
    var site: IPAddress {
        let linkLocal = IPAddress(bits: 0xFE80 << 112)
        if isIPv4 || shares(10, with: linkLocal) { return self }
        return IPAddress(bits: bits & ~UInt128(UInt64.max))
    }

    private func shares(_ prefix: Int, with other: IPAddress) -> Bool {
        prefix == 0 || (bits ^ other.bits) >> UInt128(Self.ipv6Bits - prefix) == 0
    }

    /// The addresses that begin like one. IPv4 addresses are in IPv4 ranges alone: `::/0` is all of
    /// IPv6 and nothing else.
    package struct Range: Hashable, Sendable {
        private let first: IPAddress
        private let prefix: Int

        package enum Failure: Error, Equatable {
            case notAnAddress
            /// The prefix is not a number, or longer than the address.
            case badPrefix(most: Int)
            /// Bits behind the prefix are set: one of the two is not what was meant.
            case stray(prefix: Int)
        }

        /// ADDRESS, or ADDRESS/PREFIX.
        package init(parsing text: String) throws(Failure) {
            let parts = text.split(
                separator: "/", maxSplits: 1, omittingEmptySubsequences: false)
            guard let address = IPAddress(String(parts[0])) else { throw .notAnAddress }
            // Figures of the form that was written: ::ffff:10.0.0.0/104 is 10.0.0.0/8.
            let isShort = address.isIPv4 && !parts[0].contains(":")
            let most = isShort ? IPAddress.ipv4Bits : IPAddress.ipv6Bits
            var written = most
            if parts.count == 2 {
                guard (1...3).contains(parts[1].utf8.count),
                    parts[1].utf8.allSatisfy({ (UInt8(ascii: "0")...UInt8(ascii: "9")) ~= $0 }),
                    let number = Int(parts[1]), number <= most
                else { throw .badPrefix(most: most) }
                written = number
            }
            prefix = isShort ? written + IPAddress.mappedPrefix : written
            first = address
            let behind = IPAddress.ipv6Bits - prefix
            guard behind == 0 || address.bits << UInt128(prefix) == 0 else {
                throw .stray(prefix: written)
            }
        }

        package func contains(_ address: IPAddress) -> Bool {
            let isIPv4Range = first.isIPv4 && prefix >= IPAddress.mappedPrefix
            return address.isIPv4 == isIPv4Range && address.shares(prefix, with: first)
        }
    }
}
