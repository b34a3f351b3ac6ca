"""What the results belong to: the machine, its load, the versions, the storage."""
import ctypes
import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from rows import DISK, LOOP, MEMORY

MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")
# Written before a folder: loop devices over files in it.
LOOP_PREFIX = "loop:"


def load():
    return [round(value, 1) for value in os.getloadavg()]


def first_line(*command):
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except OSError:
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else None


def field(path, name):
    match = re.search(rf"^{name}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    return match.group(1).strip() if match else "unknown"


def facts(wafer, checkout):
    commit = first_line("git", "-C", checkout, "describe", "--always", "--dirty")
    versions = {"wafer": f"wafer {first_line(wafer, '--version')} (commit {commit})"}
    for program, option in (("nbdkit", "--version"), ("qemu-nbd", "--version"),
                            ("nbd-server", "-V"), ("fio", "--version")):
        line = first_line(program, option)
        versions[program] = line.removeprefix("This is ") if line else f"{program} not installed"
    return dict(
        date=time.strftime("%Y-%m-%d %H:%M"), processor=field("/proc/cpuinfo", "model name"),
        processors=os.cpu_count(), memory_gib=round(
            int(field("/proc/meminfo", "MemTotal").split()[0]) / (1 << 20), 1),
        kernel=platform.release(), versions=versions, load_before=load(), storage=[])


class Storage:
    """A new folder in the given one, removed at the end; with loop devices over its files if
    "loop:" precedes it."""

    def __init__(self, name):
        self.name = name
        self.parent = Path(name.removeprefix(LOOP_PREFIX))
        filesystem, device = self.filesystem()
        if name.startswith(LOOP_PREFIX):
            self.kind = LOOP
        else:
            self.kind = MEMORY if filesystem in MEMORY_FILESYSTEMS else DISK
        self.description = dict(
            name=name, kind=self.kind, filesystem=filesystem, device=device)

    def filesystem(self):
        best = ("unknown", "unknown")
        longest = -1
        for line in Path("/proc/self/mounts").read_text().splitlines():
            device, point, kind = line.split()[:3]
            if len(point) > longest and self.parent.resolve().is_relative_to(point):
                best, longest = (kind, device), len(point)
        return best

    def __enter__(self):
        self.path = Path(tempfile.mkdtemp(prefix="wafer-bench.", dir=self.parent))
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)

    def shortage(self, needed):
        """Why it cannot be used for files of so many bytes, or None."""
        if self.kind == LOOP:
            why = self.loop_shortage()
            if why:
                return why
        free = shutil.disk_usage(self.path).free
        if self.kind == MEMORY:
            free = min(free, int(field("/proc/meminfo", "MemAvailable").split()[0]) << 10)
        if free < needed:
            return f"{free >> 20} MiB free, {needed >> 20} MiB needed: see --dir and --size"
        return None

    def loop_shortage(self):
        """Tries a loop device with direct I/O."""
        if not shutil.which("losetup"):
            return "losetup is not in the path (it is for root)"
        with tempfile.NamedTemporaryFile(dir=self.path) as file:
            file.truncate(1 << 20)
            done = subprocess.run(
                ["losetup", "--find", "--show", "--direct-io=on", file.name],
                capture_output=True, text=True)
            if done.returncode:
                return "no loop device with direct I/O: " + done.stderr.strip()[-200:]
            subprocess.run(["losetup", "--detach", done.stdout.strip()])
        return None

    def warm(self, size):
        """A virtual machine's free memory may have gone back to its host, who then takes longer
        over the first touch of a page than any server over a request: touches it beforehand."""
        if self.kind != MEMORY:
            return
        piece = bytes(1 << 20)
        with tempfile.TemporaryFile(dir=self.path) as file:
            for _ in range(size >> 20):
                file.write(piece)

    def settle(self):
        """What one server left to be written back is not to be the next one's burden."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            ctypes.CDLL(None).syncfs(folder)
        finally:
            os.close(folder)


class Turn:
    """Holds a file's lock, for machines on which others wait for it before they are busy; not for
    longer than some time at once, so that their turn comes, too."""
    HOLD_SECONDS = 35
    PAUSE_SECONDS = 0.5

    def __init__(self, path):
        self.file = open(path) if path else None
        self.since = None
        self.waited = 0               # seconds

    def take(self):
        """Afterwards the lock is held, until `end` at the latest."""
        if not self.file:
            return
        began = time.monotonic()
        if self.since and began - self.since > self.HOLD_SECONDS:
            self.end()
            time.sleep(self.PAUSE_SECONDS)
        if not self.since:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.since = time.monotonic()
            self.waited += self.since - began

    def end(self):
        if self.since:
            fcntl.flock(self.file, fcntl.LOCK_UN)
            self.since = None
