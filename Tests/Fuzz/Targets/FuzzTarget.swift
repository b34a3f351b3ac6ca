// What is fuzzed: one type for each target, and the list of them.
//
// 1. A target takes any bytes. It comes back, or it stops the program (a failed precondition, a
//    violated invariant), which is a finding. Errors of the product's own types are answers.
// 2. The same bytes do the same, whatever was run before in the process.

/// Something that fuzzed bytes are fed to.
public protocol FuzzTarget {
    static var name: String { get }
    static func run(_ bytes: UnsafeRawBufferPointer)
    /// Sound inputs, where those do not come about by themselves.
    static var seeds: [[UInt8]] { get }
}

extension FuzzTarget {
    public static var seeds: [[UInt8]] { [] }
}

public enum FuzzTargets {
    public static var all: [any FuzzTarget.Type] {
        [
            SuperblockTarget.self, NodeTarget.self, SpaceMapTarget.self, MetadataTarget.self,
            CheckTarget.self, CatalogueTarget.self, PoolTarget.self, RequestTarget.self,
            HandshakeTarget.self, ConnectionTarget.self, TLSTarget.self,
        ]
    }

    public static func named(_ name: String) -> (any FuzzTarget.Type)? {
        all.first { $0.name == name }
    }
}

/// An invariant that a target checks.
func require(_ holds: Bool, _ what: @autoclosure () -> String) {
    if !holds { fatalError("fuzz: \(what())") }
}
