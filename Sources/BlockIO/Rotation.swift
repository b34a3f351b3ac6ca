// Whether a device turns: then its server tells clients that requests in order are cheaper.

import CLinux
import Glibc

enum Rotation {
    private static let blockDevices = "/sys/dev/block"

    /// What the kernel says of the block device: that itself, or the one that a file is on. False
    /// where it says nothing, as for what is in memory, on the network or on several devices.
    static func isRotational(_ status: stat, isBlockDevice: Bool) -> Bool {
        let device = UInt64(isBlockDevice ? status.st_rdev : status.st_dev)
        return isRotational(
            major: clinux_major(device), minor: clinux_minor(device), in: blockDevices)
    }

    /// A partition has no queue of its own: its disk's is one directory up.
    static func isRotational(major: UInt32, minor: UInt32, in directory: String) -> Bool {
        for queue in ["queue", "../queue"] {
            let path = "\(directory)/\(major):\(minor)/\(queue)/rotational"
            let raw = open(path, O_RDONLY | O_CLOEXEC)
            guard raw >= 0 else { continue }
            let descriptor = OwnedDescriptor(raw)
            var answer: UInt8 = 0
            return read(descriptor.raw, &answer, 1) == 1 && answer == UInt8(ascii: "1")
        }
        return false
    }
}
