// What a server may take of the machine's memory, where nobody says. It is locked memory, and the
// machine may be small and be writing to this very server.

import Glibc

enum MemoryBudget {
    /// Bytes of memory that the machine has.
    private static let machine = sysconf(Int32(_SC_PHYS_PAGES)) * sysconf(Int32(_SC_PAGESIZE))

    /// Payloads of requests in flight.
    static let payloadBytes = share(8, from: 32 << 20, to: 256 << 20)
    /// Metadata blocks of 4 KiB.
    static let cacheBlocks = share(16, from: 4 << 20, to: 64 << 20) / 4096
    /// Pages of mapping tables, 4 KiB each: 32 MiB of a volume with blocks of 64 KiB.
    static let tablePages = share(16, from: 4 << 20, to: 256 << 20) / 4096

    private static func share(_ part: Int, from least: Int, to most: Int) -> Int {
        min(max(machine / part, least), most)
    }
}
