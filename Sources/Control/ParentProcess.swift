// The process that started this one, where a server is to live no longer than that.

import CLinux
import Glibc

public enum ParentProcess {
    /// Who gets the children of those that have ended.
    private static let initProcess: pid_t = 1

    /// From now on SIGTERM comes when the parent ends.
    public static func endWithIt() throws(ControlError) {
        let parent = getppid()
        let result = clinux_signal_at_end_of_parent(SIGTERM)
        guard result == 0 else { throw ControlError(cannot: "end with", "the parent", -result) }
        // Nothing comes if it had ended before that.
        guard parent != initProcess, getppid() == parent else {
            throw ControlError(.refused, "the parent, which --exit-with-parent is about, has ended")
        }
    }
}
