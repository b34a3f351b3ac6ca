# STARTTLS as an option among others: what was agreed on before it is forgotten by both.
#
#   starttls.py SOCKET KEYS

import sys

import nbd

if not hasattr(nbd.NBD, "opt_starttls"):
    print("this libnbd sends no options one by one")
    sys.exit()

h = nbd.NBD()
h.set_opt_mode(True)
h.set_request_structured_replies(False)
h.set_tls_psk_file(sys.argv[2])
h.set_tls_username("alice")
h.set_export_name("secret")
h.connect_unix(sys.argv[1])
assert h.opt_structured_reply()
try:
    h.opt_info()
    raise AssertionError("an export for TLS only told of itself without TLS")
except nbd.Error:
    pass
names = []
h.opt_list(lambda name, description: names.append(name))
assert "secret" not in names, names
assert h.opt_starttls() and h.get_tls_negotiated()
assert not h.get_structured_replies_negotiated()
names.clear()
h.opt_list(lambda name, description: names.append(name))
assert "secret" in names, names
h.opt_go()
h.pwrite(b"t" * 512, 0)
assert h.pread(512, 0) == b"t" * 512
h.shutdown()
