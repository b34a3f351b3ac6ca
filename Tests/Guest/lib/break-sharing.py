# Writes 4 KiB of "B" into each of COUNT blocks of 64 KiB on DEVICE, fsync after each, and prints
# "acked N" when the fsync of block N has returned.
#
#   break-sharing.py DEVICE COUNT
import os
import sys

device, count = sys.argv[1], int(sys.argv[2])
file = os.open(device, os.O_WRONLY)
for number in range(count):
    os.pwrite(file, b"B" * 4096, number * 65536 + 8192)
    os.fsync(file)
    print("acked", number, flush=True)
