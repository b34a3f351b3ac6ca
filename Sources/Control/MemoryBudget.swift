// What a server may take of the machine's memory, where nobody says. It is locked memory, and the
// machine may be small and be writing to this very server.

import Glibc
import NBDServer

enum MemoryBudget {
    /// Bytes of memory that the machine has.
    private static let machine = sysconf(Int32(_SC_PHYS_PAGES)) * sysconf(Int32(_SC_PAGESIZE))

    /// Payloads of requests in flight.
    static let payloadBytes = share(8, from: 32 << 20, to: Server.Limits().payloadBytes)
    /// The map: metadata blocks and mapping tables.
    static let cacheBytes = share(8, from: 8 << 20, to: 320 << 20)

    /// What of the map's memory goes to metadata blocks. A mapping takes 8 bytes and a little of a
    /// table, 16 and more of a metadata block, and a table is read without the lock.
    static func metadataBytes(of cacheBytes: Int) -> Int { cacheBytes / 5 }

    private static func share(_ part: Int, from least: Int, to most: Int) -> Int {
        min(max(machine / part, least), most)
    }
}
