"""One volume in a folder of its own and, once started, the process that serves it."""
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from rows import LOOP, TCP, UNIX
from servers import HOST, ServerError, call

START_SECONDS = 15
STOP_SECONDS = 60


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Running:
    def __init__(self, server, storage, scratch, transport=UNIX):
        self.server = server
        self.storage = storage
        self.transport = transport
        self.folder = Path(tempfile.mkdtemp(prefix=server.name + ".", dir=storage.path))
        self.sockets = Path(tempfile.mkdtemp(dir=scratch))
        self.address = self.sockets / "s"
        self.port = free_port() if transport == TCP else 0
        self.device = None
        self.process = None
        self.process_id = None

    @property
    def uri(self):
        if self.transport == TCP:
            return f"nbd://{HOST}:{self.port}/{self.server.export}"
        return f"nbd+unix:///{self.server.export}?socket={self.address}"

    def create(self, size):
        self.size = size
        if self.storage.kind == LOOP:
            backing = self.folder / "backing"
            with open(backing, "wb") as file:
                file.truncate(size + self.server.extra_space)
            self.device = call(
                "losetup", "--find", "--show", "--direct-io=on", backing).strip()
        self.server.create(self, size)

    def start(self):
        if self.server.is_file:
            return
        log = self.sockets / "log"
        self.address.unlink(missing_ok=True)
        words = self.server.command(self, self.size)
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
            self.process.returncode == 0 and not self.server.process_file(self))

    def is_listening(self):
        process_file = self.server.process_file(self)
        if process_file:
            try:
                self.process_id = int(process_file.read_text())
            except (OSError, ValueError):
                return False
        is_tcp = self.transport == TCP
        with socket.socket(socket.AF_INET if is_tcp else socket.AF_UNIX) as probe:
            try:
                probe.connect((HOST, self.port) if is_tcp else str(self.address))
                return True
            except OSError:
                return False

    def snapshot(self, kind):
        os.sync()
        if self.server.snapshot_while_serving:
            self.server.snapshot(self, kind)
        else:
            self.end_process()
            self.server.snapshot(self, kind)
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
        if self.device:
            subprocess.run(["losetup", "--detach", self.device])
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)
