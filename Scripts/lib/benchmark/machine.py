"""What the results belong to: the machine, its load, the versions, the storage."""
import ctypes
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from workloads import EMPTY_SPACE

MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


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
    """A new folder in the given one, removed at the end."""

    def __init__(self, parent):
        self.parent = Path(parent)
        kind, device = self.filesystem()
        self.is_memory = kind in MEMORY_FILESYSTEMS
        self.name = str(parent)
        self.description = dict(
            name=self.name, is_memory=self.is_memory, filesystem=kind, device=device)

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

    def shortage(self, size, servers):
        """Why there is not enough room, or None."""
        needed = size * servers + max(2 * size, EMPTY_SPACE) * 3 // 2
        free = shutil.disk_usage(self.path).free
        if self.is_memory:
            free = min(free, int(field("/proc/meminfo", "MemAvailable").split()[0]) << 10)
        if free < needed:
            return f"{free >> 20} MiB free, {needed >> 20} MiB needed: see --dir and --size"
        return None

    def settle(self):
        """What one server left to be written back is not to be the next one's burden."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            ctypes.CDLL(None).syncfs(folder)
        finally:
            os.close(folder)
