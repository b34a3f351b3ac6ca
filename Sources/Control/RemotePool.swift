// A pool whose server does the work: each verb is a request over its control socket.

import Glibc
import ThinPool

public final class RemotePool: PoolManager {
    private let socket: ControlSocket
    private let directory: PoolDirectory

    /// A server at work says so once a second; one that says nothing for so long is stuck.
    private static let patience = 30_000
    private static let connectSeconds = 5

    private init(_ directory: PoolDirectory, _ socket: ControlSocket) {
        self.directory = directory
        self.socket = socket
    }

    /// Nil if no server listens.
    public static func connect(_ directory: PoolDirectory) throws(ControlError) -> RemotePool? {
        let place = try SocketPlace(directory, PoolDirectory.controlSocketName)
        let socket = ControlSocket(descriptor: try SocketPlace.newSocket())
        // Bounds connect, too: it waits while as many as may be are waiting already.
        var limit = timeval(tv_sec: connectSeconds, tv_usec: 0)
        setsockopt(
            socket.descriptor, SOL_SOCKET, SO_SNDTIMEO, &limit,
            socklen_t(MemoryLayout<timeval>.size))
        let code = place.connect(socket.descriptor)
        switch code {
        case 0: return RemotePool(directory, socket)
        case ENOENT, ECONNREFUSED: return nil
        case EACCES, EPERM:
            throw ControlError(
                .connection,
                "a server has the pool \(directory.path) open, and its socket \(place.path) is its "
                    + "owner's: be that user, or root")
        default: throw ControlError(cannot: "connect to", place.path, code)
        }
    }

    // MARK: - PoolManager

    public var isRemote: Bool { true }

    public func status() throws(ControlError) -> PoolStatus {
        guard case .status(let status) = try ask(.status) else { throw nonsense() }
        return status
    }

    public func volumes() throws(ControlError) -> [VolumeInfo] {
        guard case .volumes(let volumes) = try ask(.volumes) else { throw nonsense() }
        return volumes
    }

    public func change(_ change: PoolChange) throws(ControlError) {
        guard case .done = try ask(.change(change)) else { throw nonsense() }
    }

    func check(progress: (CheckAdvance) -> Void) throws(ControlError) -> CheckResult {
        guard case .check(let result) = try ask(.check, progress: progress) else {
            throw nonsense()
        }
        return result
    }

    private func ask(_ request: ControlRequest, progress: (CheckAdvance) -> Void = { _ in })
        throws(ControlError) -> ControlResponse
    {
        // A server that has no room says so and hangs up, whether it has been asked yet or not.
        _ = socket.write(try ControlLine.encode(request), milliseconds: Self.patience)
        while true {
            guard
                let line = socket.readLine(
                    limit: ControlLine.maxResponseBytes, milliseconds: Self.patience)
            else { throw silence() }
            switch try ControlLine.decode(ControlResponse.self, line) {
            case .progress(let advance): if let advance { progress(advance) }
            case .failed(let error): throw error
            case let response: return response
            }
        }
    }

    private func silence() -> ControlError {
        ControlError(
            .connection,
            "the server of \(directory.path) ended or does not answer: whether it did what was "
                + "asked is not known, see its log and \"wafer volume list\"")
    }

    private func nonsense() -> ControlError {
        ControlError(
            .connection,
            "the server of \(directory.path) answers something else than was asked: are both "
                + "sides the same version of wafer?")
    }
}
