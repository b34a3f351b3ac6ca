"""The rows of the benchmark: what a load generator does, on which kind of volume, and where.

`full` names the kinds of storage that have the row. `short` is the row in --short: for each kind of
storage the servers beside Wafer that have turned out to be the best ones there, or that a goal is
about.
"""
from dataclasses import dataclass, field
from enum import Enum

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Virtual size of the volumes for first writes and holes: so much larger than what a sample writes
# that nearly every random write finds a block nobody has written.
EMPTY_SIZE = 64 * GIB
# Most bytes of space a sample of first writes may take.
EMPTY_SPACE = 2 * GIB
# Virtual size of a volume that is mapped only in its first part, for copies.
SPARSE_SIZE = 16 * GIB
BLOCK = 64 * KIB                  # Wafer's and qcow2's unit of space here

MEMORY, DISK, LOOP = "memory", "disk", "loop"
LIGHT, FIO, COPY = "light", "fio", "nbdcopy"
UNIX, TCP = "unix", "tcp"


class Volume(Enum):
    FILLED = "written once from end to end"
    EMPTY = "nothing written yet, made for the sample"
    SNAPSHOT = "filled, then a snapshot taken, made for the sample"
    SPARSE = "filled in its first part, made for the sample"

    def sizes(self, size):
        """The volume's size and how much of it is written beforehand."""
        return {Volume.FILLED: (size, size), Volume.EMPTY: (EMPTY_SIZE, 0),
                Volume.SNAPSHOT: (2 * size, 2 * size), Volume.SPARSE: (SPARSE_SIZE, size)}[self]

    def space(self, size):
        """Bytes that a sample may end up taking."""
        return {Volume.FILLED: size, Volume.EMPTY: EMPTY_SPACE,
                Volume.SNAPSHOT: 4 * size, Volume.SPARSE: size}[self]


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    operation: str                # as nbdload names it
    block: int = 4 * KIB
    depth: int = 32
    connections: int = 1
    volume: Volume = Volume.FILLED
    generator: str = LIGHT
    transport: str = UNIX
    # Most requests for each BLOCK of the volume; 0: until the time is up.
    requests_a_block: float = 0
    full: tuple = (MEMORY, DISK, LOOP)
    short: dict = field(default_factory=dict)

    def requests(self, size):
        return int(size / BLOCK * self.requests_a_block)

    def variants(self, server):
        """How a server takes its snapshot, where there is more than one way; else just once."""
        return server.snapshots if self.volume is Volume.SNAPSHOT else ("",)


IN_MEMORY = ("floor", "nbdkit-file", "nbdkit-memory")
DIRECT = ("qemu-raw-direct", "qemu-raw-native")

ROWS = [
    Row("randread-4k-qd32", "4 KiB random reads, depth 32", "randread",
        short={MEMORY: IN_MEMORY, LOOP: DIRECT}),
    Row("randread-4k-qd32-fio", "4 KiB random reads, depth 32, fio", "randread", generator=FIO,
        short={MEMORY: IN_MEMORY}),
    Row("randread-4k-qd32-4c", "4 KiB random reads, 4 connections of depth 32", "randread",
        connections=4, short={MEMORY: IN_MEMORY}),
    Row("randread-4k-qd1", "4 KiB random reads, depth 1", "randread", depth=1,
        short={MEMORY: IN_MEMORY}),
    Row("randwrite-4k-qd32", "4 KiB random writes, depth 32", "randwrite",
        short={MEMORY: IN_MEMORY, LOOP: DIRECT}),
    Row("randwrite-4k-qd32-fio", "4 KiB random writes, depth 32, fio", "randwrite", generator=FIO,
        short={MEMORY: IN_MEMORY}),
    Row("randwrite-4k-qd32-4c", "4 KiB random writes, 4 connections of depth 32", "randwrite",
        connections=4, short={MEMORY: IN_MEMORY}),
    Row("randwrite-4k-qd1", "4 KiB random writes, depth 1", "randwrite", depth=1,
        short={MEMORY: IN_MEMORY}),
    Row("read-128k-qd8", "128 KiB sequential reads, depth 8", "read", block=128 * KIB, depth=8,
        short={MEMORY: (*IN_MEMORY, "nbd-server"), LOOP: DIRECT}),
    Row("write-128k-qd8", "128 KiB sequential writes, depth 8", "write", block=128 * KIB, depth=8,
        short={MEMORY: (*IN_MEMORY, "nbd-server"), LOOP: DIRECT}),

    Row("randread-4k-qd32-tcp", "4 KiB random reads, depth 32, TCP", "randread", transport=TCP,
        full=(MEMORY,), short={MEMORY: IN_MEMORY}),
    Row("randwrite-4k-qd32-tcp", "4 KiB random writes, depth 32, TCP", "randwrite", transport=TCP,
        full=(MEMORY,), short={MEMORY: IN_MEMORY}),
    Row("randread-4k-qd1-tcp", "4 KiB random reads, depth 1, TCP", "randread", depth=1,
        transport=TCP, full=(MEMORY,)),
    Row("randwrite-4k-qd1-tcp", "4 KiB random writes, depth 1, TCP", "randwrite", depth=1,
        transport=TCP, full=(MEMORY,)),

    Row("write+flush-4k", "4 KiB random write and flush, one after the other", "write+flush",
        depth=1, short={DISK: ("file", "nbdkit-file")}),
    Row("write+flush-4k-16c", "4 KiB random write and flush, 16 connections", "write+flush",
        depth=1, connections=16, short={DISK: ("file", "nbdkit-file")}),

    Row("first-4k-qd32", "first writes: 4 KiB random, depth 32", "randwrite", volume=Volume.EMPTY,
        requests_a_block=EMPTY_SPACE / EMPTY_SIZE,
        short={MEMORY: ("qemu-qcow2-cached", "qemu-qcow2x-cached")}),
    Row("first-128k-qd8", "first writes: 128 KiB sequential, depth 8", "write", block=128 * KIB,
        depth=8, volume=Volume.EMPTY, requests_a_block=EMPTY_SPACE / EMPTY_SIZE / 2,
        short={MEMORY: ("qemu-qcow2-cached",)}),
    # With a write for every second block, four of five writes find theirs still shared.
    Row("snapshot-4k-qd32", "writes after a snapshot: 4 KiB random, depth 32", "randwrite",
        volume=Volume.SNAPSHOT, requests_a_block=0.5,
        short={MEMORY: ("qemu-qcow2-cached, internal", "qemu-qcow2-cached, overlay",
                        "qemu-qcow2x-cached, overlay")}),
    Row("holes-4k-qd32", "reads of holes: 4 KiB random, depth 32", "randread",
        volume=Volume.EMPTY, short={MEMORY: (*IN_MEMORY, "qemu-qcow2-cached")}),

    Row("copy-full", "copy of a volume, all of it mapped", "read", generator=COPY,
        full=(MEMORY,), short={MEMORY: ("nbdkit-file",)}),
    Row("copy-sparse", f"copy of a volume of {SPARSE_SIZE >> 30} GiB, as much of it mapped",
        "read", generator=COPY, volume=Volume.SPARSE, full=(MEMORY,),
        short={MEMORY: ("nbdkit-file",)}),
]

FILL = Row("fill", "", "write", block=128 * KIB, depth=8)
