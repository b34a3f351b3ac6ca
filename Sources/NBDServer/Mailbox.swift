// What other threads have for a reactor: accepted connections, and those that have to make room for
// others, the wish to stop, a nudge.
//
// The eventfd is written once for any number of nudges until the reactor acknowledges; it does so
// before it looks for what it was nudged about, so that nothing is overlooked.

import BlockIO
import Synchronization

final class Mailbox: Sendable {
    private struct Contents {
        var arrivals: [Arrival] = []
        var displaced: [Admission.Session] = []
        var isClosed = false
    }

    private let event: WakeEvent
    /// Readable when there is something.
    var descriptor: Int32 { event.fileDescriptor }
    private let isNudged = Atomic<Bool>(false)
    private let stops = Atomic<Bool>(false)
    private let carries = Atomic<Bool>(false)
    private let contents = Mutex(Contents())

    init() throws(ServerError) {
        do throws(DeviceError) { event = try WakeEvent() } catch {
            throw ServerError(operation: "make an eventfd", code: error.code)
        }
    }

    /// Makes the reactor run a turn. From any thread.
    func nudge() {
        if !isNudged.exchange(true, ordering: .sequentiallyConsistent) {
            event.signal()
        }
    }

    /// Called by the reactor when the descriptor is readable.
    func acknowledge() {
        event.clear()
        // Exchanged, so that what was left before a nudge that finds it true is seen here.
        _ = isNudged.exchange(false, ordering: .sequentiallyConsistent)
    }

    var shouldStop: Bool { stops.load(ordering: .acquiring) }

    /// The sockets are to stay open for the next server. Said before `stop`.
    var shouldCarry: Bool { carries.load(ordering: .acquiring) }
    func carry() { carries.store(true, ordering: .releasing) }

    func stop() {
        stops.store(true, ordering: .releasing)
        nudge()
    }

    /// Hands a connected socket over; false: the reactor has ended, and the caller keeps it.
    func deliver(_ arrival: Arrival) -> Bool {
        let isTaken = contents.withLock { contents in
            if !contents.isClosed { contents.arrivals.append(arrival) }
            return !contents.isClosed
        }
        if isTaken { nudge() }
        return isTaken
    }

    func takeArrivals() -> [Arrival] {
        contents.withLock { contents in
            let arrivals = contents.arrivals
            contents.arrivals.removeAll(keepingCapacity: true)
            return arrivals
        }
    }

    /// Has a connection of the reactor's ended. Its arrival has been delivered before.
    func displace(_ session: Admission.Session) {
        contents.withLock { $0.displaced.append(session) }
        nudge()
    }

    func takeDisplaced() -> [Admission.Session] {
        contents.withLock { contents in
            let displaced = contents.displaced
            contents.displaced.removeAll(keepingCapacity: true)
            return displaced
        }
    }

    /// The reactor ends: what is still in the box is its own to close.
    func close() -> [Arrival] {
        contents.withLock { $0.isClosed = true }
        return takeArrivals()
    }
}
