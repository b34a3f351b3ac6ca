# Appends numbered records to a file, fsync after each, and prints "acked N" when the fsync of
# record N has returned. Stops after COUNT records, or when the file STOP appears.
#
#   append-records.py FILE COUNT [STOP]
#
# A record is its number as text, one line: a file cut short anywhere says how far it got.
import os
import sys

path, count = sys.argv[1], int(sys.argv[2])
stop = sys.argv[3] if len(sys.argv) > 3 else None
file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in range(count):
    if stop and os.path.exists(stop):
        break
    os.write(file, b"%015d\n" % number)
    os.fsync(file)
    print("acked", number, flush=True)
