// Reading, writing and flushing a file device: whole transfers or an error.

import Glibc
import Synchronization

extension FileDevice {
    /// The most that is copied through a bounce buffer at once.
    private static let bounceLength = 1 << 20

    public func read(
        at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer
    ) throws(DeviceError) {
        guard let start = buffer.baseAddress, buffer.count > 0 else { return }
        try checkRange("read", offset, UInt64(buffer.count))
        if takesDirectly(UnsafeRawPointer(start), offset, buffer.count) {
            try readAll(offset, start, buffer.count)
        } else {
            try readThroughBounce(offset, start, buffer.count)
        }
    }

    public func write(at offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(DeviceError) {
        guard let start = buffer.baseAddress, buffer.count > 0 else { return }
        try checkWritable("write")
        try checkRange("write", offset, UInt64(buffer.count))
        if takesDirectly(start, offset, buffer.count) {
            try writeAll(offset, start, buffer.count)
        } else {
            try writeThroughBounce(offset, start, buffer.count)
        }
    }

    public func flush() throws(DeviceError) {
        while fdatasync(fileDescriptor) != 0 {
            let code = errno
            if code != EINTR { throw failure("flush", nil, code) }
        }
    }

    // MARK: - Plain transfers

    private func readAll(
        _ offset: UInt64, _ start: UnsafeMutableRawPointer, _ count: Int
    ) throws(DeviceError) {
        var done = 0
        while done < count {
            let place = offset + UInt64(done)
            let result = pread(fileDescriptor, start + done, count - done, off_t(place))
            if result > 0 {
                done += result
            } else if result == 0 {
                throw failure("read", place, EIO, "it ends there; it was made shorter while in use")
            } else {
                let code = errno
                if code != EINTR { throw failure("read", place, code) }
            }
        }
    }

    private func writeAll(
        _ offset: UInt64, _ start: UnsafeRawPointer, _ count: Int
    ) throws(DeviceError) {
        var done = 0
        while done < count {
            let place = offset + UInt64(done)
            let result = pwrite(fileDescriptor, start + done, count - done, off_t(place))
            if result > 0 {
                done += result
            } else {
                let code = result == 0 ? EIO : errno
                if code != EINTR { throw failure("write", place, code) }
            }
        }
    }

    // MARK: - Bounced transfers

    private func takesDirectly(
        _ start: UnsafeRawPointer, _ offset: UInt64, _ count: Int
    ) -> Bool {
        if !isDirect { return true }
        let sector = UInt(sectorSize)
        return UInt(bitPattern: start) % UInt(memoryAlignment) == 0
            && offset % UInt64(sector) == 0 && UInt(count) % sector == 0
    }

    /// The sectors that hold the next bytes of a range, at most a bounce buffer full.
    private func sectors(
        _ offset: UInt64, _ remaining: Int
    ) -> (start: UInt64, length: Int, skip: Int, useful: Int) {
        let sector = UInt64(sectorSize)
        let start = offset / sector * sector
        let skip = Int(offset - start)
        let useful = min(remaining, Self.bounceLength - skip)
        let length = (skip + useful + sectorSize - 1) / sectorSize * sectorSize
        return (start, length, skip, useful)
    }

    private func readThroughBounce(
        _ offset: UInt64, _ start: UnsafeMutableRawPointer, _ count: Int
    ) throws(DeviceError) {
        let bounce = AlignedBuffer(count: sectors(offset, count).length)
        var done = 0
        while done < count {
            let piece = sectors(offset + UInt64(done), count - done)
            try readAll(piece.start, bounce.pointer, piece.length)
            memcpy(start + done, bounce.pointer + piece.skip, piece.useful)
            done += piece.useful
        }
    }

    private func writeThroughBounce(
        _ offset: UInt64, _ start: UnsafeRawPointer, _ count: Int
    ) throws(DeviceError) {
        let bounce = AlignedBuffer(count: sectors(offset, count).length)
        var done = 0
        while done < count {
            let piece = sectors(offset + UInt64(done), count - done)
            if piece.length == piece.useful {
                memcpy(bounce.pointer, start + done, piece.useful)
                try writeAll(piece.start, bounce.pointer, piece.length)
            } else {
                try changeSectors(piece, bounce.pointer, start + done)
            }
            done += piece.useful
        }
    }

    /// Writes a part of some sectors; other parts of them keep what concurrent calls of this
    /// function write there.
    private func changeSectors(
        _ piece: (start: UInt64, length: Int, skip: Int, useful: Int),
        _ bounce: UnsafeMutableRawPointer, _ source: UnsafeRawPointer
    ) throws(DeviceError) {
        let result = partialSector.withLock { _ -> DeviceError? in
            do throws(DeviceError) {
                try readAll(piece.start, bounce, piece.length)
                memcpy(bounce + piece.skip, source, piece.useful)
                try writeAll(piece.start, bounce, piece.length)
                return nil
            } catch {
                return error
            }
        }
        if let result { throw result }
    }
}
