// One volume as the reactors see it.

import Synchronization
import ThinMetadata

/// A thin device with a name and a size.
///
/// What a reactor reads without the lock is atomic: the gate and the mapping table. Everything
/// else that changes is under the pool's lock.
public final class Volume: @unchecked Sendable {
    /// Bytes; a multiple of 512.
    public static let maxSize: UInt64 = 1 << 53
    public static let sectorSize: UInt64 = 512

    public let name: String
    public let size: UInt64
    public let id: ThinDeviceID
    /// Name of the volume that this one was a snapshot of, when it was taken.
    public let origin: String?
    private let readOnly: Atomic<Bool>
    private let text: Mutex<String?>

    let table: MappingTable

    /// Low 32 bits: the device's snapshotted_time; a mapping is shared iff its time is below.
    /// High bits: reasons why no write may go the fast way.
    private let gate: Atomic<UInt64>
    static let heldGate: UInt64 = 1 << 63
    static let closedGate: UInt64 = 1 << 62

    /// The transaction that last changed this volume's map.
    let changedIn = Atomic<UInt64>(0)

    /// Connections that have ended while requests of theirs were under way.
    ///
    /// A client that comes back sends again what was not answered, and then goes on. If the first
    /// of two equal writes were still under way, it could undo what the client wrote meanwhile. So
    /// while there is a fence nobody opens the volume.
    private let fences = Atomic<Int>(0)

    // Under the pool's lock:
    /// Connections that have it open.
    var users = 0
    /// A deletion has begun: nobody may open it any more.
    var isBeingDeleted = false
    /// The snapshot being taken was made at this time; the gate follows when it is released.
    var pendingTime: UInt32?
    /// The table has allowed writes in place to blocks whose mapping's time says that they are shared.
    var hasGrants = false
    /// Pages of the table that may have held such grants and have been given up: by the epoch's stamp
    /// of that moment, until it has drained.
    var forgottenPages: [UInt64: UInt64] = [:]
    /// Writes that wait for a snapshot to be taken.
    var heldSteps = ParkedSteps()

    init?(
        _ entry: Catalogue.Entry, blockSize: UInt64, snapshottedTime: UInt32, isReadOnly: Bool,
        tablePageShift: UInt64
    ) {
        let blocks = (entry.size + blockSize - 1) / blockSize
        guard let table = MappingTable(blocks: blocks, pageShift: tablePageShift) else {
            return nil
        }
        name = entry.name
        size = entry.size
        id = ThinDeviceID(entry.id)
        origin = entry.origin
        readOnly = Atomic(isReadOnly)
        text = Mutex(entry.description)
        self.table = table
        gate = Atomic(UInt64(snapshottedTime) | (isReadOnly ? Self.closedGate : 0))
    }

    /// No write succeeds. Changes only while no connection has the volume open.
    public var isReadOnly: Bool { readOnly.load(ordering: .acquiring) }

    /// For people; changes at any time.
    public var description: String? { text.withLock { $0 } }

    /// Under the pool's lock; nobody has it open if `isReadOnly` changes.
    func set(isReadOnly: Bool, description: String?) {
        text.withLock { $0 = description }
        guard isReadOnly != self.isReadOnly else { return }
        precondition(users == 0, "a volume in use became read-only, or writable")
        readOnly.store(isReadOnly, ordering: .releasing)
        if isReadOnly {
            closeGate()
        } else {
            gate.bitwiseAnd(~Self.closedGate, ordering: .sequentiallyConsistent)
        }
    }

    /// The time below which a mapping is shared, or nil if writes have to ask the pool first.
    @inline(__always)
    var openGate: UInt32? {
        let word = gate.load(ordering: .acquiring)
        return word > UInt64(UInt32.max) ? nil : UInt32(truncatingIfNeeded: word)
    }

    var snapshottedTime: UInt32 {
        UInt32(truncatingIfNeeded: gate.load(ordering: .relaxed))
    }

    var isHeld: Bool { gate.load(ordering: .relaxed) & Self.heldGate != 0 }

    /// Holds new writes (they ask the pool, and are parked there). The lock is held.
    func hold() { gate.bitwiseOr(Self.heldGate, ordering: .sequentiallyConsistent) }

    func release(snapshottedTime: UInt32) {
        let closed = gate.load(ordering: .relaxed) & Self.closedGate
        gate.store(UInt64(snapshottedTime) | closed, ordering: .sequentiallyConsistent)
    }

    package var isFenced: Bool { fences.load(ordering: .acquiring) > 0 }
    package func addFence() { fences.wrappingAdd(1, ordering: .acquiringAndReleasing) }
    func removeFence() { fences.wrappingSubtract(1, ordering: .acquiringAndReleasing) }

    /// No write goes the fast way any more: the pool failed, or nobody may write.
    func closeGate() { gate.bitwiseOr(Self.closedGate, ordering: .sequentiallyConsistent) }
}

/// A list of parked steps, threaded through the steps themselves. Under the pool's lock.
struct ParkedSteps {
    /// 0: empty; else `StepReference.rawValue`.
    var head: UInt64 = 0
    var tail: UInt64 = 0
    var isEmpty: Bool { head == 0 }
}
