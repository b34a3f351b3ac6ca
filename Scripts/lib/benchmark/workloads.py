"""The rows of the benchmark: what fio does, and on which kind of volume."""
from dataclasses import dataclass
from enum import Enum

# Virtual size of the volumes for first writes: so much larger than what a sample writes that nearly
# every random write finds a block nobody has written.
EMPTY_SIZE = 64 << 30
# Most bytes of space a sample of first writes may take.
EMPTY_SPACE = 2 << 30
BLOCK = 64 << 10                  # Wafer's and qcow2's unit of space here


class Volume(Enum):
    FILLED = "written once from end to end"
    EMPTY = "nothing written yet, made for the sample"
    SNAPSHOT = "filled, then a snapshot taken, made for the sample"


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    volume: Volume
    fio: tuple
    # Repeats until the time is up; else one pass, cut off when the time is up.
    loops: bool = True
    # Most requests, for each BLOCK of the volume; 0: no limit.
    requests_a_block: float = 0
    # Where --short has the row: the rows that hardly depend on storage are measured in memory.
    short: tuple = ("memory",)

    def short_on(self, storage):
        return ("memory" if storage.is_memory else "disk") in self.short

    def variants(self, server):
        """How a server takes its snapshot, where there is more than one way; else just once."""
        return server.snapshots if self.volume is Volume.SNAPSHOT else ("",)


def row(name, title, volume, rw, size, depth, *more, **options):
    return Workload(
        name, title, volume,
        (f"--rw={rw}", f"--bs={size}", f"--iodepth={depth}", *more), **options)


BOTH = ("memory", "disk")

FILL = row("fill", "", Volume.EMPTY, "write", "128k", 8, loops=False)

WORKLOADS = [
    row("randread-4k-qd1", "4 KiB random reads, depth 1", Volume.FILLED, "randread", "4k", 1),
    row("randread-4k-qd32", "4 KiB random reads, depth 32", Volume.FILLED, "randread", "4k", 32,
        short=BOTH),
    row("randwrite-4k-qd1", "4 KiB random writes, depth 1", Volume.FILLED, "randwrite", "4k", 1),
    row("randwrite-4k-qd32", "4 KiB random writes, depth 32", Volume.FILLED, "randwrite", "4k", 32,
        short=BOTH),
    row("read-128k-qd8", "128 KiB sequential reads, depth 8", Volume.FILLED, "read", "128k", 8),
    row("write-128k-qd8", "128 KiB sequential writes, depth 8", Volume.FILLED, "write", "128k", 8),
    row("write+flush-4k-qd1", "4 KiB random write and flush, one after the other", Volume.FILLED,
        "randwrite", "4k", 1, "--fsync=1", short=BOTH),
    row("first-4k-qd32", "first writes: 4 KiB random, depth 32", Volume.EMPTY, "randwrite", "4k",
        32, loops=False, requests_a_block=EMPTY_SPACE / EMPTY_SIZE, short=BOTH),
    row("first-128k-qd8", "first writes: 128 KiB sequential, depth 8", Volume.EMPTY, "write",
        "128k", 8, f"--io_size={EMPTY_SPACE}", loops=False),
    # With a write for every second block, four of five writes find theirs still shared.
    row("snapshot-4k-qd32", "writes after a snapshot: 4 KiB random, depth 32", Volume.SNAPSHOT,
        "randwrite", "4k", 32, loops=False, requests_a_block=0.5, short=BOTH),
]
