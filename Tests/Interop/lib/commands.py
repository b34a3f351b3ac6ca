# Every command and flag through libnbd.
#
#   commands.py URI simple|structured|extended
#
# libnbd itself checks each reply against the protocol: a chunk that does not belong ends the
# connection, and the script with it.

import errno
import sys

import nbd

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
BLOCK = 65536
MAX_PAYLOAD = 32 * MIB

uri, format_name = sys.argv[1:]


def connect(**meta):
    """A handle in the format that was asked for, or as near as this libnbd gets."""
    h = nbd.NBD()
    if format_name == "simple":
        h.set_request_structured_replies(False)
    if hasattr(h, "set_request_extended_headers"):
        h.set_request_extended_headers(format_name == "extended")
    if format_name != "simple":
        for context in meta.get("contexts", ["base:allocation", "wafer:shared"]):
            h.add_meta_context(context)
    h.set_uri_allow_local_file(True)                  # certificates and keys
    h.connect_uri(uri)
    return h


def refused(code, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as error:
        assert error.errnum == code, f"{call.__name__}{args}: {error}, not {errno.errorcode[code]}"
    else:
        raise AssertionError(f"{call.__name__}{args} was not refused")


def extents(h, length, offset, flags=0):
    found = {}

    def collect(context, start, entries, error):
        assert start == offset
        found[context] = list(zip(entries[::2], entries[1::2]))

    h.block_status(length, offset, collect, flags)
    return found


h = connect()
size = h.get_size()
assert size == 8 * TIB
extended = hasattr(h, "get_extended_headers_negotiated") and h.get_extended_headers_negotiated()
if format_name == "extended" and not extended:
    assert not hasattr(h, "get_extended_headers_negotiated"), "no extended headers"
    print("this libnbd has no extended headers: as structured")
assert h.get_structured_replies_negotiated() == (format_name != "simple")

# Reads and writes of all kinds of lengths, also the longest.
for offset, length in [(0, 512), (512, 1024), (BLOCK - 512, 1024), (3 * MIB - 512, 2 * MIB + 512),
                       (size - 512, 512), (64 * MIB + 512, MAX_PAYLOAD)]:
    data = bytes([offset // 512 % 251 + 1]) * length
    h.pwrite(data, offset, nbd.CMD_FLAG_FUA if length == 1024 else 0)
    assert h.pread(length, offset) == data
h.flush()

# A read with holes in it, whole and in pieces; one chunk with DF.
h.trim(MIB, 10 * MIB, nbd.CMD_FLAG_FUA)
h.pwrite(b"a" * 4096, 10 * MIB + BLOCK)
expected = bytes(BLOCK) + b"a" * 4096 + bytes(MIB - BLOCK - 4096)
assert h.pread(MIB, 10 * MIB) == expected
chunks = []


def chunk(part, offset, kind, error):
    chunks.append((offset - 10 * MIB, len(part), kind))


assert h.pread_structured(MIB, 10 * MIB, chunk) == expected
if format_name == "simple":
    assert chunks == [(0, MIB, nbd.READ_DATA)], chunks
    refused(errno.EINVAL, h.pread_structured, MIB, 10 * MIB, chunk, nbd.CMD_FLAG_DF)
else:
    assert (0, BLOCK, nbd.READ_HOLE) in chunks and len(chunks) == 3, chunks
    chunks.clear()
    assert h.pread_structured(MIB, 10 * MIB, chunk, nbd.CMD_FLAG_DF) == expected
    assert chunks == [(0, MIB, nbd.READ_DATA)], chunks

# Zeroes in every way.
h.pwrite(b"b" * MIB, 20 * MIB)
h.zero(4096, 20 * MIB)
h.zero(BLOCK, 20 * MIB + BLOCK, nbd.CMD_FLAG_FUA)
h.zero(BLOCK, 20 * MIB + 2 * BLOCK, nbd.CMD_FLAG_NO_HOLE)
h.zero(BLOCK, 20 * MIB + 3 * BLOCK, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
refused(errno.ENOTSUP, h.zero, 512, 20 * MIB + 5 * BLOCK, nbd.CMD_FLAG_FAST_ZERO)
refused(errno.ENOTSUP, h.zero, BLOCK, 20 * MIB + 5 * BLOCK,
        nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(MIB, 20 * MIB) == (
    bytes(4096) + b"b" * (BLOCK - 4096) + bytes(3 * BLOCK) + b"b" * (MIB - 4 * BLOCK))
h.cache(MIB, 20 * MIB)
h.cache(512, size - 512)
limit = 1 * TIB if extended else 4 * GIB - BLOCK
h.trim(limit, 4 * TIB)
h.zero(limit, 4 * TIB)
h.zero(limit, 4 * TIB, nbd.CMD_FLAG_FAST_ZERO)
h.cache(limit, 4 * TIB)

# Block status; libnbd knows that there is none without chunks.
if format_name == "simple":
    refused(errno.ENOTSUP, h.block_status, MIB, 0, lambda *_: 0)
else:
    found = extents(h, MIB, 20 * MIB)
    assert set(found) == {"base:allocation", "wafer:shared"}, found
    assert found["base:allocation"][:3] == [(BLOCK, 0), (BLOCK, 3), (BLOCK, 0)], found
    assert sum(length for length, _ in found["base:allocation"]) >= MIB
    one = extents(h, MIB, 20 * MIB, nbd.CMD_FLAG_REQ_ONE)
    assert one["base:allocation"] == [(BLOCK, 0)] and len(one["wafer:shared"]) == 1, one
    assert extents(h, 512, size - 512)["base:allocation"] == [(512, 0)]
if extended:
    found = {}
    h.block_status_64(2 * TIB, 4 * TIB, lambda context, start, entries, error:
                      found.update({context: entries}))
    assert found["base:allocation"] == [(2 * TIB, 3)], found
    # The payload names contexts; one that was not negotiated is libnbd's to refuse.
    found = {}
    h.block_status_filter(MIB, 20 * MIB, ["wafer:shared"],
                          lambda context, start, entries, error: found.update({context: entries}))
    assert set(found) == {"wafer:shared"}, found

# Many at once, answered in any order.
cookies = []
for index in range(200):
    start = GIB + index * 4096
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([index + 1]) * 4096), start))
while cookies:
    h.poll(-1)
    cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
h.flush()
assert h.pread(200 * 4096, GIB) == b"".join(bytes([i + 1]) * 4096 for i in range(200))

# What is against the rules: the server says so, and the connection goes on.
h.set_strict_mode(0)
for offset, length in [(1, 512), (512, 511)]:
    refused(errno.EINVAL, h.pread, length, offset)
    refused(errno.EINVAL, h.pwrite, b"c" * length, offset)
    refused(errno.EINVAL, h.trim, length, offset)
    refused(errno.EINVAL, h.zero, length, offset)
refused(errno.EINVAL, h.pread, 1024, size - 512)
refused(errno.ENOSPC, h.pwrite, b"c" * 1024, size - 512)
refused(errno.ENOSPC, h.zero, 1024, size - 512)
refused(errno.EINVAL, h.trim, 1024, size - 512)
refused(errno.EINVAL, h.flush, 1 << 14)
refused(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
refused(errno.EINVAL, h.pwrite, b"c" * 512, 0, nbd.CMD_FLAG_DF)
h.pread(512, 0, nbd.CMD_FLAG_FUA)
if format_name == "simple":
    refused(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
else:
    refused(errno.EINVAL, h.block_status, 1024, size - 512, lambda *_: 0)
assert h.pread(512, 0) == bytes([1]) * 512
h.shutdown()
