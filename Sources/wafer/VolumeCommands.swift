// wafer volume create, list, snapshot, set, delete, adopt

import ArgumentParser
import Control
import ThinPool

/// Opens the pool, makes a change, and leaves it committed.
private func apply(_ change: PoolChange, to path: String) throws {
    let manager = try PoolAccess.open(path, changing: true)
    guard let local = manager as? LocalPool else {
        try manager.change(change)
        return
    }
    do {
        try local.change(change)
        if case .delete = change {
            let progress = Progress()
            defer { progress.end() }
            try local.finishDeletions { done, total in
                progress.show("giving back blocks", done, of: total)
            }
        }
    } catch {
        try? local.close()
        throw error
    }
    try local.close()
}

/// A size that a volume can have: usage is checked before any pool is opened.
@Sendable private func volumeSize(_ text: String) throws -> ByteSize {
    let parsed = try size(text)
    if let problem = VolumeRules.sizeProblem(parsed.bytes) { throw ValidationError(problem) }
    return parsed
}

/// Anything that is on the command line; checked before any pool is opened.
@Sendable private func oneLine(_ text: String) throws -> String {
    if let problem = VolumeRules.descriptionProblem(text) { throw ValidationError(problem) }
    return text
}

struct VolumeCreate: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "create", abstract: "Make a volume; it takes space when it is written.")

    @OptionGroup var pool: PoolArgument
    @Argument(help: "The volume's name.")
    var name: String
    @Argument(help: "Its size, a multiple of 512 bytes.", transform: volumeSize)
    var size: ByteSize
    @Option(help: "What it is, for people: one line.", transform: oneLine)
    var description: String?

    func run() throws {
        try apply(
            .create(name: name, size: size.bytes, description: description), to: pool.path)
        print("created volume \(name), \(size)")
    }
}

struct VolumeSnapshot: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "snapshot", abstract: "Make a snapshot of a volume, writable or not.",
        discussion: "It holds what was written before, also while the volume is in use.")

    @OptionGroup var pool: PoolArgument
    @Argument(help: "The volume.")
    var origin: String
    @Argument(help: "The snapshot's name.")
    var name: String
    @Flag(help: "Nobody may write to it.")
    var readOnly = false
    @Option(help: "What it is, for people: one line.", transform: oneLine)
    var description: String?

    func run() throws {
        try apply(
            .snapshot(
                origin: origin, name: name, readOnly: readOnly ? true : nil,
                description: description), to: pool.path)
        print("created volume \(name), a\(readOnly ? " read-only" : "") snapshot of \(origin)")
    }
}

struct VolumeSet: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "set", abstract: "Change whether a volume can be written, or its description.",
        discussion: "A volume in use stays writable, or read-only.")

    @OptionGroup var pool: PoolArgument
    @Argument(help: "The volume's name.")
    var name: String
    @Option(help: "\"true\": nobody may write to it; \"false\": clients may.")
    var readOnly: Bool?
    @Option(help: "What it is, for people: one line; \"\" takes it away.", transform: oneLine)
    var description: String?

    func validate() throws {
        guard readOnly != nil || description != nil else {
            throw ValidationError("nothing to set: give --read-only or --description")
        }
    }

    func run() throws {
        try apply(
            .set(name: name, readOnly: readOnly, description: description), to: pool.path)
        print("set volume \(name)")
    }
}

struct VolumeDelete: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "delete", abstract: "Delete a volume that is not in use.",
        discussion: "A server gives back the blocks of a large volume in the background.")

    @OptionGroup var pool: PoolArgument
    @Argument(help: "The volume's name.")
    var name: String

    func run() throws {
        try apply(.delete(name: name), to: pool.path)
        print("deleted volume \(name)")
    }
}

struct VolumeAdopt: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "adopt",
        abstract: "Give a name and a size to a thin device that another program made.")

    @OptionGroup var pool: PoolArgument
    @Argument(help: "The thin device's number, as \"wafer volume list\" shows it.")
    var id: UInt32
    @Argument(help: "The volume's name.")
    var name: String
    @Argument(help: "Its size, which the pool does not know.", transform: volumeSize)
    var size: ByteSize

    func run() throws {
        try apply(.adopt(id: id, name: name, size: size.bytes), to: pool.path)
        print("adopted thin device \(id) as volume \(name), \(size)")
    }
}

struct VolumeList: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "list", abstract: "List a pool's volumes.")

    @OptionGroup var pool: PoolArgument
    @Flag(help: "Print JSON.")
    var json = false

    func run() throws {
        let volumes = try PoolAccess.open(pool.path, changing: false).volumes()
        if json {
            try Output.json(volumes)
            return
        }
        let hasDescriptions = volumes.contains { $0.description != nil }
        var rows = [["NAME", "ID", "SIZE", "MAPPED", "ORIGIN", "CREATED", "CLIENTS", "STATE"]]
        if hasDescriptions { rows[0].append("DESCRIPTION") }
        for volume in volumes {
            rows.append([
                volume.name ?? "-", "\(volume.id)",
                volume.size.map { "\(ByteSize(bytes: $0))" } ?? "-",
                "\(ByteSize(bytes: volume.mappedBytes))", volume.origin ?? "-",
                volume.created.map(Output.date) ?? "-", "\(volume.connections)",
                volume.readOnly == true ? "read-only" : volume.state.rawValue,
            ])
            if hasDescriptions { rows[rows.count - 1].append(volume.description ?? "-") }
        }
        Output.table(rows)
    }
}
