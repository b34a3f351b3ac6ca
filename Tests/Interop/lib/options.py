# The handshake's options through libnbd's option mode. The volumes are those of libnbd-options.
#
#   options.py SOCKET

import itertools
import sys

import nbd

socket = sys.argv[1]
NEW = hasattr(nbd.NBD, "opt_structured_reply")        # 1.16 and later send options one by one
EXTENDED = hasattr(nbd.NBD, "opt_extended_headers")   # 1.18 and later


def haggling(negotiates=True):
    h = nbd.NBD()
    h.set_opt_mode(True)
    if not negotiates:
        h.set_request_structured_replies(False)
        if EXTENDED:
            h.set_request_extended_headers(False)
        if hasattr(h, "set_request_meta_context"):
            h.set_request_meta_context(False)
    h.connect_unix(socket)
    return h


def refused(call, *args):
    try:
        call(*args)
    except nbd.Error:
        return
    raise AssertionError(f"{call.__name__} was not refused")


def exports(h):
    found = []
    h.opt_list(lambda name, description: found.append((name, description)))
    return found


def contexts(h, *queries):
    found = []
    for query in queries:
        h.add_meta_context(query)
    h.opt_list_meta_context(found.append)
    h.clear_meta_contexts()
    return found


ALL = ["base:allocation", "wafer:shared", "wafer:changed-since:monday"]

# Lists, information and contexts of one export after the other in one session.
h = haggling()
THIN, ARCHIVE = (f"{words}, data blocks of 64 KiB" for words in ["thin volume", "of last year"])
expected = [("archive", ARCHIVE), ("home", THIN), ("monday", THIN)]
assert exports(h) == expected, exports(h)
for name, size, read_only in [("home", 1 << 30, False), ("archive", 16 << 20, True)] * 2:
    h.set_export_name(name)
    if hasattr(h, "set_full_info"):
        h.set_full_info(True)
    h.opt_info()
    assert h.get_size() == size and h.is_read_only() == read_only
    assert h.get_canonical_export_name() == name
    assert h.get_export_description() == (ARCHIVE if read_only else THIN)
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 512
h.set_export_name("absent")
refused(h.opt_info)
refused(h.opt_go)
h.set_export_name("")                                 # several volumes, no default export
refused(h.opt_info)
h.set_export_name("home")
assert contexts(h) == ALL, contexts(h)
assert contexts(h, "wafer:") == ALL[1:]
assert contexts(h, "base:", "wafer:shared") == ALL[:2]
assert contexts(h, "other:") == []
if hasattr(h, "opt_list_meta_context_queries"):
    found = []
    h.opt_list_meta_context_queries(["wafer:", "base:allocation"], found.append)
    assert sorted(found) == sorted(ALL), found
    found.clear()
    h.opt_set_meta_context_queries(["wafer:shared", "wafer:", "other:"], found.append)
    assert found == ["wafer:shared"], found
h.set_export_name("archive")
assert contexts(h) == ALL[:2]
h.set_export_name("home")
h.add_meta_context("wafer:changed-since:monday")
h.add_meta_context("other:thing")
h.opt_go()
assert h.can_meta_context("wafer:changed-since:monday")
assert not h.can_meta_context("other:thing") and not h.can_meta_context("base:allocation")
assert h.pread(512, 0) == bytes(512)
h.shutdown()

h = haggling()
h.opt_abort()

# Options one by one: every order, and the first two once more behind the others. A context that was
# selected stays so, whatever format is agreed on later.
if NEW:
    def set_context(h):
        """Refused before chunks are agreed on, so the answer depends on the order."""
        h.set_export_name("home")
        h.add_meta_context("wafer:shared")
        try:
            h.opt_set_meta_context(lambda name: None)
            return True
        except nbd.Error:
            return False
        finally:
            h.clear_meta_contexts()

    steps = {
        "list": lambda h: exports(h),
        "structured": lambda h: h.opt_structured_reply(),
        "context": set_context,
        "info": lambda h: h.opt_info(),
    }
    if EXTENDED:
        steps["extended"] = lambda h: h.opt_extended_headers()
    count = 0
    for order in itertools.permutations(steps):
        h = haggling(negotiates=False)
        h.set_export_name("home")
        chunks = extended = selected = False
        for name in order + order[:2]:
            answer = steps[name](h)
            if name == "structured":
                assert answer == (not extended), order
                chunks = True
            elif name == "extended":
                assert answer, order
                chunks = extended = True
            elif name == "context":
                assert answer == chunks, order
                selected = answer
        h.opt_go()
        assert h.get_structured_replies_negotiated() == chunks
        if EXTENDED:
            assert h.get_extended_headers_negotiated() == extended
        if selected:
            assert h.can_meta_context("wafer:shared"), order
        h.pwrite(b"o" * 512, 512)
        assert h.pread(1024, 0) == bytes(512) + b"o" * 512
        h.shutdown()
        count += 1
    print(f"{count} orders of {len(steps)} options")
else:
    print("this libnbd sends no options one by one")
