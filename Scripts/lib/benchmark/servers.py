"""The servers: how each makes a volume, is started, takes a snapshot and is stopped.

Every server runs in a folder of its own and listens on a Unix socket. `reaches` says where a write
is when the server acknowledges it; every server but nbdkit's memory plugin promises that a flush
puts what was acknowledged on stable storage.
"""
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

START_SECONDS = 15
STOP_SECONDS = 60
PAGE_CACHE = "page cache"
DEVICE = "device (O_DIRECT)"


class ServerError(Exception):
    pass


def call(*command):
    """Runs a command to its end; its words are the error."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise ServerError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def sparse_file(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


class Server:
    name = ""
    program = ""
    reaches = PAGE_CACHE
    flush = "fdatasync"
    export = ""
    is_thin = False               # allocates and shares space itself
    memory_only = False
    snapshots = ()                # the ways it takes a snapshot; "" is the only one
    snapshot_while_serving = False
    # In --short: the storage it runs on, and whether only in rows about allocated or shared space.
    short = ("memory", "disk")
    short_space_only = False

    def short_on(self, storage, workload):
        if ("memory" if storage.is_memory else "disk") not in self.short:
            return False
        return not self.short_space_only or not workload.loops

    def create(self, folder, size):
        sparse_file(folder / "disk.raw", size)

    def command(self, folder, address, size):
        """The words that start it on the volume in `folder`, listening on `address`."""
        raise NotImplementedError

    def process_file(self, folder):
        """Where a server that puts itself into the background leaves its process id."""
        return None

    def snapshot(self, folder, kind):
        raise NotImplementedError

    def facts(self):
        words = self.command(Path("FOLDER"), Path("SOCKET"), "SIZE")
        return dict(
            name=self.name, command=" ".join(str(word) for word in words), reaches=self.reaches,
            flush=self.flush, is_thin=self.is_thin)


class Wafer(Server):
    name = "wafer"
    reaches = DEVICE
    flush = "fdatasync; a commit if mappings changed"
    export = "volume"
    is_thin = True
    snapshots = ("",)
    snapshot_while_serving = True
    POOL_SIZE = "128GiB"

    def __init__(self, program):
        self.program = program

    def create(self, folder, size):
        pool = folder / "pool"
        call(self.program, "pool", "create", pool, "--data-size", self.POOL_SIZE)
        call(self.program, "volume", "create", pool, self.export, f"{size >> 20}MiB")

    def command(self, folder, address, size):
        return [self.program, "serve", folder / "pool", "--unix", address]

    def snapshot(self, folder, kind):
        call(self.program, "volume", "snapshot", folder / "pool", self.export, "snapshot")

    def facts(self):
        return super().facts() | dict(command="wafer serve POOL --unix SOCKET")


class NbdkitFile(Server):
    name = "nbdkit-file"
    program = "nbdkit"

    def command(self, folder, address, size):
        return [self.program, "--foreground", "--unix", address, "file", folder / "disk.raw"]


class NbdkitMemory(Server):
    name = "nbdkit-memory"
    program = "nbdkit"
    reaches = "the server's memory"
    flush = "nothing"
    memory_only = True

    def create(self, folder, size):
        pass

    def command(self, folder, address, size):
        return [self.program, "--foreground", "--unix", address, "memory", size]


class NbdServer(Server):
    name = "nbd-server"
    program = "nbd-server"
    export = "disk"
    short = ("memory",)

    def command(self, folder, address, size):
        if folder.is_dir():
            (folder / "config").write_text(
                f"[generic]\nunixsock = {address}\nallowlist = true\n"
                f"[{self.export}]\nexportname = {folder}/disk.raw\n"
                "flush = true\nfua = true\ntrim = true\n")
        return [self.program, "-C", folder / "config", "-p", self.process_file(folder)]

    def process_file(self, folder):
        return folder / "pid"


class Qemu(Server):
    """qemu-nbd. cached: its default, the page cache and a thread pool; direct: the combination
    that is meant for speed."""
    program = "qemu-nbd"

    def __init__(self, format, direct):
        self.format = format
        self.name = f"qemu-{format}-{'direct' if direct else 'cached'}"
        self.cache = ["--cache=none", "--aio=io_uring"] if direct else ["--cache=writeback"]
        self.reaches = DEVICE if direct else PAGE_CACHE
        self.short = ("disk",) if direct else ("memory",)

    def image(self, folder):
        return folder / "disk.raw"

    def command(self, folder, address, size):
        return [self.program, "--persistent", "--shared=8", f"--socket={address}", *self.cache,
                f"--format={self.image(folder).suffix[1:]}", self.image(folder)]


class Qcow2(Qemu):
    """qcow2 with clusters of 64 KiB; extended: with subclusters of 2 KiB, which need no copying of
    a whole cluster. Its snapshots can only be taken with the server stopped."""
    is_thin = True
    snapshots = ("internal", "overlay")

    def __init__(self, direct, extended=False):
        super().__init__("qcow2x" if extended else "qcow2", direct)
        self.options = "cluster_size=64k" + (",extended_l2=on" if extended else "")
        self.short_space_only = extended
        self.flush = "metadata cache written, then fdatasync"

    def image(self, folder):
        return folder / "disk.qcow2"

    def create(self, folder, size):
        call("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, self.image(folder),
             size)

    def facts(self):
        facts = super().facts()
        return facts | dict(command=facts["command"] + f" ({self.options})")

    def snapshot(self, folder, kind):
        if kind == "internal":
            call("qemu-img", "snapshot", "-c", "snapshot", self.image(folder))
            return
        base = folder / "base.qcow2"
        self.image(folder).rename(base)
        call("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, "-F", "qcow2",
             "-b", base, self.image(folder))


def all_servers(wafer):
    return [
        Wafer(wafer), NbdkitFile(), NbdkitMemory(), NbdServer(),
        Qemu("raw", direct=False), Qemu("raw", direct=True),
        Qcow2(direct=False), Qcow2(direct=True),
        Qcow2(direct=False, extended=True), Qcow2(direct=True, extended=True),
    ]


class Running:
    """One volume in a folder of its own and, once started, the process that serves it."""

    def __init__(self, server, storage, scratch):
        self.server = server
        self.folder = Path(tempfile.mkdtemp(prefix=server.name + ".", dir=storage))
        self.sockets = Path(tempfile.mkdtemp(dir=scratch))
        self.address = self.sockets / "s"
        self.process = None
        self.process_id = None

    @property
    def uri(self):
        return f"nbd+unix:///{self.server.export}?socket={self.address}"

    def create(self, size):
        self.size = size
        self.server.create(self.folder, size)

    def start(self):
        log = self.sockets / "log"
        self.address.unlink(missing_ok=True)
        words = self.server.command(self.folder, self.address, self.size)
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=output,
                stderr=output)
        self.process_id = self.process.pid
        deadline = time.monotonic() + START_SECONDS
        while not self.is_listening():
            if time.monotonic() > deadline or self.has_failed():
                raise ServerError("does not start: " + log.read_text().strip()[-300:])
            time.sleep(0.02)

    def has_failed(self):
        return bool(self.process.poll()) or (
            self.process.returncode == 0 and not self.server.process_file(self.folder))

    def is_listening(self):
        process_file = self.server.process_file(self.folder)
        if process_file:
            try:
                self.process_id = int(process_file.read_text())
            except (OSError, ValueError):
                return False
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.address))
                return True
            except OSError:
                return False

    def snapshot(self, kind):
        os.sync()
        if self.server.snapshot_while_serving:
            self.server.snapshot(self.folder, kind)
        else:
            self.end_process()
            self.server.snapshot(self.folder, kind)
            self.start()

    def end_process(self):
        if self.process is None:
            return
        if self.process.poll() is None or self.process_id != self.process.pid:
            self.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self.process.poll() is None or Path(f"/proc/{self.process_id}").exists():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        self.process.wait()
        self.process = None

    def signal(self, number):
        try:
            os.kill(self.process_id, number)
        except ProcessLookupError:
            pass

    def stop(self):
        """Ends the server and removes all its files."""
        self.end_process()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)
