# Several connections to one export: what one is told is durable is there for the others, too.
#
#   connections.py URI...

import sys
import threading

import nbd

handles = []
for index in range(8):
    h = nbd.NBD()
    h.connect_uri(sys.argv[1 + index % (len(sys.argv) - 1)])
    assert h.can_multi_conn()
    handles.append(h)


def work(index):
    h = handles[index]
    for turn in range(1, 40):
        h.pwrite(bytes([turn + index]) * 4096, (index * 40 + turn) * 4096)


threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
handles[0].flush()
for index in range(8):
    for turn in range(1, 40):
        found = handles[(index + turn) % 8].pread(4096, (index * 40 + turn) * 4096)
        assert found == bytes([turn + index]) * 4096, (index, turn)
for h in handles:
    h.shutdown()
