// Volumes come and go while the pool is served.

import Foundation
import Testing

@Suite struct VolumeTests {
    @Test func exportsFollow() throws {
        let pool = try TestPool(volumes: [("alpha", 4 * mebibyte)])
        let server = try Server(pool)
        let alpha = try Client(server, "alpha")
        try alpha.write(0, pattern(1, 0, 65536))
        #expect(try Client.exports(of: server) == ["alpha"])

        try pool.create("beta", 8 * mebibyte)
        #expect(try Client.exports(of: server) == ["alpha", "beta"])
        let beta = try Client(server, "beta", via: .tcp)
        #expect(try beta.size() == 8 * mebibyte)
        try beta.write(0, pattern(2, 0, 65536))
        try pool.snapshot("beta", "gamma")
        #expect(try Client.exports(of: server) == ["alpha", "beta", "gamma"])
        #expect(same(try Client(server, "gamma").read(0, 65536), pattern(2, 0, 65536)))

        // In use: refused, and nothing happens to it.
        let refused = try pool.wafer(["volume", "delete", pool.path, "beta"])
        #expect(refused.status == 1 && refused.error.contains("in use"), "\(refused)")
        try beta.write(65536, pattern(3, 65536, 65536))
        #expect(same(try beta.read(0, 65536), pattern(2, 0, 65536)))
        #expect(try pool.volumes().first { $0.name == "beta" }?.connections == 1)
        try beta.disconnect()
        try pool.delete("beta")
        #expect(try Client.exports(of: server) == ["alpha", "gamma"])
        #expect(try code { _ = try Client(server, "beta") } != 0)

        // A new volume of that name is a new volume.
        try pool.create("beta", 2 * mebibyte)
        let another = try Client(server, "beta")
        #expect(try another.size() == 2 * mebibyte)
        #expect(isZero(try another.read(0, 2 << 20)))
        #expect(same(try Client(server, "gamma").read(0, 65536), pattern(2, 0, 65536)))
        #expect(isZero(try Client(server, "gamma").read(65536, 65536)))
        #expect(same(try alpha.read(0, 65536), pattern(1, 0, 65536)))

        for arguments in [
            ["create", pool.path, "alpha", "1MiB"], ["create", pool.path, "new", "1000"],
            ["snapshot", pool.path, "none", "new"], ["snapshot", pool.path, "alpha", "beta"],
            ["delete", pool.path, "none"],
        ] {
            let outcome = try pool.wafer(["volume"] + arguments)
            #expect(outcome.status != 0, "\(arguments)")
        }
        #expect(try Client.exports(of: server) == ["alpha", "beta", "gamma"])
        try server.stop()
        try pool.expectClean()
        let last = try Server(pool)
        #expect(try Client.exports(of: last) == ["alpha", "beta", "gamma"])
    }

    /// The blocks of a large volume come back in the background, also over a sudden end.
    @Test(arguments: Engine.allCases) func largeVolumesAreDeleted(engine: Engine) throws {
        let pool = try TestPool(
            data: 4 * gibibyte, metadata: 16 * mebibyte, volumes: [("large", gibibyte)])
        var server = try Server(pool, engine: engine)
        let client = try Client(server, "large")
        let batch = Batch(client)
        for index in 0..<UInt64(8) {
            try batch.zero(index * 64 * mebibyte, 64 * mebibyte, flags: Client.noHole)
        }
        #expect(try batch.wait().allSatisfy { $0 == 0 })
        try client.flush()
        #expect(try pool.status().dataBlocksUsed > 8 * 1024)
        try client.disconnect()
        try pool.delete("large")
        #expect(try Client.exports(of: server) == [])
        // Some of the way.
        usleep(20_000)
        server.kill()
        try pool.expectClean()
        server = try Server(pool, engine: engine)
        #expect(try eventually(within: 60) { try pool.status().deleting == 0 })
        try server.stop()
        try pool.expectClean()
        #expect(try pool.status().dataBlocksUsed == 1)
        #expect(try pool.dump().count == 1)
    }
}
