// What libnbd learns from the server before the first command.

import CLibNBD
import Foundation
import Testing

@Suite struct HandshakeTests {
    let pool: TestPool
    private static let size = 24 * mebibyte + 512

    init() throws { pool = try TestPool(volumes: [("alpha", Self.size), ("b-2.x@y", mebibyte)]) }

    private func expectFacts(_ client: Client, _ size: UInt64, readOnly: Bool = false) throws {
        let handle = client.handle
        #expect(try client.size() == size)
        #expect(nbd_is_read_only(handle) == (readOnly ? 1 : 0))
        #expect(nbd_can_flush(handle) == 1)
        #expect(nbd_can_fua(handle) == 1)
        #expect(nbd_can_trim(handle) == 1)
        #expect(nbd_can_zero(handle) == 1)
        #expect(nbd_can_cache(handle) == 1)
        #expect(nbd_can_multi_conn(handle) == 1)
        #expect(nbd_can_df(handle) == 1)
        #expect(nbd_can_fast_zero(handle) == 1)
        #expect(String(cString: nbd_get_protocol(handle)) == "newstyle-fixed")
    }

    @Test(arguments: Client.Transport.allCases) func facts(via transport: Client.Transport) throws {
        let server = try Server(pool)
        let client = try Client()
        try client.check(nbd_set_full_info(client.handle, true))
        try client.check(nbd_set_export_name(client.handle, "alpha"))
        try client.connect(server, via: transport)
        try expectFacts(client, Self.size)
        #expect(nbd_get_block_size(client.handle, Int32(LIBNBD_SIZE_MINIMUM)) == 512)
        #expect(nbd_get_block_size(client.handle, Int32(LIBNBD_SIZE_PREFERRED)) == 4096)
        #expect(nbd_get_block_size(client.handle, Int32(LIBNBD_SIZE_MAXIMUM)) == 32 << 20)
        func text(_ pointer: UnsafeMutablePointer<CChar>?) -> String? {
            defer { free(pointer) }
            return pointer.map { String(cString: $0) }
        }
        #expect(text(nbd_get_canonical_export_name(client.handle)) == "alpha")
        #expect(
            text(nbd_get_export_description(client.handle)) == "thin volume, data blocks of 64 KiB")
        try client.disconnect()
        #expect(try Client(server, "b-2.x@y", via: transport).size() == mebibyte)
    }

    @Test func exportsAndUnknownOnes() throws {
        let server = try Server(pool)
        #expect(try Client.exports(of: server) == ["alpha", "b-2.x@y"])
        // No default export where there are two.
        for name in ["beta", "", "alpha ", "ALPHA", String(repeating: "n", count: 4096)] {
            let refused = try code { _ = try Client(server, name) }
            #expect(refused != 0, "\"\(name)\" is served")
        }
        // The session goes on after a refusal.
        let client = try Client()
        try client.check(nbd_set_opt_mode(client.handle, true))
        try client.connect(server)
        try client.check(nbd_set_export_name(client.handle, "beta"))
        #expect(nbd_opt_info(client.handle) == -1)
        #expect(nbd_opt_go(client.handle) == -1)
        try client.check(nbd_set_export_name(client.handle, "alpha"))
        try client.check(nbd_opt_info(client.handle))
        #expect(try client.size() == Self.size)
        #expect(try client.list().count == 2)
        try client.check(nbd_opt_go(client.handle))
        #expect(isZero(try client.read(0, 4096)))
    }

    /// Without fixed newstyle there is only EXPORT_NAME, which is answered without a reply header
    /// and, unless the client declines them, with 124 zeroes.
    @Test(arguments: [0, UInt32(LIBNBD_HANDSHAKE_FLAG_NO_ZEROES)])
    func exportName(flags: UInt32) throws {
        let server = try Server(pool)
        for name in ["alpha", "beta"] {
            let client = try Client()
            try client.check(nbd_set_handshake_flags(client.handle, flags))
            try client.check(nbd_set_opt_mode(client.handle, true))
            try client.check(nbd_set_export_name(client.handle, name))
            try client.connect(server)
            guard name == "alpha" else {
                #expect(nbd_opt_go(client.handle) == -1)
                continue
            }
            try client.check(nbd_opt_go(client.handle))
            #expect(String(cString: nbd_get_protocol(client.handle)) == "newstyle")
            #expect(try client.size() == Self.size)
            #expect(nbd_can_multi_conn(client.handle) == 1)
            try client.write(4096, pattern(1, 4096, 512))
            #expect(same(try client.read(4096, 512), pattern(1, 4096, 512)))
        }
    }

    @Test func onlyVolumeIsTheDefault() throws {
        let pool = try TestPool(volumes: [("only", mebibyte)])
        let server = try Server(pool)
        let client = try Client()
        try client.check(nbd_set_full_info(client.handle, true))
        try client.connect(server)
        let name = nbd_get_canonical_export_name(client.handle)
        defer { free(name) }
        #expect(name.map { String(cString: $0) } == "only")
    }

    @Test(arguments: Engine.allCases) func readOnlyServer(engine: Engine) throws {
        do {
            let server = try Server(pool)
            let client = try Client(server, "alpha")
            try client.write(0, pattern(1, 0, 4096))
            try client.disconnect()
            try server.stop()
        }
        let before = try Data(contentsOf: URL(filePath: pool.path + "/metadata"))
        let server = try Server(pool, engine: engine, options: ["--read-only"])
        let client = try Client(server, "alpha")
        try expectFacts(client, Self.size, readOnly: true)
        #expect(try code { try client.write(0, pattern(2, 0, 4096)) } == EPERM)
        #expect(try code { try client.write(mebibyte, pattern(2, mebibyte, 4096)) } == EPERM)
        #expect(try code { try client.zero(0, 4096) } == EPERM)
        #expect(try code { try client.trim(0, 65536) } == EPERM)
        #expect(same(try client.read(0, 4096), pattern(1, 0, 4096)))
        try client.flush()
        try client.cache(0, 4096)
        let outcome = try pool.wafer(["volume", "create", pool.path, "new", "1MiB"])
        #expect(outcome.status == 1 && outcome.error.contains("read-only"), "\(outcome)")
        try client.disconnect()
        try server.stop()
        #expect(try Data(contentsOf: URL(filePath: pool.path + "/metadata")) == before)
    }
}
