// What takes too long: handshakes, clients that stand still, idle ones, and the stop. Time is
// counted in ticks, which come only while something has a deadline.

import Glibc

extension Reactor {
    /// While others wait for memory, a client that holds some has to move this much in the stall
    /// timeout, on its way out, too.
    private static let leastProgress: UInt64 = 1 << 20

    static func nanoseconds(_ duration: Duration) -> UInt64 {
        let (seconds, attoseconds) = duration.components
        return UInt64(max(seconds, 0)) * 1_000_000_000 + UInt64(max(attoseconds, 0)) / 1_000_000_000
    }

    /// Ticks that last at least as long.
    func ticks(_ duration: Duration) -> UInt64 {
        Self.nanoseconds(duration) / tickNanoseconds + 2
    }

    func startTicking() {
        guard !isTicking else { return }
        isTicking = true
        queue.timeout(nanoseconds: tickNanoseconds, tag: Tag(.tick).rawValue)
    }

    func ticked() {
        isTicking = false
        tick += 1
        memoryIsShort = buffers.takeShortage()
        var goesOn = stopDeadline != nil || !farewells.isEmpty
        for index in 0..<capacity {
            guard let connection = connections[index] else { continue }
            if watch(connection) { goesOn = true }
        }
        farewells.watch(tick: tick, stopDeadline: stopDeadline)
        if goesOn || memoryIsShort { startTicking() }
    }

    /// Ends the connection if one of its deadlines has passed; true if it has any.
    private func watch(_ connection: Connection) -> Bool {
        if let stopDeadline, tick >= stopDeadline, connection.phase != .closed {
            end(connection, "the server stopped before the client took its replies")
        }
        switch connection.phase {
        case .handshake:
            if connection.isWaiting {
                // It is not the client that is slow.
                connection.handshakeDeadline += 1
            } else if tick >= connection.handshakeDeadline {
                end(connection, "the handshake took too long")
            }
            return true
        case .draining:
            let isInTheWay = memoryIsShort && connection.isHoardingMemory
            if hasStalled(connection, unlessMoved: isInTheWay ? Self.leastProgress : 1),
                connection.transmission?.inFlight ?? 0 == 0
            {
                end(connection, "the client does not take its last replies")
            }
            return true
        case .transmission:
            let canBeIdle = watchIdleness(of: connection)
            guard connection.phase == .transmission, memoryIsShort,
                connection.isHoardingMemory
            else {
                connection.progress.restart(connection.moved, at: tick)
                return canBeIdle
            }
            if hasStalled(connection, unlessMoved: Self.leastProgress) {
                end(connection, "the client holds memory that others wait for, and does not move")
            }
            return true
        case .closed:
            return false
        }
    }

    /// Ends the connection if it has been idle too long; true if it can be.
    private func watchIdleness(of connection: Connection) -> Bool {
        guard let idleTimeout = shared.configuration.limits.idleTimeout else { return false }
        if connection.transmission!.inFlight > 0 {
            connection.activity.restart(connection.moved, at: tick)
        } else if connection.activity.hasStood(
            still: ticks(idleTimeout), connection.moved, at: tick)
        {
            end(connection, "the client was idle for too long")
        }
        return true
    }

    private func hasStalled(_ connection: Connection, unlessMoved least: UInt64) -> Bool {
        connection.progress.hasStood(
            still: ticks(shared.configuration.limits.stallTimeout), connection.moved, at: tick,
            unlessMoved: least)
    }

    func end(_ connection: Connection, _ problem: String) {
        connection.breakOff(problem)
        mark(connection)
    }
}

/// Since when a connection has not moved, as far as somebody looked.
struct Movement {
    private var moved: UInt64 = 0
    private var since: UInt64

    init(at tick: UInt64) { since = tick }

    mutating func restart(_ moved: UInt64, at tick: UInt64) {
        self.moved = moved
        since = tick
    }

    /// Whether less than `least` bytes have been moved, of `moved` in all, for so many ticks.
    mutating func hasStood(
        still ticks: UInt64, _ moved: UInt64, at tick: UInt64, unlessMoved least: UInt64 = 1
    ) -> Bool {
        if moved - self.moved >= least { restart(moved, at: tick) }
        return tick - since >= ticks
    }
}
