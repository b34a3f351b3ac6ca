// Names and sizes of the volumes: what dm-thin's format has no place for.
//
// The catalogue lives in the pool, as the contents of the reserved thin device 2^24 - 1. A change
// writes a whole new one into freshly provisioned blocks and maps it in the transaction that makes
// the change, so that one superblock write makes both true.
//
// | offset | field |
// |---|---|
// | 0 | magic "WAFERCAT" |
// | 8 | version u32, little-endian: 1 |
// | 12 | CRC-32C of the payload u32 |
// | 16 | payload bytes u64 |
// | 24 | reserved u64, 0 |
// | 32 | payload: JSON |
//
// Zero to the end of the last block.

import CLinux
import FoundationEssentials
import ThinMetadata

package enum CatalogueLayout {
    package static let device = ThinDeviceID.max
    package static let magic = 0
    package static let version = 8
    package static let checksum = 12
    package static let payloadBytes = 16
    package static let payload = 32

    package static let magicValue = UInt64(littleEndian: 0x5441_4352_4546_4157)  // "WAFERCAT"
    package static let versionValue: UInt32 = 1
    /// 2^24 volumes of some 200 bytes would be more; a longer length is a damaged one.
    package static let maxPayloadBytes: UInt64 = 1 << 32
}

package struct Catalogue: Codable, Equatable, Sendable {
    package struct Entry: Codable, Equatable, Sendable {
        var id: UInt32
        var name: String
        var size: UInt64
        /// Name of the volume that this one was taken of, or, where that is gone, of what that was
        /// taken of. It is in the catalogue.
        var origin: String?
        /// Volumes without an origin that have this in common were taken of one that is gone.
        var family: UInt64?
        /// Seconds since 1970.
        var created: UInt64
        /// Nobody may write to it; absent where it can be written.
        var readOnly: Bool?
        /// For people.
        var description: String?

        package init(
            id: UInt32, name: String, size: UInt64, origin: String? = nil, created: UInt64,
            readOnly: Bool = false, description: String? = nil
        ) {
            self.id = id
            self.name = name
            self.size = size
            self.origin = origin
            self.created = created
            self.readOnly = readOnly ? true : nil
            self.description = description
        }
    }

    package var volumes: [Entry] = []
    /// Devices whose volume is deleted and whose blocks are still being given back.
    var deleting: [UInt32] = []

    package init() {}

    func entry(named name: String) -> Entry? { volumes.first { $0.name == name } }

    /// Takes a volume out, and its name out of the origins: the next volume of that name is another.
    mutating func remove(_ name: String) {
        guard let index = volumes.firstIndex(where: { $0.name == name }) else { return }
        let gone = volumes.remove(at: index)
        if gone.origin != nil || gone.family != nil {
            for index in volumes.indices where volumes[index].origin == name {
                volumes[index].origin = gone.origin
                volumes[index].family = gone.family
            }
        }
        replaceLostOrigins()
    }

    /// Those that have lost the same origin become a family.
    private mutating func replaceLostOrigins() {
        let names = Set(volumes.map(\.name))
        var used = Set(volumes.compactMap(\.family))
        var families: [String: UInt64] = [:]
        var number: UInt64 = 0
        for index in volumes.indices {
            guard let origin = volumes[index].origin, !names.contains(origin) else { continue }
            if families[origin] == nil {
                while !used.insert(number).inserted { number += 1 }
                families[origin] = number
            }
            volumes[index].origin = nil
            volumes[index].family = families[origin]
        }
    }

    /// - Returns: header and payload, padded with zeroes to whole blocks.
    package func encoded(blockSize: UInt64) throws(PoolError) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys]
        let payload: [UInt8]
        do { payload = [UInt8](try encoder.encode(self)) } catch {
            throw PoolError(.failed, "the catalogue cannot be encoded: \(error)")
        }
        let used = UInt64(CatalogueLayout.payload + payload.count)
        let total = (used + blockSize - 1) / blockSize * blockSize
        var bytes = [UInt8](repeating: 0, count: Int(total))
        bytes.withUnsafeMutableBytes { buffer in
            let base = buffer.baseAddress!
            base.setLE64(CatalogueLayout.magic, CatalogueLayout.magicValue)
            base.setLE32(CatalogueLayout.version, CatalogueLayout.versionValue)
            base.setLE64(CatalogueLayout.payloadBytes, UInt64(payload.count))
            payload.withUnsafeBytes {
                base.setLE32(
                    CatalogueLayout.checksum, clinux_crc32c($0.baseAddress, $0.count))
                (base + CatalogueLayout.payload).copyMemory(
                    from: $0.baseAddress!, byteCount: $0.count)
            }
        }
        return bytes
    }

    /// Bytes of header and payload together, told by the first 32 bytes.
    static func length(header: UnsafeRawPointer) throws(PoolError) -> UInt64 {
        guard header.le64(CatalogueLayout.magic) == CatalogueLayout.magicValue else {
            throw damaged("thin device \(CatalogueLayout.device.rawValue) holds no catalogue")
        }
        let version = header.le32(CatalogueLayout.version)
        guard version == CatalogueLayout.versionValue else {
            throw damaged("its version is \(version), this program knows version 1")
        }
        let payload = header.le64(CatalogueLayout.payloadBytes)
        guard payload <= CatalogueLayout.maxPayloadBytes else {
            throw damaged("its length of \(payload) bytes is impossible")
        }
        return UInt64(CatalogueLayout.payload) + payload
    }

    static func decode(_ bytes: UnsafeRawBufferPointer) throws(PoolError) -> Catalogue {
        let header = bytes.baseAddress!
        let payload = UnsafeRawBufferPointer(rebasing: bytes[CatalogueLayout.payload...])
        guard
            clinux_crc32c(payload.baseAddress, payload.count)
                == header.le32(CatalogueLayout.checksum)
        else { throw damaged("its checksum is wrong") }
        var catalogue: Catalogue
        do {
            catalogue = try JSONDecoder().decode(Catalogue.self, from: Data(payload))
        } catch {
            throw damaged("its contents cannot be read: \(error)")
        }
        var names = Set<String>()
        var ids = Set(catalogue.deleting)
        for entry in catalogue.volumes {
            guard names.insert(entry.name).inserted, ids.insert(entry.id).inserted,
                entry.id < CatalogueLayout.device.rawValue
            else { throw damaged("it lists \"\(entry.name)\" or its device twice") }
            guard VolumeRules.nameProblem(entry.name) == nil,
                VolumeRules.sizeProblem(entry.size) == nil,
                entry.description.flatMap(VolumeRules.descriptionProblem) == nil
            else {
                throw damaged(
                    "volume \"\(entry.name)\" has an impossible name, size or description")
            }
        }
        // Earlier versions left the names of volumes that are gone.
        catalogue.replaceLostOrigins()
        return catalogue
    }

    private static func damaged(_ what: String) -> PoolError {
        PoolError(.metadata, "the pool's catalogue of volumes is damaged: \(what)")
    }
}

/// What a volume may be called, how it may be described, and how large it may be.
public enum VolumeRules {
    /// NBD allows 4096 bytes, its clients far less; a name is also part of a URI and of tables.
    public static let maxNameBytes = 255

    public static func nameProblem(_ name: String) -> String? {
        if name.isEmpty { return "a volume's name is empty" }
        if name.utf8.count > maxNameBytes {
            return "a volume's name is at most \(maxNameBytes) bytes, this one has "
                + "\(name.utf8.count)"
        }
        let allowed = name.unicodeScalars.allSatisfy {
            ($0.isASCII && $0.properties.isAlphabetic) || ("0"..."9").contains($0)
                || "._-+@:".unicodeScalars.contains($0)
        }
        if !allowed {
            return "volume name \"\(name)\" is not valid: use letters, digits and . _ - + @ :"
        }
        if name.hasPrefix("-") || name.hasPrefix(".") {
            return "volume name \"\(name)\" is not valid: it starts with \"\(name.first!)\""
        }
        return nil
    }

    /// As much as a name; it is one line of a table.
    public static let maxDescriptionBytes = 255

    public static func descriptionProblem(_ description: String) -> String? {
        if description.utf8.count > maxDescriptionBytes {
            return "a volume's description is at most \(maxDescriptionBytes) bytes, this one has "
                + "\(description.utf8.count)"
        }
        let hasControls = description.unicodeScalars.contains {
            $0.properties.generalCategory == .control
        }
        if hasControls { return "a volume's description is one line, without control characters" }
        return nil
    }

    public static func sizeProblem(_ size: UInt64) -> String? {
        if size == 0 { return "a volume's size is 0" }
        if size % Volume.sectorSize != 0 {
            return "a volume's size is a multiple of 512 bytes, \(size) is not"
        }
        if size > Volume.maxSize {
            return "a volume is at most 8 PiB, \(size) bytes is more"
        }
        return nil
    }
}
