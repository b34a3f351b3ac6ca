// Fuzzed bytes as a sequence of decisions. Past the end everything is zero.

struct FuzzInput {
    private let bytes: UnsafeRawBufferPointer
    private var position = 0

    init(_ bytes: UnsafeRawBufferPointer) { self.bytes = bytes }

    var isAtEnd: Bool { position >= bytes.count }

    mutating func byte() -> UInt8 {
        guard position < bytes.count else { return 0 }
        defer { position += 1 }
        return bytes[position]
    }

    /// Little-endian.
    mutating func word<Word: FixedWidthInteger & UnsignedInteger>(_: Word.Type) -> Word {
        var word: Word = 0
        for index in 0..<MemoryLayout<Word>.size { word |= Word(byte()) << Word(8 * index) }
        return word
    }

    mutating func below(_ limit: Int) -> Int {
        limit <= 256 ? Int(byte()) % limit : Int(word(UInt32.self)) % limit
    }

    /// What is left, at most `limit` bytes of it.
    mutating func rest(_ limit: Int = .max) -> UnsafeRawBufferPointer {
        let end = position + min(limit, bytes.count - position)
        defer { position = end }
        return UnsafeRawBufferPointer(rebasing: bytes[position..<end])
    }
}
