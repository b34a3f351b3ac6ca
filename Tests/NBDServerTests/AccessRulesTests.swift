// Rules: what they may say, whom they fit, and which of them decides.

import NBDServer
import Testing

@Suite struct AccessRulesTests {
    private func client(_ address: String) throws -> Peer.Identity {
        .internet(try #require(IPAddress(address), "\(address)"))
    }

    private func fits(_ rule: String, _ identity: Peer.Identity) throws -> Bool {
        try [AccessRule(.deny, rule)].decision(for: identity) == .deny
    }

    @Test func ranges() throws {
        for (rule, inside, outside) in [
            ("192.0.2.1", ["192.0.2.1", "::ffff:192.0.2.1"], ["192.0.2.10", "192.0.2.2", "::1"]),
            ("192.0.2.1/32", ["192.0.2.1"], ["192.0.2.0", "192.0.2.11"]),
            (
                "10.0.0.0/8", ["10.0.0.0", "10.255.255.255", "::ffff:10.1.2.3"],
                ["11.0.0.0", "9.255.255.255", "100.0.0.1", "::a00:1"]
            ),
            ("10.1.2.128/25", ["10.1.2.128", "10.1.2.255"], ["10.1.2.127", "10.1.3.128"]),
            ("10.1.2.0/31", ["10.1.2.0", "10.1.2.1"], ["10.1.2.2"]),
            ("0.0.0.0/0", ["0.0.0.0", "255.255.255.255", "::ffff:1.2.3.4"], ["::1", "::"]),
            ("128.0.0.0/1", ["128.0.0.1", "255.0.0.1"], ["127.255.255.255"]),
            ("::/0", ["::", "::1", "fe80::1", "ffff::"], ["1.2.3.4", "::ffff:1.2.3.4"]),
            ("2001:db8::1", ["2001:db8::1", "2001:0DB8:0:0::1"], ["2001:db8::10", "2001:db8::"]),
            ("2001:db8::1/128", ["2001:db8::1"], ["2001:db8::2"]),
            (
                "2001:db8::/32", ["2001:db8::", "2001:db8:ffff::1"],
                ["2001:db7:ffff::", "2001:db9::", "32.1.13.184"]
            ),
            ("2001:db8::/33", ["2001:db8:7fff::"], ["2001:db8:8000::"]),
            ("fe80::/10", ["fe80::1", "febf::1"], ["fec0::1"]),
            ("::ffff:192.0.2.1", ["192.0.2.1", "::ffff:192.0.2.1"], ["192.0.2.2"]),
            ("::ffff:10.0.0.0/104", ["10.200.0.1"], ["11.0.0.1"]),
            ("::ffff:0:0/96", ["10.200.0.1", "0.0.0.0"], ["::1"]),
        ] {
            for address in inside { #expect(try fits(rule, client(address)), "\(rule) \(address)") }
            for address in outside {
                #expect(try !fits(rule, client(address)), "\(rule) \(address)")
            }
            #expect(try !fits(rule, .unix(user: 0, groups: [0])))
            #expect(try !fits(rule, .unknown))
        }
    }

    @Test func kinds() throws {
        let tcp = try client("192.0.2.7")
        let unix = Peer.Identity.unix(user: 1000, groups: [100, 27])
        for (rule, ofTCP, ofUnix, ofUnknown) in [
            ("any", true, true, true), ("tcp", true, false, false), ("unix", false, true, false),
            ("uid:1000", false, true, false), ("uid:100", false, false, false),
            ("uid:10000", false, false, false), ("uid:0", false, false, false),
            ("uid:root", false, false, false), ("gid:100", false, true, false),
            ("gid:27", false, true, false), ("gid:1000", false, false, false),
            ("gid:root", false, false, false),
        ] {
            #expect(try fits(rule, tcp) == ofTCP, "\(rule)")
            #expect(try fits(rule, unix) == ofUnix, "\(rule)")
            #expect(try fits(rule, .unknown) == ofUnknown, "\(rule)")
        }
        #expect(try fits("uid:root", .unix(user: 0, groups: [0])))
        #expect(try fits("gid:root", .unix(user: 7, groups: [5, 0])))
    }

    @Test func badRules() {
        for (rule, words) in [
            ("", "ADDRESS"), ("10", "ADDRESS"), ("10.0.0", "ADDRESS"), ("10.0.0.0.0", "ADDRESS"),
            ("10.0.0.256", "ADDRESS"), ("010.0.0.1", "ADDRESS"), ("10.0.0.1 ", "ADDRESS"),
            ("localhost", "ADDRESS"), ("Any", "ADDRESS"), ("fe80::1%lo", "ADDRESS"),
            ("[::1]", "ADDRESS"), ("::1::", "ADDRESS"), ("/8", "ADDRESS"), ("10/8", "ADDRESS"),
            ("10.0.0.0/", "0 to 32"), ("10.0.0.0/33", "0 to 32"), ("10.0.0.0/-1", "0 to 32"),
            ("10.0.0.0/+8", "0 to 32"), ("10.0.0.0/8/8", "0 to 32"), ("10.0.0.0/0008", "0 to 32"),
            ("10.0.0.0/255.0.0.0", "0 to 32"), ("10.0.0.0/٨", "0 to 32"), ("::/129", "0 to 128"),
            ("::/x", "0 to 128"), ("10.0.0.1/8", "more than 8 bits"),
            ("0.0.0.1/0", "more than 0 bits"), ("10.1.2.129/25", "more than 25 bits"),
            ("2001:db8::1/64", "more than 64 bits"), ("::1/0", "more than 0 bits"),
            ("uid:", "no user"), ("uid:-1", "no user"), ("uid:4294967295", "no user"),
            ("uid:4294967296", "no user"), ("uid:no such user", "no user"), ("gid:", "no group"),
            ("gid:4294967295", "no group"), ("gid:nosuchgroup", "no group"), ("pid:1", "ADDRESS"),
        ] {
            let failure = #expect(throws: AccessRuleError.self, "\(rule)") {
                try AccessRule(.allow, rule)
            }
            #expect(failure?.description.contains(words) == true, "\(rule): \(failure as Any)")
        }
    }

    @Test func theFirstThatFitsDecides() throws {
        let near = try client("10.1.2.3")
        let far = try client("192.0.2.1")
        let rules = try [
            AccessRule(.deny, "10.1.2.3"), AccessRule(.allow, "10.0.0.0/8"),
            AccessRule(.allowReadOnly, "tcp"),
        ]
        #expect(rules.decision(for: near) == .deny)
        #expect(try rules.decision(for: client("10.1.2.4")) == .allow)
        #expect(rules.decision(for: far) == .allowReadOnly)
        #expect(rules.reversed().decision(for: near) == .allowReadOnly)
        // Whom none fits.
        #expect(rules.decision(for: .unix(user: 0, groups: [])) == .deny)
        #expect(rules.decision(for: .unknown) == .deny)
        #expect(try [AccessRule(.allowReadOnly, "unix")].decision(for: far) == .deny)
        #expect(try [AccessRule(.deny, "unix")].decision(for: far) == .allow)
        #expect([AccessRule]().decision(for: .unknown) == .allow)
    }
}
