// What a connection does over and over.

import ArgumentParser
import NBDProtocol

enum Operation: String, CaseIterable, ExpressibleByArgument {
    case randomRead = "randread"
    case randomWrite = "randwrite"
    case read
    case write
    /// A write at random, and a flush when it is answered; both together count as one.
    case writeAndFlush = "write+flush"

    var command: Command { self == .randomRead || self == .read ? .read : .write }
    var isSequential: Bool { self == .read || self == .write }
}
