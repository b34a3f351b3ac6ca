// What people and scripts read: tables, JSON, progress.

import ArgumentParser
import BlockIO
import Control
import FoundationEssentials
@preconcurrency import Glibc

enum Output {
    static func json(_ value: some Encodable) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        print(String(decoding: try encoder.encode(value), as: UTF8.self))
    }

    /// To standard error, at once.
    static func error(_ text: String) {
        var bytes = Array(text.utf8)[...]
        while !bytes.isEmpty {
            let count = bytes.withUnsafeBytes { write(STDERR_FILENO, $0.baseAddress, $0.count) }
            guard count > 0 else { return }
            bytes.removeFirst(count)
        }
    }

    /// Writes what is still buffered.
    ///
    /// - Returns: why not everything that was printed is written; nil: it is, or its reader has gone
    ///   and wants no more.
    static func finish() -> String? {
        let isFlushed = fflush(stdout) == 0
        let code = errno
        guard !isFlushed || ferror(stdout) != 0, !hasReaderGone else { return nil }
        return "cannot write to standard output"
            + (isFlushed ? "" : ": \(SystemError.words(code))")
    }

    private static var hasReaderGone: Bool {
        var output = pollfd(fd: STDOUT_FILENO, events: Int16(POLLOUT), revents: 0)
        return poll(&output, 1, 0) == 1 && output.revents & Int16(POLLERR | POLLHUP) != 0
    }

    /// Columns aligned at the left, two spaces between them.
    static func table(_ rows: [[String]]) {
        let columns = rows.map(\.count).max() ?? 0
        let widths = (0..<columns).map { column in rows.map { $0[column].count }.max() ?? 0 }
        for row in rows {
            var line = ""
            for (column, cell) in row.enumerated() {
                line += cell
                if column < columns - 1 {
                    line += String(repeating: " ", count: widths[column] - cell.count + 2)
                }
            }
            print(line)
        }
    }

    /// "1.5 GiB used of 100 GiB (1.5 %)"
    static func used(_ blocks: UInt64, of total: UInt64, _ blockSize: UInt64) -> String {
        let tenths = total == 0 ? 0 : Int((Double(blocks) / Double(total) * 1000).rounded())
        return "\(ByteSize(bytes: blocks * blockSize)) used of "
            + "\(ByteSize(bytes: total * blockSize)) (\(tenths / 10).\(tenths % 10) %)"
    }

    /// Local time.
    static func date(_ seconds: UInt64) -> String {
        var time = time_t(clamping: seconds)
        var parts = tm()
        localtime_r(&time, &parts)
        var text = [CChar](repeating: 0, count: 32)
        let count = strftime(&text, text.count, "%Y-%m-%d %H:%M:%S", &parts)
        return String(decoding: text.prefix(count).map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}

/// One line on a terminal that is written over and over; nothing where standard error is none.
final class Progress {
    private let isShown = isatty(STDERR_FILENO) != 0
    private var lastPercent = -1
    private var lastWhat = ""
    private var hasLine = false

    func show(_ what: String, _ done: UInt64, of total: UInt64) {
        guard isShown else { return }
        let percent = total == 0 ? 0 : Int(min(100, Double(done) / Double(total) * 100))
        guard percent != lastPercent || what != lastWhat else { return }
        lastPercent = percent
        lastWhat = what
        hasLine = true
        Output.error("\r\(what): \(percent) %\u{1B}[K")
    }

    func end() {
        if hasLine { Output.error("\r\u{1B}[K") }
        hasLine = false
    }
}
