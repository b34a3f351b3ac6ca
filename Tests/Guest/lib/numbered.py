# Numbered operations on a file or block device, and the check of what is left of them after a
# crash.
#
# Operation N of a SEED is always the same: it writes one or more slots of 4 KiB, or now and then
# gives a whole pool block back. Every 32 bytes that it writes say which slot they are and N. So
# from the seed and the number of the last acknowledged operation follows all that must be there,
# and the check needs no record of what was written, only how far it got.
#
#   numbered.py write TARGET SEED SLOTS FIRST COUNT [--fua | --no-flush] [--file] [--stop FILE]
#                     [--mark NAME]
#       does COUNT operations, fsync after every few, and prints "acked N" when it has returned.
#       --fua: each operation is durable by itself, by O_DSYNC, instead of fsync
#       --no-flush: neither: acknowledged is what the device has acknowledged
#       --file: TARGET is a file: through the page cache, and no discards
#       --mark: says so also in the log of the log-writes device NAME, as acked:N
#       --stop: ends early, after an acknowledgement, when FILE appears
#
#   numbered.py check TARGET SEED SLOTS RUN... [--file] [--instant | --count-lost]
#       Each RUN is FIRST:ACKED:TRIED, in their order: operations FIRST to ACKED were
#       acknowledged, those up to TRIED may have been done or not. Prints each kind of damage once
#       with its count; exit status 1 when there is any.
#       --instant: the state must be that of one instant: no operation without all before it
#       --count-lost: tell how many acknowledged operations are missing, which is no damage then
import fcntl
import hashlib
import mmap
import os
import struct
import sys

from device_mapper import message

SLOT, SECTOR, PIECE = 4096, 512, 32
BLOCK_SLOTS = 65536 // SLOT
LONGEST = BLOCK_SLOTS + 4                      # slots that one operation writes
BLKDISCARD = 0x1277


def operation(seed, number, slots, discards=True):
    """(first slot, slots, whether they are discarded, how many follow before an fsync)"""
    # Not the random module: in an emulated guest seeding it takes longer than all the rest.
    draw = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    kind, more, place = draw[0], (0, 0, 1, 3, 7)[draw[1] % 5], int.from_bytes(draw[4:], "little")
    if discards and kind < 10:
        return place % (slots // BLOCK_SLOTS) * BLOCK_SLOTS, BLOCK_SLOTS, True, more
    length = 1 if kind < 205 else 2 + draw[2] % (LONGEST - 1)
    return place % (slots - length + 1), length, False, more


def piece(slot, number):
    return b"%010d %020d\n" % (slot, number)


def write(target, seed, slots, first, count, options):
    file_too = "--file" in options
    stop = options.get("--stop")
    flags = os.O_RDWR
    if file_too:
        flags |= os.O_CREAT
    else:
        flags |= os.O_DIRECT
    if "--fua" in options:
        flags |= os.O_DSYNC
    file = os.open(target, flags, 0o644)
    # Direct I/O wants aligned memory.
    buffer = mmap.mmap(-1, LONGEST * SLOT)
    view = memoryview(buffer)
    left = 0
    for number in range(first, first + count):
        slot, length, discard, more = operation(seed, number, slots, not file_too)
        if discard:
            fcntl.ioctl(file, BLKDISCARD, struct.pack("QQ", slot * SLOT, length * SLOT))
        else:
            buffer.seek(0)
            for each in range(slot, slot + length):
                buffer.write(piece(each, number) * (SLOT // PIECE))
            os.pwrite(file, view[: length * SLOT], slot * SLOT)
        if left == 0:
            left = more
        else:
            left -= 1
        if "--no-flush" in options:
            pass
        elif "--fua" in options:
            if discard:
                os.fsync(file)
        elif left == 0 or number == first + count - 1:
            os.fsync(file)
        else:
            continue
        if "--mark" in options:
            message(options["--mark"], f"mark acked:{number}")
        print("acked", number, flush=True)
        if stop and os.path.exists(stop):
            return


def held_number(slot, sector):
    """The operation that wrote the sector, 0 for zeroes or nothing, None for what nobody wrote."""
    if sector.count(0) == len(sector):
        return 0
    try:
        number = int(sector[11:31])
    except ValueError:
        return None
    return number if sector == piece(slot, number) * (SECTOR // PIECE) and number > 0 else None


class Damage(dict):
    def add(self, kind, where):
        self.setdefault(kind, []).append(where)


def late(seen, history, latest, ordered):
    """The slots that are older than the latest operation seen anywhere allows. From the operation
    `ordered` on one followed the other; of the runs before, those that are not certain may never
    have been done."""
    while True:
        result = []
        for slot, found in seen:
            entries = history[slot]

            def outdated(index):
                return any(number < latest and (certain or number >= ordered)
                           for number, certain, _ in entries[index + 1 :])

            if not all(outdated(index) for index in found if entries[index][0] <= latest):
                continue
            # Zeroes do not say of which discard they are: perhaps of one that is later still.
            after = [entries[index][0] for index in found if entries[index][0] > latest]
            if after:
                latest = min(after)
                break
            result.append(slot)
        else:
            return result


def check(target, seed, slots, runs, options):
    discards = "--file" not in options
    # Of each slot, its operations in order: (number, whether it is certain, whether a discard).
    history = [[(0, True, True)] for _ in range(slots)]
    acknowledged = set()
    for first, acked, tried in runs:
        for number in range(first, tried + 1):
            slot, length, discard, _ = operation(seed, number, slots, discards)
            for each in range(slot, slot + length):
                history[each].append((number, number <= acked, discard))
            if number <= acked:
                acknowledged.add(number)
    damage, lost, seen, latest = Damage(), set(), [], 0
    with open(target, "rb") as file:
        for slot in range(slots):
            content = file.read(SLOT)
            # What it may hold: the last operation that is certain, and those after it.
            certain = max(i for i, entry in enumerate(history[slot]) if entry[1])
            # Whole as a rule, after a crash perhaps torn between sectors.
            whole = content.count(content[:PIECE]) == SLOT // PIECE
            for at in range(0, SECTOR if whole else SLOT, SECTOR):
                sector = content[at : at + SECTOR]
                number = held_number(slot, sector)
                if number is None:
                    damage.add("slots that hold something foreign", slot)
                    continue
                found = [i for i, entry in enumerate(history[slot])
                         if (entry[2] if number == 0 else entry[0] == number and not entry[2])]
                if not found:
                    kind = "zeroes nobody asked for" if number == 0 else "operations from nowhere"
                    damage.add(f"slots with {kind}", slot)
                    continue
                if found[-1] < certain:
                    missing = {entry[0] for entry in history[slot][found[-1] + 1 : certain + 1]
                               if entry[1]}
                    lost |= missing
                    if "--count-lost" not in options:
                        damage.add("slots that lack an acknowledged operation", slot)
                seen.append((slot, found))
                # Zeroes may be of any discard: they do not say how late they are.
                latest = max(latest, number)
    if "--instant" in options:
        for slot in late(seen, history, latest, runs[-1][0]):
            damage.add("slots of an earlier instant than others", slot)
    for kind, where in damage.items():
        print(f"{len(set(where))} {kind}, the first is {where[0]}")
    if "--count-lost" in options:
        print(f"lost {len(lost)} of {len(acknowledged)}")
    return 1 if damage else 0


def main():
    words, options = [], {}
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--stop", "--mark"):
            options[word] = next(arguments)
        elif word.startswith("--"):
            options[word] = True
        else:
            words.append(word)
    verb, target, seed, slots = words[0], words[1], words[2], int(words[3])
    if verb == "write":
        write(target, seed, slots, int(words[4]), int(words[5]), options)
        return 0
    runs = [tuple(map(int, run.split(":"))) for run in words[4:]]
    return check(target, seed, slots, runs, options)


sys.exit(main())
