"""What Wafer is to reach, as data: which figure of which row, divided by whose, and the bound.

Against several servers the ratio is that to the one which is best in that figure.
"""
from dataclasses import dataclass

from rows import DISK, LOOP, MEMORY

PEERS = r"(?!wafer|floor|file).*"
QEMU = r"qemu-raw-.*"
QCOW2 = r"qemu-qcow2-(cached|direct|native)"
QCOW2X = r"qemu-qcow2x-(cached|direct|native)"
FILE = r"file"
WAFER = r"wafer"

IOPS, CPU, P99, SECONDS = "iops", "cpu_us", "p99_us", "seconds"


@dataclass(frozen=True)
class Goal:
    storage: str
    row: str
    figure: str
    bound: float
    against: str
    # The others' row; by default the same one.
    other_row: str = ""

    @property
    def is_floor(self):
        """More is better of IOPS, less of everything else."""
        return self.figure == IOPS


def better(storage, row, against, iops, cpu=None, p99=None):
    """At least so many times the IOPS, for at most that share of the processor time."""
    found = [Goal(storage, row, IOPS, iops, against)]
    found += [Goal(storage, row, CPU, cpu, against)] if cpu else []
    found += [Goal(storage, row, P99, p99, against)] if p99 else []
    return found


GOALS = [
    *better(MEMORY, "randread-4k-qd32", PEERS, 6, cpu=1 / 6),
    *better(MEMORY, "randread-4k-qd32-fio", PEERS, 1.3, cpu=1 / 2.5),
    *better(MEMORY, "randwrite-4k-qd32", PEERS, 2, cpu=1 / 2.5),
    *better(MEMORY, "randwrite-4k-qd32-fio", PEERS, 1.0, cpu=1 / 1.5),
    *better(MEMORY, "randread-4k-qd32-4c", PEERS, 5),
    *better(MEMORY, "randwrite-4k-qd32-4c", PEERS, 4),
    *better(LOOP, "randread-4k-qd32", QEMU, 2, cpu=1 / 3),
    *better(LOOP, "randwrite-4k-qd32", QEMU, 2, cpu=1 / 3),
    *better(MEMORY, "randread-4k-qd1", PEERS, 1.0, cpu=0.8, p99=1.0),
    *better(MEMORY, "randwrite-4k-qd1", PEERS, 1.0, cpu=0.8, p99=1.0),
    *better(MEMORY, "read-128k-qd8", PEERS, 1.0, cpu=0.8),
    *better(MEMORY, "write-128k-qd8", PEERS, 1.0, cpu=0.8),
    *better(LOOP, "read-128k-qd8", QEMU, 1.5, cpu=0.8),
    *better(LOOP, "write-128k-qd8", QEMU, 1.5, cpu=0.8),
    *better(MEMORY, "first-4k-qd32", QCOW2, 3),
    *better(MEMORY, "first-4k-qd32", QCOW2X, 1.5),
    *better(MEMORY, "first-128k-qd8", QCOW2, 1.5),
    Goal(MEMORY, "first-128k-qd8", IOPS, 0.9, WAFER, other_row="write-128k-qd8"),
    *better(MEMORY, "snapshot-4k-qd32", QCOW2 + ", internal", 5),
    *better(MEMORY, "snapshot-4k-qd32", QCOW2 + ", overlay", 2),
    *better(MEMORY, "snapshot-4k-qd32", QCOW2X + ", overlay", 1),
    *better(DISK, "write+flush-4k", FILE, 0.9),
    *better(DISK, "write+flush-4k-16c", FILE, 0.9),
    Goal(DISK, "write+flush-4k-16c", IOPS, 6, WAFER, other_row="write+flush-4k"),
    *better(MEMORY, "holes-4k-qd32", PEERS, 4),
    Goal(MEMORY, "copy-sparse", SECONDS, 1.5, WAFER, other_row="copy-full"),
]
