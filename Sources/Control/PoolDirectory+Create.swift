// Makes a pool: the directory, its devices, an empty thin pool on them.
//
// 1. Nothing that could be somebody's is written to: the directory is new or empty, a given
//    metadata device begins with zeroes (or the caller insists), and both given devices are claimed
//    exclusively before anything happens.
// 2. A failure takes back what was made. The superblock is written last, the names of given devices
//    after it: a power cut leaves no pool, half of one (which `locate` says), or a whole one.
// 3. A metadata file has its space from the start: a commit that finds the file system full loses
//    what was acknowledged. Only the data file is sparse.

import BlockIO
import Glibc
import ThinMetadata

/// What a new pool is to be.
public struct PoolPlan: Sendable {
    /// An existing block device or file; nil: a file in the directory.
    public var metadata: String?
    public var data: String?
    /// Bytes of the data file; nil where `data` says which device.
    public var dataSize: UInt64?
    /// Bytes of the metadata file; nil: by the data's size.
    public var metadataSize: UInt64?
    public var blockSize: UInt64 = 64 << 10
    /// Overwrite a metadata device that does not begin with zeroes.
    public var force = false

    public init() {}

    /// Metadata takes 48 bytes a mapped block and up; snapshots take more.
    static let metadataBytesPerBlock: UInt64 = 64
    static let minMetadataSize: UInt64 = 64 << 20
    static let maxMetadataSize = Layout.maxMetadataBlocks * UInt64(Layout.blockSize)
    /// Below this there is no room for the catalogue and a volume.
    static let minDataBlocks: UInt64 = 16

    public static func defaultMetadataSize(dataSize: UInt64, blockSize: UInt64) -> UInt64 {
        let (wanted, overflow) = (dataSize / blockSize)
            .multipliedReportingOverflow(by: metadataBytesPerBlock)
        guard !overflow else { return maxMetadataSize }
        let size = min(max(wanted, minMetadataSize), maxMetadataSize)
        let block = UInt64(Layout.blockSize)
        return (size + block - 1) / block * block
    }

    fileprivate func validate() throws(ControlError) {
        guard blockSize.isMultiple(of: Layout.sectorSize),
            Layout.isDataBlockSize(sectors: blockSize / Layout.sectorSize)
        else {
            throw ControlError(
                .refused,
                "block size \(blockSize) is not possible: it is a multiple of 64 KiB, from 64 KiB "
                    + "to 1 GiB")
        }
        precondition((data == nil) != (dataSize == nil), "a device or a file's size")
        precondition(metadata == nil || metadataSize == nil, "a device has its size")
        if let dataSize { try validateData(size: dataSize, "--data-size") }
        if let metadataSize {
            guard metadataSize % UInt64(Layout.blockSize) == 0,
                metadataSize <= Self.maxMetadataSize
            else {
                throw ControlError(
                    .refused,
                    "--metadata-size \(metadataSize) is not possible: it is a multiple of 4 KiB, "
                        + "up to \(Self.maxMetadataSize) bytes")
            }
        }
    }

    fileprivate func validateData(size: UInt64, _ what: String) throws(ControlError) {
        let blocks = size / blockSize
        guard blocks >= Self.minDataBlocks else {
            throw ControlError(
                .refused,
                "\(what): \(ByteSize(bytes: size)) is too small for a pool, it takes at least "
                    + "\(Self.minDataBlocks) blocks of \(ByteSize(bytes: blockSize))")
        }
        guard blocks <= Mapping.maxBlock, size <= UInt64(Int64.max) else {
            throw ControlError(
                .refused,
                "\(what): \(ByteSize(bytes: size)) is too large for a pool, it has at most 2^40 "
                    + "blocks; a larger --block-size may help")
        }
        guard size % Layout.sectorSize == 0 else {
            throw ControlError(.refused, "\(what): \(size) bytes are not a multiple of 512")
        }
    }
}

extension PoolDirectory {
    /// Makes an empty pool.
    public static func create(_ path: String, _ plan: PoolPlan) throws(ControlError)
        -> PoolDirectory
    {
        try plan.validate()
        let directory = PoolDirectory(path: path)
        var undo = Undo()
        do throws(ControlError) {
            try directory.build(plan, &undo)
        } catch {
            undo.run()
            throw error
        }
        return directory
    }

    private func build(_ plan: PoolPlan, _ undo: inout Undo) throws(ControlError) {
        if let metadata = plan.metadata, let data = plan.data,
            let one = DeviceIdentity(path: metadata), one == DeviceIdentity(path: data)
        {
            throw ControlError(
                .refused, "--metadata \(metadata) and --data \(data) are the same device")
        }
        // Devices that were given are claimed before anything is made.
        let givenMetadata = try plan.metadata.map { path throws(ControlError) in
            try Self.claim(path, "--metadata")
        }
        let givenData = try plan.data.map { path throws(ControlError) in
            try Self.claim(path, "--data")
        }
        if let givenData {
            try plan.validateData(size: givenData.size, givenData.path)
        }
        if let givenMetadata {
            if !plan.force { try Self.requireBlank(givenMetadata) }
            do throws(DeviceError) { try givenMetadata.reserve() } catch {
                throw ControlError(error)
            }
        }
        try makeDirectory(&undo)

        let dataSize: UInt64
        if let givenData {
            dataSize = givenData.size
        } else {
            dataSize = plan.dataSize!
            try Self.makeFile(dataPath, dataSize, reserving: false, &undo)
        }
        let metadata: FileDevice
        if let givenMetadata {
            metadata = givenMetadata
        } else {
            let size =
                plan.metadataSize
                ?? PoolPlan.defaultMetadataSize(dataSize: dataSize, blockSize: plan.blockSize)
            try Self.makeFile(metadataPath, size, reserving: true, &undo)
            metadata = try Self.open(metadataPath)
        }
        do throws(MetadataError) {
            try ThinMetadata.format(
                metadata, dataBlockSectors: UInt32(plan.blockSize / Layout.sectorSize),
                dataBlocks: dataSize / plan.blockSize)
        } catch { throw ControlError(error) }
        if givenMetadata != nil { undo.blank(metadata) }
        if let givenData { try Self.makeLink(dataPath, to: givenData.path, &undo) }
        if let givenMetadata { try Self.makeLink(metadataPath, to: givenMetadata.path, &undo) }
        do throws(DeviceError) {
            try Directory.flush(path)
            try Directory.flush(Directory.holding(path))
        } catch { throw ControlError(error) }
    }

    private static func claim(_ path: String, _ option: String) throws(ControlError) -> FileDevice {
        do throws(DeviceError) {
            return try FileDevice(path: path, access: .readWrite)
        } catch {
            var failure = ControlError(error)
            failure.message = "\(option): \(failure.message)"
            throw failure
        }
    }

    private static func open(_ path: String) throws(ControlError) -> FileDevice {
        do throws(DeviceError) {
            return try FileDevice(path: path, access: .readWrite)
        } catch { throw ControlError(error) }
    }

    /// The kernel, too, takes only a metadata device that begins with zeroes for a new one.
    private static func requireBlank(_ device: FileDevice) throws(ControlError) {
        let block = try FirstBlock(device)
        guard !block.isBlank else { return }
        let isPool = block.isSuperblock
        throw ControlError(
            .refused,
            "\(device.path) holds \(isPool ? "the metadata of a thin pool" : "something"): its "
                + "first block is not all zero; --force overwrites it"
                + (isPool ? ", a directory with links to its devices serves it" : ""))
    }

    private func makeDirectory(_ undo: inout Undo) throws(ControlError) {
        if mkdir(path, 0o755) == 0 {
            undo.removeDirectory(path)
            return
        }
        let code = errno
        guard code == EEXIST else {
            throw ControlError(
                cannot: "make the directory", path, code,
                advice: code == ENOENT ? "make the directory above it first" : "")
        }
        guard let listing = opendir(path) else {
            let code = errno
            if code == ENOTDIR {
                throw ControlError(.refused, "\(path) exists and is not a directory")
            }
            throw ControlError(cannot: "open", path, code)
        }
        defer { closedir(listing) }
        while let entry = readdir(listing) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                String(cString: UnsafeRawPointer($0).assumingMemoryBound(to: CChar.self))
            }
            if name == "." || name == ".." { continue }
            if name == "metadata" || name == "data" {
                throw ControlError(.refused, "\(path) is a pool already: choose another directory")
            }
            throw ControlError(
                .refused, "\(path) is not empty (\"\(name)\"): choose another directory")
        }
    }

    private static func makeFile(
        _ path: String, _ size: UInt64, reserving: Bool, _ undo: inout Undo
    ) throws(ControlError) {
        do throws(DeviceError) {
            try FileDevice.create(path: path, size: size, reserving: reserving)
        } catch {
            var failure = ControlError(error)
            if reserving && error.code == ENOSPC {
                failure.message += ", or choose a smaller --metadata-size"
            }
            throw failure
        }
        undo.removeFile(path)
    }

    private static func makeLink(_ path: String, to target: String, _ undo: inout Undo)
        throws(ControlError)
    {
        guard symlink(absolute(target), path) == 0 else {
            throw ControlError(cannot: "make the link", path, errno)
        }
        undo.removeFile(path)
    }

}

/// What has to be taken back after a failure, the latest first.
private struct Undo {
    private var steps: [() -> Void] = []

    mutating func removeFile(_ path: String) { steps.append { unlink(path) } }
    mutating func removeDirectory(_ path: String) { steps.append { rmdir(path) } }
    /// A device that begins with zeroes is no pool.
    mutating func blank(_ device: FileDevice) {
        steps.append {
            let zeroes = [UInt8](repeating: 0, count: Layout.blockSize)
            zeroes.withUnsafeBytes { bytes in
                try? device.write(at: 0, from: bytes)
                try? device.flush()
            }
        }
    }

    func run() {
        for step in steps.reversed() { step() }
    }
}
