// The least that an NBD server can do: requests are answered from memory, with no pool, no queue
// and no other thread behind it. What a real server takes longer than this is its own.

import ArgumentParser
import Foundation
import Sockets

@main
struct Floor: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "floor",
        abstract: "Serve memory over NBD, one thread a connection, as fast as possible.",
        discussion: "Every export name is the same memory. Ends with a signal.")

    @Option(help: ArgumentHelp("Listen on this Unix socket.", valueName: "path"))
    var unix: String?
    @Option(help: ArgumentHelp("Listen on this IPv4 address.", valueName: "host:port"))
    var listen: String?
    @Option(help: ArgumentHelp("Size of the export.", valueName: "bytes"))
    var size: Int
    @Option(
        help: ArgumentHelp(
            "Keep only so much, a power of two, and repeat it.", valueName: "bytes"))
    var region: Int?

    func validate() throws {
        if unix == nil && listen == nil {
            throw ValidationError("give --unix or --listen, or both")
        }
        if size < 1 { throw ValidationError("--size is at least 1") }
        if let region, region < 1 || region.nonzeroBitCount != 1 {
            throw ValidationError("--region is a power of two")
        }
    }

    func run() throws {
        var addresses: [Address] = unix.map { [.unix(path: $0)] } ?? []
        if let listen {
            guard let address = Address(hostAndPort: listen) else {
                throw ValidationError("\(listen) is not host:port")
            }
            addresses.append(address)
        }
        let memory = try Memory(size: size, region: region)
        for address in addresses {
            let listener = try address.listen()
            Thread { Self.accept(listener, address, memory) }.start()
        }
        while true { pause() }
    }

    private static func accept(_ listener: Int32, _ address: Address, _ memory: Memory) {
        do {
            while true {
                let socket = try address.accept(listener)
                let thread = Thread {
                    do {
                        try openSession(socket, memory)
                        try Session(socket: socket, memory: memory).run()
                    } catch {
                        FileHandle.standardError.write(Data("floor: \(error)\n".utf8))
                    }
                    close(socket)
                }
                thread.start()
            }
        } catch {
            FileHandle.standardError.write(Data("floor: \(error)\n".utf8))
            Foundation.exit(EXIT_FAILURE)
        }
    }
}
