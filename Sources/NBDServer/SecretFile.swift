// Small files that the server's secrets are in.

import Glibc

enum SecretFile {
    /// More than any bundle of certificates.
    private static let maximumBytes = 16 << 20

    static func read(_ path: String) throws(ServerError) -> [UInt8] {
        let operation = "read \(path)"
        guard let file = fopen(path, "re") else {
            throw ServerError(operation: operation, code: errno)
        }
        defer { fclose(file) }
        var bytes: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = fread(&piece, 1, piece.count, file)
            bytes += piece[..<count]
            if count < piece.count { break }
            guard bytes.count <= maximumBytes else {
                throw ServerError(operation: operation, code: EFBIG)
            }
        }
        guard ferror(file) == 0 else { throw ServerError(operation: operation, code: errno) }
        return bytes
    }

    /// The same for what nobody else should read, with a warning if they may.
    static func read(_ path: String, warnings: inout [String]) throws(ServerError) -> [UInt8] {
        var status = stat()
        if stat(path, &status) == 0, status.st_mode & (S_IROTH | S_IWOTH) != 0 {
            warnings.append("every user may read or write \(path): \"chmod o-rw\" it")
        }
        return try read(path)
    }
}
