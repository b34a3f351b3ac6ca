// A device that begins as a copy of another one's bytes and takes memory for what is changed only:
// a fresh pool for each input costs next to nothing.

import BlockIO
import Glibc

final class OverlayDevice: BlockDevice {
    static let pageSize = 4096

    let path: String
    let size: UInt64
    private let base: UnsafeRawBufferPointer
    private var pages: [UnsafeMutableRawPointer?]

    /// - Parameter base: lives as long as the device; as many whole pages as the device has.
    init(path: String, over base: UnsafeRawBufferPointer) {
        self.path = path
        self.base = base
        size = UInt64(base.count)
        pages = Array(repeating: nil, count: base.count / Self.pageSize)
    }

    deinit {
        for page in pages { page?.deallocate() }
    }

    /// The page's bytes, to be looked at.
    func page(_ index: Int) -> UnsafeRawPointer {
        pages[index].map { UnsafeRawPointer($0) } ?? base.baseAddress! + index * Self.pageSize
    }

    /// The page's bytes, to be changed.
    func editedPage(_ index: Int) -> UnsafeMutableRawPointer {
        if let page = pages[index] { return page }
        let page = UnsafeMutableRawPointer.allocate(
            byteCount: Self.pageSize, alignment: Self.pageSize)
        memcpy(page, base.baseAddress! + index * Self.pageSize, Self.pageSize)
        pages[index] = page
        return page
    }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(DeviceError) {
        try check("read", offset, buffer.count)
        forEachPiece(offset, buffer.count) { page, start, done, count in
            memcpy(buffer.baseAddress! + done, self.page(page) + start, count)
        }
    }

    func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        try check("write", offset, buffer.count)
        forEachPiece(offset, buffer.count) { page, start, done, count in
            memcpy(editedPage(page) + start, buffer.baseAddress! + done, count)
        }
    }

    func flush() throws(DeviceError) {}

    func zero(at offset: UInt64, length: UInt64) throws(DeviceError) {
        guard length <= size else { return try check("zero", offset, Int(clamping: length)) }
        try check("zero", offset, Int(length))
        forEachPiece(offset, Int(length)) { page, start, _, count in
            memset(editedPage(page) + start, 0, count)
        }
    }

    private func forEachPiece(
        _ offset: UInt64, _ length: Int, _ body: (Int, Int, Int, Int) -> Void
    ) {
        var done = 0
        while done < length {
            let (page, start) = (Int(offset) + done).quotientAndRemainder(dividingBy: Self.pageSize)
            let count = min(length - done, Self.pageSize - start)
            body(page, start, done, count)
            done += count
        }
    }

    private func check(_ operation: String, _ offset: UInt64, _ count: Int) throws(DeviceError) {
        guard offset <= size, UInt64(count) <= size - offset else {
            throw DeviceError(
                operation: operation, path: path, offset: offset, code: EINVAL,
                reason: "\(count) bytes there reach beyond its end")
        }
    }
}
