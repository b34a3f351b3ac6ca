# Makes the disks that a power cut would have left, at any moment of a log that dm-log-writes kept
# of one device on which a pool's metadata (the first BOUNDARY bytes) and data (the rest) lie.
#
#   write-log.py LOG points COUNT BOUNDARY SEED
#       so many moments, evenly over the log from the mark "begin" on, each right after a flush, a
#       FUA write or a mark
#   write-log.py LOG state POINT FOLDER BOUNDARY SEED [--forget-data-flushes | --all-marks]
#       FOLDER/metadata and FOLDER/data, which are empty, as they may be after the first POINT
#       entries, and the marks up to there, or all, in FOLDER/marks
#   write-log.py LOG list
#
# The two halves have caches of their own: a flush that was sent to one does nothing for the other;
# the log has it at the place where the half begins. What a half's last flush covers is there, and
# FUA writes are. Of each later write there is all, nothing or a random part, sector by sector. What
# was discarded holds anything.
import os
import random
import struct
import sys

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SECTOR = 512


def entries(log):
    """(flags, offset, length, where the data is in the log, mark) of each entry"""
    magic, version, count, size = struct.unpack("<QQQI", log.read(28))
    if magic != MAGIC or version != 1:
        sys.exit("not a log of dm-log-writes")
    at = size
    for _ in range(count):
        log.seek(at)
        place, length, flags, extra = struct.unpack("<QQQQ", log.read(32))
        mark = log.read(extra).decode() if flags & MARK else None
        at += size
        yield flags, place * SECTOR, length * SECTOR, at, mark
        if not flags & (DISCARD | MARK):
            at += length * SECTOR


def points(log, count, boundary, seed):
    worth, begun, flushes = [], False, set()
    for number, (flags, offset, _, _, mark) in enumerate(entries(log), 1):
        begun = begun or mark == "begin"
        if begun and flags & (FLUSH | FUA | MARK):
            worth.append(number)
        if flags & FLUSH:
            flushes.add(offset >= boundary)
    if len(flushes) < 2:
        sys.exit("the log has flushes for one half only")
    draw = random.Random(seed)
    step = max(1, len(worth) / count)
    start = draw.uniform(0, step)
    chosen = {worth[int(start + step * i)] for i in range(count)
              if int(start + step * i) < len(worth)}
    # The whole log as well: a moment at which nothing is in flight.
    return sorted(chosen | {worth[-1]})


def state(log, point, folder, boundary, seed, option):
    draw = random.Random(f"{seed}/{point}")
    todo = []
    flushed = [0, 0]                            # entries that each half's last flush covers
    with open(f"{folder}/marks", "w") as marks:
        for number, entry in enumerate(entries(log), 1):
            flags, offset, length, _, mark = entry
            if mark is not None:
                if number <= point or option == "--all-marks":
                    print(mark, file=marks)
                continue
            if number > point:
                continue
            half = int(offset >= boundary)
            if flags & FLUSH and not (half == 1 and option == "--forget-data-flushes"):
                flushed[half] = number
            if length:
                todo.append((number, half, entry))
    files = [os.open(f"{folder}/{name}", os.O_RDWR) for name in ("metadata", "data")]
    for number, half, (flags, offset, length, at, _) in todo:
        offset -= half * boundary
        certain = number <= flushed[half] or flags & FUA
        if flags & DISCARD:
            content = b"discarded ......" * (length // 16)
        else:
            log.seek(at)
            content = log.read(length)
        odds = 1 if certain else draw.choice((0, 0.5, 1))
        if odds == 1:
            os.pwrite(files[half], content, offset)
        elif odds:
            for piece in range(0, length, SECTOR):
                if draw.random() < odds:
                    os.pwrite(files[half], content[piece : piece + SECTOR], offset + piece)


def main():
    path, verb, *rest = sys.argv[1:]
    with open(path, "rb") as log:
        if verb == "points":
            print(*points(log, int(rest[0]), int(rest[1]), rest[2]))
        elif verb == "state":
            state(log, int(rest[0]), rest[1], int(rest[2]), rest[3], "".join(rest[4:]))
        else:
            names = ((FLUSH, "flush"), (FUA, "fua"), (DISCARD, "discard"), (MARK, "mark"))
            for number, (flags, offset, length, _, mark) in enumerate(entries(log), 1):
                print(number, ",".join(name for flag, name in names if flags & flag) or "write",
                      offset, length, mark or "")


main()
