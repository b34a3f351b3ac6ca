"""A small NBD client: lists exports, opens one, reads and writes a request at a time."""
import socket
import struct

MAGIC = 0x4E42444D41474943          # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054   # "IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
FIXED_NEWSTYLE_NO_ZEROES = 3
OPTION_ABORT, OPTION_LIST, OPTION_GO = 2, 3, 7
REPLY_ACK, REPLY_SERVER = 1, 2
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3


class NBDError(Exception):
    pass


class Client:
    """One connection. `export` None: for `list` only."""

    def __init__(self, address, export=None):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(address))
        self.file = self.socket.makefile("rb")
        magic, option, _ = struct.unpack(">QQH", self.file.read(18))
        if (magic, option) != (MAGIC, OPTION_MAGIC):
            raise NBDError("not an NBD server")
        self.socket.sendall(struct.pack(">I", FIXED_NEWSTYLE_NO_ZEROES))
        self.export = export
        if export is not None:
            name = export.encode()
            self.option(OPTION_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
            while self.reply()[0] != REPLY_ACK:
                pass

    def option(self, option, payload=b""):
        self.socket.sendall(
            struct.pack(">QII", OPTION_MAGIC, option, len(payload)) + payload)

    def reply(self):
        magic, _, kind, length = struct.unpack(">QIII", self.file.read(20))
        payload = self.file.read(length)
        if magic != REPLY_MAGIC or kind >> 31:
            raise NBDError(f"option refused: {payload.decode(errors='replace')}")
        return kind, payload

    def list(self):
        names = []
        self.option(OPTION_LIST)
        while True:
            kind, payload = self.reply()
            if kind != REPLY_SERVER:
                return names
            names.append(payload[4:4 + struct.unpack(">I", payload[:4])[0]].decode())

    def request(self, command, offset=0, length=0, payload=b""):
        self.socket.sendall(
            struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, 1, offset, length) + payload)
        if command == DISCONNECT:
            return b""
        magic, error, _ = struct.unpack(">IIQ", self.file.read(16))
        if magic != SIMPLE_REPLY_MAGIC or error:
            raise NBDError(f"request failed with error {error}")
        return self.file.read(length) if command == READ else b""

    def read(self, offset, length):
        return self.request(READ, offset, length)

    def write(self, offset, payload):
        self.request(WRITE, offset, len(payload), payload)

    def close(self):
        if self.export is None:
            self.option(OPTION_ABORT)
        else:
            self.request(DISCONNECT)
        self.file.close()
        self.socket.close()
