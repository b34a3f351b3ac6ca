# Attaches /dev/nbdN by netlink, so that the device outlives its server. When a connection dies the
# kernel keeps back what is new, for SECONDS, and what was in flight until its own TIMEOUT is over.
# Both then go over the next connection, and nobody above sees an error. nbd-client does not ask for
# this: with its -persist requests in flight wait for ever.
#
#   nbd-netlink.py connect N SOCKET VOLUME TIMEOUT SECONDS
#   nbd-netlink.py reconnect N SOCKET VOLUME          a new connection for the dead one
#
# nbd-client -d detaches it.
import socket
import struct
import sys

NETLINK_GENERIC, REQUEST, ACKNOWLEDGE, NESTED = 16, 1, 4, 0x8000
# linux/genetlink.h and linux/nbd-netlink.h
CONTROL_FAMILY, GET_FAMILY, FAMILY_ID, FAMILY_NAME = 16, 3, 1, 2
CONNECT, RECONFIGURE = 1, 3
INDEX, SIZE, BLOCK_SIZE, TIMEOUT, SERVER_FLAGS = 1, 2, 3, 4, 5
SOCKETS, DEAD_CONNECTION_TIMEOUT = 7, 8
SOCKET_ITEM, SOCKET_DESCRIPTOR = 1, 1


def attribute(kind, value):
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def ask(link, family, command, attributes, flags):
    body = struct.pack("BBH", command, 1, 0) + b"".join(attributes)
    link.send(struct.pack("IHHII", 16 + len(body), family, REQUEST | flags, 1, 0) + body)
    answer = link.recv(65536)
    kind = struct.unpack_from("H", answer, 4)[0]
    if kind == 2:                               # an error, or the acknowledgement
        code = struct.unpack_from("i", answer, 16)[0]
        if code:
            raise OSError(-code, "the kernel refuses")
    return answer


def nbd_family(link):
    answer = ask(link, CONTROL_FAMILY, GET_FAMILY, [attribute(FAMILY_NAME, b"nbd\0")], 0)
    at = 20
    while at + 4 <= len(answer):
        length, kind = struct.unpack_from("HH", answer, at)
        if kind == FAMILY_ID:
            return struct.unpack_from("H", answer, at + 4)[0]
        at += length + -length % 4
    raise OSError("no netlink family nbd")


def exactly(connection, count):
    result = b""
    while len(result) < count:
        piece = connection.recv(count - len(result))
        if not piece:
            raise EOFError("the server closed the connection")
        result += piece
    return result


def negotiate(path, name):
    """(connection, size, flags)"""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    magic, option_magic, _ = struct.unpack(">8s8sH", exactly(connection, 18))
    if (magic, option_magic) != (b"NBDMAGIC", b"IHAVEOPT"):
        raise ValueError("no NBD server")
    request = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    connection.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(request)) + request)
    size = flags = None
    while True:
        _, _, kind, length = struct.unpack(">QIII", exactly(connection, 20))
        data = exactly(connection, length)
        if kind == 1:
            return connection, size, flags
        if kind != 3:
            raise ValueError(f"refused: {kind:#x} {data!r}")
        if data[:2] == b"\0\0":
            size, flags = struct.unpack(">QH", data[2:12])


def main():
    verb, index, path, volume = sys.argv[1:5]
    connection, size, flags = negotiate(path, volume.encode())
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
    link.bind((0, 0))
    descriptor = attribute(SOCKET_DESCRIPTOR, struct.pack("I", connection.fileno()))
    attributes = [
        attribute(INDEX, struct.pack("I", int(index))),
        attribute(SOCKETS | NESTED, attribute(SOCKET_ITEM | NESTED, descriptor)),
    ]
    if verb == "connect":
        attributes += [
            attribute(SIZE, struct.pack("Q", size)),
            attribute(BLOCK_SIZE, struct.pack("Q", 4096)),
            attribute(SERVER_FLAGS, struct.pack("Q", flags)),
            attribute(TIMEOUT, struct.pack("Q", int(sys.argv[5]))),
            attribute(DEAD_CONNECTION_TIMEOUT, struct.pack("Q", int(sys.argv[6]))),
        ]
    command = {"connect": CONNECT, "reconnect": RECONFIGURE}[verb]
    ask(link, nbd_family(link), command, attributes, ACKNOWLEDGE)


main()
