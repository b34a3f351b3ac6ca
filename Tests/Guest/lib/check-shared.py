# After a power cut: what break-sharing.py was told is written must be there, and nothing else may
# have changed. Prints each kind of damage once with its count; exit status 1 when there is any.
#
#   check-shared.py ORIGIN SNAPSHOT BLOCKS ACKED
#
# The first ACKED blocks of ORIGIN are all "A" but for 4 KiB of "B"; in the later ones these 4 KiB
# may be either; all of SNAPSHOT is "A".
import sys

origin_path, snapshot_path, blocks, acked = *sys.argv[1:3], *map(int, sys.argv[3:5])
damage = {}
with open(origin_path, "rb") as origin, open(snapshot_path, "rb") as snapshot:
    for number in range(blocks):
        block = origin.read(65536)
        written, around = block[8192:12288], block[:8192] + block[12288:]
        kind = None
        if around != b"A" * len(around):
            kind = "blocks whose neighbouring bytes changed"
        elif number < acked and written != b"B" * 4096:
            kind = "acknowledged writes that are missing"
        elif any(written[at:at + 512] not in (b"A" * 512, b"B" * 512)
                 for at in range(0, 4096, 512)):
            kind = "unacknowledged writes that left something foreign"
        if kind:
            damage.setdefault(kind, []).append(number)
        if snapshot.read(65536) != b"A" * 65536:
            damage.setdefault("blocks of the snapshot that changed", []).append(number)
for kind, numbers in damage.items():
    print(f"{len(numbers)} {kind}, the first is {numbers[0]}")
sys.exit(1 if damage else 0)
