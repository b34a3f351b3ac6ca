// A socket pair between a client and the server: what each has sent and the other not yet taken.

final class Wire {
    var toServer: [UInt8] = []
    var toClient: [UInt8] = []
    /// The client has closed its end: what it sent can still be read, what it is sent is lost.
    var isClosedByClient = false
    /// Its end was reset: nothing that is left of what it sent is read either.
    var isReset = false
    var isClosedByServer = false
}
