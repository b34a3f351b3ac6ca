// Big-endian integers in raw memory and in growing arrays. Bounds are the callers' business:
// every caller has compared a length before it loads.

extension UnsafeRawPointer {
    @inlinable @inline(__always)
    func bigEndian<Word: FixedWidthInteger>(_ offset: Int, as: Word.Type = Word.self) -> Word {
        Word(bigEndian: loadUnaligned(fromByteOffset: offset, as: Word.self))
    }
}

extension UnsafeMutableRawPointer {
    @inlinable @inline(__always)
    func storeBigEndian<Word: FixedWidthInteger>(_ word: Word, at offset: Int) {
        storeBytes(of: word.bigEndian, toByteOffset: offset, as: Word.self)
    }
}

extension [UInt8] {
    mutating func appendBigEndian(_ word: some FixedWidthInteger) {
        Swift.withUnsafeBytes(of: word.bigEndian) { append(contentsOf: $0) }
    }
}
