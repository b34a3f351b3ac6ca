# A message to a device-mapper target, as from "dmsetup message NAME 0 TEXT", which is a process
# and thus dear in an emulated guest.
import fcntl
import struct

# linux/dm-ioctl.h
HEADER = struct.Struct("=III III i III Q 128s 129s 7s")
TARGET_MESSAGE = 0xC138FD0E


def message(name, text):
    payload = struct.pack("=Q", 0) + text.encode() + b"\0"
    size = HEADER.size + len(payload)
    header = HEADER.pack(
        4, 0, 0, size, HEADER.size, 0, 0, 0, 0, 0, 0, name.encode(), b"", b"")
    with open("/dev/mapper/control", "rb") as control:
        fcntl.ioctl(control, TARGET_MESSAGE, bytearray(header + payload))
