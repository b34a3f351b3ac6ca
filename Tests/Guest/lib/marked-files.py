# Files that are made, fsynced and deleted, with marks in a log-writes device's log of which must be
# there; and the check of a file system that was put together from a part of that log.
#
#   marked-files.py write FOLDER NAME STOP    until the file STOP appears; marks made:N, gone:N
#   marked-files.py check FOLDER MARKS        MARKS: a file with a mark a line
#
# What is in file N follows from N.
import hashlib
import os
import sys

KEPT = 8


def content(number):
    seed = hashlib.blake2b(str(number).encode()).digest()
    return seed * (seed[0] * 8 + 1)             # up to 128 KiB


def write(folder, name, stop):
    from device_mapper import message
    number = 0
    while not os.path.exists(stop):
        number += 1
        with open(f"{folder}/{number}", "wb") as file:
            file.write(content(number))
            file.flush()
            os.fsync(file.fileno())
        message(name, f"mark made:{number}")
        if number > KEPT:
            message(name, f"mark gone:{number - KEPT}")
            os.unlink(f"{folder}/{number - KEPT}")


def check(folder, marks):
    kept = set()
    with open(marks) as lines:
        for line in lines:
            kind, _, number = line.strip().partition(":")
            if kind == "made":
                kept.add(int(number))
            elif kind == "gone":
                kept.discard(int(number))
    status = 0
    for number in sorted(kept):
        try:
            with open(f"{folder}/{number}", "rb") as file:
                found = file.read()
        except FileNotFoundError:
            found = None
        if found != content(number):
            print(f"the fsynced file {number} is", "missing" if found is None else "damaged")
            status = 1
    return status


if sys.argv[1] == "write":
    write(*sys.argv[2:5])
else:
    sys.exit(check(*sys.argv[2:4]))
