// The pool's volumes as exports.

import NBDProtocol
import ThinPool

package struct PoolExports: ExportDirectory {
    let pool: Pool
    let isReadOnly: Bool
    /// The volume of the export that was opened; whoever takes it closes it.
    var opened: Volume?

    private static let description = "thin volume"

    package init(pool: Pool, isReadOnly: Bool) {
        self.pool = pool
        self.isReadOnly = isReadOnly
    }

    package func exportNames() -> [String] { pool.volumeNames() }

    package func describe(_ name: String) -> Export? {
        guard let volume = volume(name) else { return nil }
        defer { pool.close(volume) }
        return export(volume)
    }

    package mutating func open(_ name: String) -> ExportOpening {
        guard let volume = volume(name) else { return .absent }
        precondition(opened == nil, "a handshake opened two exports")
        if volume.isFenced {
            pool.close(volume)
            return .busy
        }
        opened = volume
        return .opened(export(volume))
    }

    /// The default export is the only volume, and where there are several there is none.
    private func volume(_ name: String) -> Volume? {
        guard name.isEmpty else { return pool.open(exportNamed: name) }
        let names = pool.volumeNames()
        return names.count == 1 ? pool.open(exportNamed: names[0]) : nil
    }

    private func export(_ volume: Volume) -> Export {
        Export(
            name: volume.name, size: volume.size, isReadOnly: isReadOnly || volume.isReadOnly,
            description: Self.description)
    }
}
