// Files of pre-shared keys, as psktool writes them: a line "user:key" for each user, the key in
// hexadecimal digits. So is a user behind #: psktool writes it that way if it has a colon.

enum PresharedKeys {
    /// Fewer bytes can be guessed, more GnuTLS does not take.
    private static let keyBytes = 16...64
    /// GnuTLS takes no longer ones.
    private static let longestUser = 128

    static func read(
        _ path: String, _ warnings: inout [String]
    ) throws(ServerError) -> [String: [UInt8]] {
        let bytes = try SecretFile.read(path, warnings: &warnings)
        var keys: [String: [UInt8]] = [:]
        let lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        for (index, line) in lines.enumerated() where !line.isEmpty {
            func wrong(_ reason: String) -> ServerError {
                ServerError(
                    operation: "use \(path)", code: 0,
                    reason: "line \(index + 1) \(reason); make it with \"psktool -u USER\"")
            }
            guard let colon = line.lastIndex(of: UInt8(ascii: ":")), colon > line.startIndex
            else { throw wrong("is not USER:KEY") }
            let isHexadecimal = line.first == UInt8(ascii: "#")
            let user =
                isHexadecimal ? fromHexadecimal(line[..<colon].dropFirst()) : Array(line[..<colon])
            guard let user, !user.isEmpty, let name = String(validating: user, as: UTF8.self),
                !name.contains("\0")
            else {
                throw wrong(
                    isHexadecimal
                        ? "has # and no user in hexadecimal digits behind it" : "is not USER:KEY")
            }
            guard user.count <= longestUser else {
                throw wrong("has a user of \(user.count) bytes, more than \(longestUser)")
            }
            guard let key = fromHexadecimal(line[(colon + 1)...]), keyBytes.contains(key.count)
            else {
                throw wrong(
                    "has no key of \(keyBytes.lowerBound) to \(keyBytes.upperBound) bytes in "
                        + "hexadecimal digits")
            }
            guard keys.updateValue(key, forKey: name) == nil else {
                throw wrong("has a user who has a key already")
            }
        }
        guard !keys.isEmpty else {
            throw ServerError(
                operation: "use \(path)", code: 0,
                reason: "there is no key in it; make one with \"psktool -u USER -p \(path)\"")
        }
        return keys
    }

    private static func fromHexadecimal(_ digits: ArraySlice<UInt8>) -> [UInt8]? {
        guard digits.count % 2 == 0 else { return nil }
        var bytes: [UInt8] = []
        for index in stride(from: digits.startIndex, to: digits.endIndex, by: 2) {
            // A sign would be a digit to the standard library.
            guard digits[index] != UInt8(ascii: "+"), digits[index] != UInt8(ascii: "-"),
                let byte = UInt8(
                    String(decoding: digits[index...index + 1], as: UTF8.self), radix: 16)
            else { return nil }
            bytes.append(byte)
        }
        return bytes
    }
}
