// The management verbs, whoever has the pool open.

import ThinPool

/// What can be asked of a pool. Each call blocks until it is answered; a change is durable then.
public protocol PoolManager: AnyObject {
    /// For messages: whether a server does the work.
    var isRemote: Bool { get }
    func status() throws(ControlError) -> PoolStatus
    func volumes() throws(ControlError) -> [VolumeInfo]
    func change(_ change: PoolChange) throws(ControlError)
}
