"""The servers: how each makes a volume, is told to serve it, and takes a snapshot.

`reaches` says where a write is when the server acknowledges it; every server but nbdkit's memory
plugin and the floor promises that a flush puts what was acknowledged on stable storage.
"""
import subprocess
from pathlib import Path

from rows import DISK, EMPTY_SIZE, LIGHT, LOOP, MEMORY, MIB, TCP, Volume

PAGE_CACHE = "page cache"
DEVICE = "device (O_DIRECT)"
OWN_MEMORY = "the server's memory"
HOST = "127.0.0.1"


class ServerError(Exception):
    pass


def call(*command):
    """Runs a command to its end; its words are the error."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise ServerError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


class Server:
    """`running` in the methods is the volume and its places: folder, address, port, device."""
    name = ""
    program = ""
    reaches = PAGE_CACHE
    flush = "fdatasync"
    export = ""
    is_file = False               # no server at all: a file
    kinds = (MEMORY, DISK, LOOP)  # of storage
    snapshots = ()                # the ways it takes a snapshot; "" is the only one
    snapshot_while_serving = False
    # Room on a device beyond the volume's own size.
    extra_space = 0

    def has(self, row, storage):
        """Is it in the row when everything is measured?"""
        if storage.kind not in self.kinds or storage.kind not in row.full:
            return False
        return row.volume is not Volume.SNAPSHOT or bool(self.snapshots)

    def image(self, running):
        return running.device or running.folder / "disk.raw"

    def create(self, running, size):
        if not running.device:
            with open(self.image(running), "wb") as file:
                file.truncate(size)

    def command(self, running, size):
        """The words that start it."""
        raise NotImplementedError

    def process_file(self, running):
        """Where a server that puts itself into the background leaves its process id."""
        return None

    def snapshot(self, running, kind):
        raise NotImplementedError

    def facts(self):
        words = [str(word) for word in self.command(Example(), "SIZE")]
        return dict(
            name=self.name, command=" ".join([Path(words[0]).name, *words[1:]]),
            reaches=self.reaches, flush=self.flush)


class Example:
    """Stands for a volume where a command is shown."""
    folder = Path("FOLDER")
    address = Path("SOCKET")
    device = None
    transport = ""
    port = 0


class Wafer(Server):
    name = "wafer"
    reaches = DEVICE
    flush = "fdatasync; a commit if mappings changed"
    export = "volume"
    snapshots = ("",)
    snapshot_while_serving = True
    POOL_SIZE = "128GiB"
    extra_space = 256 * MIB

    def __init__(self, program):
        self.program = program

    def create(self, running, size):
        pool = running.folder / "pool"
        space = ["--data", running.device] if running.device else ["--data-size", self.POOL_SIZE]
        call(self.program, "pool", "create", pool, *space)
        call(self.program, "volume", "create", pool, self.export, f"{size // MIB}MiB")

    def command(self, running, size):
        address = (["--listen", f"{HOST}:{running.port}"] if running.transport == TCP
                   else ["--unix", running.address])
        return [self.program, "serve", running.folder / "pool", *address]

    def snapshot(self, running, kind):
        call(self.program, "volume", "snapshot", running.folder / "pool", self.export, "snapshot")


class Floor(Server):
    """Not a peer: what the sockets and the copying alone cost."""
    name = "floor"
    reaches = OWN_MEMORY
    flush = "nothing"
    kinds = (MEMORY,)
    REGION = MIB

    def __init__(self, program):
        self.program = program

    def has(self, row, storage):
        return super().has(row, storage) and row.generator == LIGHT

    def create(self, running, size):
        pass

    def command(self, running, size):
        address = (["--listen", f"{HOST}:{running.port}"] if running.transport == TCP
                   else ["--unix", running.address])
        # A large empty volume would be all page faults, which are not what the floor is about.
        region = ["--region", self.REGION] if size == EMPTY_SIZE else []
        return [self.program, *address, "--size", size, *region]


class File(Server):
    """Not a peer: what the file system takes for a write and fdatasync, without any server."""
    name = "file"
    program = "fio"
    is_file = True
    kinds = (DISK, LOOP)
    CHUNK = bytes(range(1, 256)) * 4112

    def has(self, row, storage):
        return super().has(row, storage) and row.operation == "write+flush"

    def create(self, running, size):
        with open(self.image(running), "wb") as file:
            while size:
                size -= file.write(self.CHUNK[:size])

    def facts(self):
        return dict(name=self.name, command="fio --ioengine=psync --fdatasync=1",
                    reaches=PAGE_CACHE, flush="fdatasync")


class Nbdkit(Server):
    program = "nbdkit"

    def plugin(self, running, size):
        raise NotImplementedError

    def command(self, running, size):
        address = (["--ipaddr", HOST, "--port", running.port] if running.transport == TCP
                   else ["--unix", running.address])
        return [self.program, "--foreground", *address, *self.plugin(running, size)]


class NbdkitFile(Nbdkit):
    name = "nbdkit-file"

    def plugin(self, running, size):
        return ["file", self.image(running)]


class NbdkitMemory(Nbdkit):
    name = "nbdkit-memory"
    reaches = OWN_MEMORY
    flush = "nothing"
    kinds = (MEMORY,)

    def create(self, running, size):
        pass

    def plugin(self, running, size):
        return ["memory", size]


class NbdServer(Server):
    name = "nbd-server"
    program = "nbd-server"
    export = "disk"
    kinds = (MEMORY, DISK)

    def command(self, running, size):
        if running.folder.is_dir():
            address = (f"listenaddr = {HOST}\nport = {running.port}" if running.transport == TCP
                       else f"unixsock = {running.address}")
            (running.folder / "config").write_text(
                f"[generic]\n{address}\nallowlist = true\n"
                f"[{self.export}]\nexportname = {self.image(running)}\n"
                "flush = true\nfua = true\ntrim = true\n")
        return [self.program, "-C", running.folder / "config", "-p", self.process_file(running)]

    def process_file(self, running):
        return running.folder / "pid"


class Qemu(Server):
    """qemu-nbd. cached: its default, the page cache and a thread pool; direct and native: O_DIRECT
    with io_uring and with Linux's older asynchronous I/O."""
    program = "qemu-nbd"
    SETTINGS = {
        "cached": (["--cache=writeback"], PAGE_CACHE, (MEMORY, DISK)),
        "direct": (["--cache=none", "--aio=io_uring"], DEVICE, (MEMORY, DISK, LOOP)),
        "native": (["--cache=none", "--aio=native"], DEVICE, (DISK, LOOP)),
    }

    def __init__(self, setting, format="raw"):
        self.format = format
        self.name = f"qemu-{format}-{setting}"
        self.cache, self.reaches, self.kinds = self.SETTINGS[setting]

    def suffix(self):
        return "raw"

    def command(self, running, size):
        address = ([f"--bind={HOST}", f"--port={running.port}"] if running.transport == TCP
                   else [f"--socket={running.address}"])
        return [self.program, "--persistent", "--shared=32", *address, *self.cache,
                f"--format={self.suffix()}", self.image(running)]


class Qcow2(Qemu):
    """qcow2 with clusters of 64 KiB; extended: with subclusters of 2 KiB, which need no copying of
    a whole cluster. Its snapshots can only be taken with the server stopped."""
    snapshots = ("internal", "overlay")
    flush = "metadata cache written, then fdatasync"

    def __init__(self, setting, extended=False):
        super().__init__(setting, "qcow2x" if extended else "qcow2")
        self.extended = extended
        self.kinds = tuple(kind for kind in self.kinds if kind != LOOP)
        self.options = "cluster_size=64k" + (",extended_l2=on" if extended else "")

    def has(self, row, storage):
        """Subclusters matter where space is allocated."""
        return super().has(row, storage) and (not self.extended or bool(row.requests_a_block))

    def suffix(self):
        return "qcow2"

    def image(self, running):
        return running.folder / "disk.qcow2"

    def create(self, running, size):
        call("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, self.image(running),
             size)

    def facts(self):
        facts = super().facts()
        return facts | dict(command=facts["command"] + f" ({self.options})")

    def snapshot(self, running, kind):
        if kind == "internal":
            call("qemu-img", "snapshot", "-c", "snapshot", self.image(running))
            return
        base = running.folder / "base.qcow2"
        self.image(running).rename(base)
        call("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, "-F", "qcow2",
             "-b", base, self.image(running))


def all_servers(wafer, floor):
    return [
        Wafer(wafer), Floor(floor), File(), NbdkitFile(), NbdkitMemory(), NbdServer(),
        Qemu("cached"), Qemu("direct"), Qemu("native"),
        Qcow2("cached"), Qcow2("direct"), Qcow2("native"),
        Qcow2("cached", extended=True), Qcow2("direct", extended=True),
        Qcow2("native", extended=True),
    ]
