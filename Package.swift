// swift-tools-version: 6.2
import PackageDescription

let swiftSettings: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny")
]

// Targets in the order of the house: each may import only those below it.
let package = Package(
    name: "wafer",
    platforms: [.macOS(.v15)],
    products: [
        .executable(name: "wafer", targets: ["wafer"])
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
    ],
    targets: [
        .executableTarget(
            name: "wafer",
            dependencies: [
                "Control", "NBDServer", "NBDProtocol", "ThinPool", "BlockIO",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: swiftSettings),
        .target(
            name: "Control",
            dependencies: [
                "NBDServer", "NBDProtocol", "ThinPool", "ThinMetadata", "BlockIO", "CLinux",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: swiftSettings),
        .target(
            name: "NBDServer",
            dependencies: [
                "NBDProtocol", "ThinPool", "BlockIO", "CLinux", "CGnuTLS",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: swiftSettings),
        .systemLibrary(
            name: "CGnuTLS", pkgConfig: "gnutls", providers: [.apt(["libgnutls28-dev"])]),
        .target(name: "NBDProtocol", swiftSettings: swiftSettings),
        .testTarget(
            name: "NBDProtocolTests", dependencies: ["NBDProtocol"], swiftSettings: swiftSettings),
        .target(
            name: "ThinPool", dependencies: ["ThinMetadata", "BlockIO", "CLinux"],
            swiftSettings: swiftSettings),
        .target(
            name: "ThinMetadata", dependencies: ["BlockIO", "CLinux"],
            swiftSettings: swiftSettings),
        .target(name: "BlockIO", dependencies: ["CLinux"], swiftSettings: swiftSettings),
        .target(name: "CLinux", linkerSettings: [.linkedLibrary("uring")]),

        // The benchmark's programs: a light client, and the least that a server can do.
        .target(name: "Sockets", path: "Benchmarks/Sockets", swiftSettings: swiftSettings),
        .executableTarget(
            name: "nbdload",
            dependencies: [
                "Sockets", "NBDProtocol",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            path: "Benchmarks/Load", swiftSettings: swiftSettings),
        .executableTarget(
            name: "floor",
            dependencies: [
                "Sockets", "NBDProtocol",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            path: "Benchmarks/Floor", swiftSettings: swiftSettings),

        // The simulator: pool, metadata and commit code over simulated disks, clock and clients.
        .target(
            name: "Simulation",
            dependencies: ["NBDServer", "NBDProtocol", "ThinPool", "ThinMetadata", "BlockIO"],
            path: "Tests/Simulation", swiftSettings: swiftSettings),
        .executableTarget(
            name: "simulate",
            dependencies: [
                "Simulation",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            path: "Tests/Simulate", swiftSettings: swiftSettings),

        // What Scripts/fuzz feeds fuzzed bytes to; FuzzTests feeds it what was found before.
        .target(
            name: "FuzzTargets",
            dependencies: [
                "NBDServer", "NBDProtocol", "ThinPool", "ThinMetadata", "BlockIO", "CLinux",
                "CGnuTLS",
            ],
            path: "Tests/Fuzz/Targets", swiftSettings: swiftSettings),
        .testTarget(
            name: "FuzzTests", dependencies: ["FuzzTargets"], swiftSettings: swiftSettings),

        // Makes large pools for Scripts/scale.
        .executableTarget(
            name: "make-pool",
            dependencies: [
                "Control", "ThinPool", "ThinMetadata", "BlockIO",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            path: "Benchmarks/MakePool", swiftSettings: swiftSettings),
        .executableTarget(
            name: "microbench",
            dependencies: ["ThinPool", "ThinMetadata", "NBDProtocol", "BlockIO", "CLinux"],
            path: "Benchmarks/Micro", swiftSettings: swiftSettings),

        .testTarget(
            name: "BlockIOTests", dependencies: ["BlockIO"], swiftSettings: swiftSettings),
        .testTarget(
            name: "ThinMetadataTests", dependencies: ["ThinMetadata", "BlockIO"],
            swiftSettings: swiftSettings),
        .testTarget(
            name: "MetadataCheckTests", dependencies: ["ThinMetadata", "BlockIO"],
            swiftSettings: swiftSettings),
        .testTarget(
            name: "ThinPoolTests",
            dependencies: ["Simulation", "ThinPool", "ThinMetadata", "BlockIO", "CLinux"],
            swiftSettings: swiftSettings),
        .testTarget(
            name: "NBDServerTests",
            dependencies: [
                "NBDServer", "NBDProtocol", "ThinPool", "ThinMetadata", "BlockIO", "CGnuTLS",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: swiftSettings),
        .testTarget(
            name: "CommandTests",
            dependencies: ["wafer", "Control", "ThinPool", "ThinMetadata", "BlockIO"],
            swiftSettings: swiftSettings),
        // The built command against other people's programs.
        .systemLibrary(
            name: "CLibNBD", path: "Tests/CLibNBD", pkgConfig: "libnbd",
            providers: [.apt(["libnbd-dev"])]),
        .testTarget(
            name: "HostTests", dependencies: ["wafer", "nbdload", "floor", "CLibNBD"],
            swiftSettings: swiftSettings),
    ]
)

// libFuzzer's runtime is linked only where Scripts/fuzz asks for it. gold fails on its debug
// information.
if Context.environment["WAFER_FUZZ"] != nil {
    package.targets.append(
        .executableTarget(
            name: "fuzz", dependencies: ["FuzzTargets"], path: "Tests/Fuzz/Run",
            swiftSettings: swiftSettings, linkerSettings: [.unsafeFlags(["-use-ld=lld"])]))
}
