// Who has a file locked: for the message that says whom to stop.

import Glibc

struct LockHolder: CustomStringConvertible {
    let process: Int
    let name: String

    var description: String { "\(process) (\(name))" }

    /// By /proc/locks; nil if it does not say (another namespace, no lock).
    static func of(_ path: String) -> LockHolder? {
        var status = stat()
        guard stat(path, &status) == 0, let locks = contents("/proc/locks") else { return nil }
        // "1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"
        let device = UInt64(status.st_dev)
        let major = device >> 8 & 0xFFF | device >> 32 & 0xFFFF_F000
        let minor = device & 0xFF | device >> 12 & 0xFFFF_FF00
        let place = "\(hex(major)):\(hex(minor)):\(status.st_ino)"
        for line in locks.split(separator: "\n") {
            let words = line.split(separator: " ")
            guard words.count >= 6, words[1] == "FLOCK", words[5] == place,
                let process = Int(words[4]), process > 0
            else { continue }
            let name = contents("/proc/\(process)/comm")?.split(separator: "\n").first
            return LockHolder(process: process, name: name.map { String($0) } ?? "unknown")
        }
        return nil
    }

    private static func hex(_ number: UInt64) -> String {
        let digits = String(number, radix: 16)
        return digits.count < 2 ? "0" + digits : digits
    }

    private static func contents(_ path: String) -> String? {
        guard let file = fopen(path, "re") else { return nil }
        defer { fclose(file) }
        var bytes: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = fread(&buffer, 1, buffer.count, file)
            if count == 0 { return String(decoding: bytes, as: UTF8.self) }
            bytes.append(contentsOf: buffer[..<count])
        }
    }
}
