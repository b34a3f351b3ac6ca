// Sizes as people write and read them: integers with a unit that is a power of two.

/// A number of bytes.
public struct ByteSize: Hashable, Sendable {
    public var bytes: UInt64

    public init(bytes: UInt64) { self.bytes = bytes }

    /// Why a text is no size, in words that follow a colon.
    public struct ParseError: Error, Equatable, CustomStringConvertible {
        public var description: String
    }

    /// Units by the power of 1024 that they stand for.
    private static let units: [(name: String, shift: UInt64)] = [
        ("", 0), ("K", 10), ("M", 20), ("G", 30), ("T", 40), ("P", 50),
    ]

    /// "100GiB", "100G" and "107374182400" are the same; units are powers of two, in any case.
    ///
    /// - Throws: for what is no number, 0, negative, has another unit or does not fit 64 bits.
    public init(parsing text: String) throws(ParseError) {
        let digits = text.prefix { $0.isASCII && $0.isNumber }
        guard !digits.isEmpty else {
            throw ParseError(
                description: text.hasPrefix("-")
                    ? "a size is not negative" : "a size is a whole number, as in 100GiB")
        }
        let unit = text.dropFirst(digits.count).uppercased()
        guard
            let shift = Self.units.first(where: {
                $0.name.isEmpty
                    ? unit.isEmpty || unit == "B" : unit == $0.name || unit == $0.name + "IB"
            })?.shift
        else {
            let rest = text.dropFirst(digits.count)
            throw ParseError(
                description: rest.hasPrefix(".")
                    ? "a size is a whole number: use a smaller unit"
                    : "\"\(rest)\" is no unit: use KiB, MiB, GiB, TiB or PiB (or K, M, G, T, P)")
        }
        guard let number = UInt64(digits), number <= UInt64.max >> shift else {
            throw ParseError(description: "a size is less than 16 EiB")
        }
        guard number > 0 else { throw ParseError(description: "a size is not 0") }
        bytes = number << shift
    }
}

extension ByteSize: CustomStringConvertible {
    /// "1.5 GiB", with at most one decimal; whole below 1 KiB.
    public var description: String {
        let names = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
        var unit = 0
        while unit < names.count - 1, bytes >> UInt64(10 * (unit + 1)) > 0 { unit += 1 }
        guard unit > 0 else { return "\(bytes) B" }
        let tenths = (bytes >> UInt64(10 * (unit - 1))) * 10 / 1024
        let fraction = tenths % 10 == 0 ? "" : ".\(tenths % 10)"
        return "\(tenths / 10)\(fraction) \(names[unit])"
    }
}
