// Started without standard descriptors, as by a supervisor that closes them.

import Foundation
import Testing

@Suite struct DescriptorTests {
    /// A pool in memory, where any write to its files would succeed.
    @Test(arguments: ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    func closedAtTheStart(redirections: String) throws {
        let pool = try TestPool(inMemory: true, volumes: [("vol", mebibyte)])
        let before = try Data(contentsOf: URL(filePath: pool.path + "/data"))
        let server = try Program(
            "/bin/sh",
            ["-c", "exec \"$@\" \(redirections)", "sh", Program.wafer, "serve", pool.path],
            in: pool.scratch)
        let uri = "nbd+unix:///vol?socket=\(pool.path)/nbd.sock"
        #expect(eventually { access(pool.path + "/nbd.sock", F_OK) == 0 })
        let info = try Program.run("nbdinfo", ["--size", uri], in: pool.scratch)
        #expect(info.output == "\(mebibyte)\n", "\(info)")
        server.signal(SIGTERM)
        #expect(server.wait().status == 0)
        try pool.expectClean()
        #expect(try Data(contentsOf: URL(filePath: pool.path + "/data")) == before)
    }
}
