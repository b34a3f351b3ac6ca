// One target under libFuzzer: `WAFER_FUZZ_TARGET=name fuzz [libFuzzer's arguments]`. Built and run by
// Scripts/fuzz.
//
// libFuzzer brings a `main` of its own; linking takes this one, which calls its driver. The driver
// may start the program again with the same arguments (-merge, -jobs): so the target's name is in the
// environment.
import FuzzTargets
import Glibc

@_silgen_name("LLVMFuzzerRunDriver")
private func runDriver(
    _ count: UnsafeMutablePointer<CInt>,
    _ arguments: UnsafeMutablePointer<UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>>,
    _ test: @convention(c) (UnsafePointer<UInt8>?, Int) -> CInt
) -> CInt

nonisolated(unsafe) private var target: any FuzzTarget.Type = FuzzTargets.all[0]

@main
struct Fuzz {
    static func main() {
        if CommandLine.arguments.dropFirst() == ["--list"] {
            for target in FuzzTargets.all { print(target.name) }
            return
        }
        guard let name = getenv("WAFER_FUZZ_TARGET").map({ String(cString: $0) }),
            let named = FuzzTargets.named(name)
        else {
            fatalError("fuzz: WAFER_FUZZ_TARGET names no target (--list shows them)")
        }
        target = named
        if CommandLine.arguments.dropFirst().first == "--seeds" {
            return writeSeeds(to: CommandLine.arguments[2])
        }
        var count = CommandLine.argc
        var arguments = CommandLine.unsafeArgv
        exit(
            runDriver(&count, &arguments) { bytes, count in
                target.run(UnsafeRawBufferPointer(start: bytes, count: count))
                return 0
            })
    }

    private static func writeSeeds(to directory: String) {
        for (index, seed) in target.seeds.enumerated() {
            guard let file = fopen("\(directory)/seed-\(index)", "w") else {
                fatalError("fuzz: no seeds can be written to \(directory)")
            }
            fwrite(seed, 1, seed.count, file)
            fclose(file)
        }
    }
}
