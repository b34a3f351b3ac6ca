// Programs that people use with NBD servers.

import Foundation
import Testing

@Suite struct OtherClientsTests {
    private func run(_ pool: TestPool, _ tool: String, _ arguments: String...) throws -> Outcome {
        let outcome = try Program.run(tool, arguments, in: pool.scratch)
        try #require(outcome.status == 0, "\(tool) \(arguments): \(outcome)")
        return outcome
    }

    private func json(_ text: String) throws -> [String: Any] {
        let value = try JSONSerialization.jsonObject(with: Data(text.utf8))
        return try #require(value as? [String: Any])
    }

    /// A file of `size` bytes with data in some places and holes between.
    private func sparseFile(_ pool: TestPool, size: UInt64) throws -> String {
        let path = pool.scratch.file("source")
        #expect(FileManager.default.createFile(atPath: path, contents: nil))
        let file = try FileHandle(forUpdating: URL(filePath: path))
        try file.truncate(atOffset: size)
        for (index, length) in [512, 4096, 65536, 1 << 20, 3 << 20, 12288].enumerated() {
            let offset = UInt64(index) * size / 6 / 512 * 512
            try file.seek(toOffset: offset)
            try file.write(contentsOf: Data(pattern(UInt64(index + 1), offset, length)))
        }
        try file.close()
        return path
    }

    @Test func nbdinfo() throws {
        let pool = try TestPool(volumes: [("alpha", 5 * mebibyte), ("beta", 7 * mebibyte)])
        let server = try Server(pool)
        for uri in [server.uri("alpha"), server.tcpURI("alpha")] {
            let info = try json(run(pool, "nbdinfo", "--json", uri).output)
            #expect(info["protocol"] as? String == "newstyle-fixed")
            let exports = try #require(info["exports"] as? [[String: Any]])
            #expect(exports.count == 1)
            let export = exports[0]
            #expect(export["export-name"] as? String == "alpha")
            #expect(export["description"] as? String == "thin volume, data blocks of 64 KiB")
            #expect(export["export-size"] as? Int == 5 << 20)
            let can = [
                "flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "cache", "df",
            ]
            for flag in can {
                #expect(export["can_" + flag] as? Bool == true, "\(flag)")
            }
            for flag in ["is_read_only", "is_rotational"] {
                #expect(export[flag] as? Bool == false, "\(flag)")
            }
            #expect(export["block_size_minimum"] as? Int == 512)
            #expect(export["block_size_maximum"] as? Int == 32 << 20)
            #expect(try run(pool, "nbdinfo", "--size", uri).output == "\(5 << 20)\n")
        }
        let list = try json(run(pool, "nbdinfo", "--list", "--json", server.uri("")).output)
        let names = (list["exports"] as? [[String: Any]])?.map { $0["export-name"] as? String }
        #expect(names == ["alpha", "beta"])
        let text = try run(pool, "nbdinfo", "--list", server.tcpURI("")).output
        #expect(text.contains("export=\"alpha\"") && text.contains("export=\"beta\""), "\(text)")
        let unknown = try Program.run("nbdinfo", [server.uri("gamma")], in: pool.scratch)
        #expect(unknown.status != 0)
    }

    @Test(arguments: Engine.allCases) func nbdcopy(engine: Engine) throws {
        let size = 96 * mebibyte + 4608
        let pool = try TestPool(volumes: [("vol", size)])
        let server = try Server(pool, engine: engine)
        let source = try sparseFile(pool, size: size)
        let copy = pool.scratch.file("copy")
        for uri in [server.uri("vol"), server.tcpURI("vol")] {
            _ = try run(pool, "nbdcopy", "--flush", source, uri)
            let mapped = try pool.volumes()[0].mappedBytes
            #expect(mapped > 4 * mebibyte && mapped < 6 * mebibyte, "\(mapped) bytes are mapped")
            _ = try run(pool, "nbdcopy", uri, copy)
            _ = try run(pool, "cmp", source, copy)
            try FileManager.default.removeItem(atPath: copy)
        }
        // From one volume to another, and with all of it written.
        try pool.create("other", size)
        _ = try run(
            pool, "nbdcopy", "--allocated", "--flush", server.uri("vol"), server.tcpURI("other"))
        _ = try run(pool, "nbdcopy", server.tcpURI("other"), copy)
        _ = try run(pool, "cmp", source, copy)
        try server.stop()
        try pool.expectClean()
    }

    @Test(arguments: Engine.allCases) func fio(engine: Engine) throws {
        let pool = try TestPool(volumes: [("vol", 32 * mebibyte)])
        let server = try Server(pool, engine: engine)
        // Overlapping writes are verified, too, as long as they are not in flight together.
        let jobs = [
            ["--rw=randwrite", "--bs=4k", "--blockalign=512", "--serialize_overlap=1"],
            ["--rw=write", "--bs=1m"],
            ["--rw=randrw", "--bsrange=512-96k"],
        ]
        for (index, job) in jobs.enumerated() {
            let arguments = [
                "--name=job\(index)", "--ioengine=nbd", "--uri=\(server.uri("vol"))",
                "--size=24m", "--io_size=8m", "--iodepth=32", "--fsync=64", "--verify=crc32c",
                "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--randrepeat=0",
                "--allrandrepeat=0",
            ]
            let outcome = try Program.run("fio", arguments + job, in: pool.scratch)
            #expect(outcome.status == 0 && outcome.output.contains("err= 0"), "\(outcome)")
            if index == 0 { try pool.snapshot("vol", "snap") }
        }
        try server.stop()
        try pool.expectClean()
    }

    @Test func nbdClientLists() throws {
        let names = ["alpha", "beta", String(repeating: "x", count: 64)]
        let pool = try TestPool(volumes: names.map { ($0, mebibyte) })
        let server = try Server(pool)
        let outcome = try run(pool, "nbd-client", "-l", "127.0.0.1", "\(server.port)")
        for name in names {
            #expect(outcome.output.split(separator: "\n").contains { $0 == name }, "\(outcome)")
        }
        #expect(try Client.exports(of: server).count == 3)
    }

    @Test(arguments: Engine.allCases) func qemu(engine: Engine) throws {
        let size = 48 * mebibyte
        let pool = try TestPool(volumes: [("vol", size)])
        let server = try Server(pool, engine: engine)
        let uri = server.uri("vol")
        let info = try json(run(pool, "qemu-img", "info", "--output=json", "-f", "raw", uri).output)
        #expect(info["virtual-size"] as? Int == Int(size))

        let source = try sparseFile(pool, size: size)
        _ = try run(pool, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
        for uri in [uri, server.tcpURI("vol")] {
            let same = try run(
                pool, "qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
            #expect(same.output.contains("identical"), "\(same)")
        }
        let commands = [
            "write -P 0x5a 1536 70000", "write -f -P 0xa5 20M 4k", "read -P 0x5a 1536 70000",
            "write -z 20M 1k", "read -P 0 20M 1k", "read -P 0xa5 20972544 3k", "write -z -u 20M 1M",
            "read -P 0 20M 1M", "discard 0 1M", "flush", "aio_write -P 7 30M 1M",
            "aio_write -P 8 31M 1M", "aio_flush", "read -P 8 31M 1M",
        ]
        let outcome = try Program.run(
            "qemu-io", ["-f", "raw"] + commands.flatMap { ["-c", $0] } + [uri], in: pool.scratch)
        #expect(outcome.status == 0, "\(outcome)")
        #expect(!outcome.output.contains("failed"), "\(outcome)")
        let changed = try Program.run(
            "qemu-img", ["compare", "-f", "raw", "-F", "raw", source, uri], in: pool.scratch)
        #expect(changed.status == 1 && changed.output.contains("mismatch"), "\(changed)")
        try server.stop()
        try pool.expectClean()
    }
}
