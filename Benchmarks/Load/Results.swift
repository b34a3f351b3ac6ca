// What a run gives, as JSON.

import Foundation

struct Results: Encodable {
    var operation: String
    var blockSize: Int
    var depth: Int
    var connections: Int
    /// Completed; none failed, because an error ends the run.
    var requests: UInt64
    var seconds: Double
    var iops: Double
    var bytesASecond: Double
    /// This program's own processor time for a request.
    var clientCpuUs: Double
    var p50Us: Double
    var p99Us: Double
    var p999Us: Double
    var maxUs: Double

    init(_ load: Load, _ histogram: Histogram, elapsed: Double, processor: Double) {
        operation = load.operation.rawValue
        blockSize = load.blockSize
        depth = load.depth
        connections = load.connections
        requests = histogram.count
        seconds = elapsed
        iops = (Double(requests) / elapsed * 10).rounded() / 10
        bytesASecond = (iops * Double(load.blockSize)).rounded()
        clientCpuUs = (processor * 1e9 / Double(max(requests, 1))).rounded() / 1000
        p50Us = Double(histogram.percentile(0.5)) / 1000
        p99Us = Double(histogram.percentile(0.99)) / 1000
        p999Us = Double(histogram.percentile(0.999)) / 1000
        maxUs = Double(histogram.maximum) / 1000
    }

    func json() throws -> String {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = .sortedKeys
        return String(decoding: try encoder.encode(self), as: UTF8.self)
    }
}
