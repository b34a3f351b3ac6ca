// The pool's volumes as exports.

import NBDProtocol
import ThinPool

package struct PoolExports: ExportDirectory {
    /// What an owner decides for all clients.
    package struct Settings: Sendable {
        package var isReadOnly = false
        package var isRotational = false
        /// What "" stands for; nil: the only volume, and where there are several none.
        package var defaultExport: String?
        package var requireTLS: Set<String> = []

        package init() {}
    }

    let pool: Pool
    let settings: Settings
    /// This client may only read.
    let isReadOnly: Bool
    /// Asked when a volume is opened: nil, or why this client may not have it.
    private let refusal: @Sendable (String) -> String?
    /// The volume of the export that was opened; whoever takes it closes it.
    private(set) var opened: Volume?
    /// What the session has selected, and the volumes that are compared with: as long as they are
    /// open they are not deleted.
    private(set) var contexts = VolumeContexts()
    private var bases: [Volume] = []

    /// The contexts that every export has.
    private static let contextsOfAll = [MetaContext.allocation, WaferContext.shared]
    /// Names of contexts that a list of all of them shows.
    private static let mostListedBases = 100

    package init(
        pool: Pool, settings: Settings, isReadOnly: Bool = false,
        refusal: @escaping @Sendable (String) -> String? = { _ in nil }
    ) {
        self.pool = pool
        self.settings = settings
        self.isReadOnly = isReadOnly || settings.isReadOnly
        self.refusal = refusal
    }

    /// Gives up what was opened.
    package mutating func close() {
        if let opened { pool.close(opened) }
        opened = nil
        for base in bases { pool.close(base) }
        bases = []
        contexts = VolumeContexts()
    }

    package func next(after name: String?, secure: Bool) -> ListedExport? {
        var last = name
        while let (name, description) = pool.volume(after: last) {
            if shows(name, secure) {
                return ListedExport(name: name, description: words(description))
            }
            last = name
        }
        return nil
    }

    package func describe(_ name: String) -> Export? {
        with(name, export)
    }

    package mutating func open(
        _ name: String, contexts: [MetaContext], secure: Bool
    ) -> ExportOpening {
        open(name, contexts: contexts, secure: secure, waitsForFence: true)
    }

    /// - Parameter waitsForFence: false for a client that never left: what others that did still
    ///   have under way does not concern it.
    mutating func open(
        _ name: String, contexts: [MetaContext], secure: Bool, waitsForFence: Bool
    ) -> ExportOpening {
        guard let volume = volume(name) else { return .absent }
        precondition(opened == nil, "a handshake opened two exports")
        guard shows(volume.name, secure) else {
            pool.close(volume)
            return .requiresTLS
        }
        if waitsForFence && volume.isFenced {
            pool.close(volume)
            return .busy
        }
        opened = volume
        for context in contexts {
            guard let kind = kind(of: context.name, secure) else {
                close()
                return .refused("what \(context.name) compares with has been deleted")
            }
            self.contexts.append(context, kind)
        }
        // Last, because who is not refused counts.
        if let reason = refusal(volume.name) {
            close()
            return .refused(reason)
        }
        return .opened(export(volume))
    }

    // MARK: - Volumes

    /// Whether a client may know of that volume.
    private func shows(_ name: String, _ secure: Bool) -> Bool {
        secure || !settings.requireTLS.contains(name)
    }

    private func volume(_ name: String) -> Volume? {
        if !name.isEmpty { return pool.open(exportNamed: name) }
        if let name = settings.defaultExport { return pool.open(exportNamed: name) }
        return pool.openOnlyVolume()
    }

    private func with<Result>(_ name: String, _ body: (Volume) -> Result) -> Result? {
        guard let volume = volume(name) else { return nil }
        defer { pool.close(volume) }
        return body(volume)
    }

    private func export(_ volume: Volume) -> Export {
        Export(
            name: volume.name, size: volume.size,
            isReadOnly: isReadOnly || volume.isReadOnly || pool.hasFailed,
            description: words(volume.description), isRotational: settings.isRotational,
            requiresTLS: settings.requireTLS.contains(volume.name))
    }

    /// The volume's description as clients see it. The protocol has no other place for the size of a
    /// data block.
    private func words(_ description: String?) -> String {
        "\(description ?? "thin volume"), data blocks of \(pool.blockSize >> 10) KiB"
    }

    // MARK: - Meta contexts

    package func contextNames(
        of name: String, beginningWith prefix: String, secure: Bool
    ) -> [String] {
        with(name) { volume in
            let bases = pool.extentBases(of: volume, limit: Self.mostListedBases)
            let names =
                Self.contextsOfAll
                + bases.filter { shows($0, secure) }.map { WaferContext.changedSince + $0 }
            return names.filter { $0.hasPrefix(prefix) }
        } ?? []
    }

    package func hasContext(_ context: String, of name: String, secure: Bool) -> Bool {
        if let base = WaferContext.base(context) {
            return shows(base, secure) && pool.volumeSize(base) != nil
        }
        return Self.contextsOfAll.contains(context)
    }

    private mutating func kind(of context: String, _ secure: Bool) -> ExtentKind? {
        switch context {
        case MetaContext.allocation: return .allocation
        case WaferContext.shared: return .sharing
        default:
            guard let name = WaferContext.base(context), shows(name, secure),
                let base = pool.open(exportNamed: name)
            else { return nil }
            bases.append(base)
            return .difference(from: base)
        }
    }
}
