"""Large pools and the servers on them, for Scripts/scale."""
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from nbd import Client

START_SECONDS = 60
STOP_SECONDS = 120
MIB = 1 << 20


class ScaleError(Exception):
    pass


def call(*command):
    """Runs a command to its end; its words are the error. Returns output and seconds."""
    began = time.monotonic()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise ScaleError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout, time.monotonic() - began


class Maker:
    """Makes pools and removes them."""

    def __init__(self, programs, disk, memory):
        self.programs, self.disk, self.memory = programs, disk, memory
        self.made = 0

    def pool(self, *options, data_in_memory=False):
        self.made += 1
        folder = self.disk / f"pool{self.made}"
        data = ["--data-size", "4TiB"]
        if data_in_memory:
            path = self.memory / f"data{self.made}"
            with open(path, "wb") as file:
                file.truncate(4 << 40)
            data = ["--data", path]
        call(self.programs / "make-pool", folder, *data, *options)
        return Pool(self.programs / "wafer", folder)


class Pool:
    def __init__(self, wafer, folder):
        self.wafer, self.folder = wafer, folder

    def serve(self, *options):
        return Server(self, options)

    def check(self):
        out, _ = call(self.wafer, "pool", "check", self.folder)
        if not out.startswith("clean"):
            raise ScaleError(f"wafer pool check: {out.strip()[-300:]}")

    def remove(self):
        data = (self.folder / "data").resolve()
        shutil.rmtree(self.folder, ignore_errors=True)
        data.unlink(missing_ok=True)


class Server:
    """`wafer serve` on a pool; a context manager."""

    def __init__(self, pool, options):
        self.pool = pool
        self.socket = pool.folder / "nbd.sock"
        self.socket.unlink(missing_ok=True)
        self.log = open(pool.folder.parent / "log", "w+")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [str(word) for word in (pool.wafer, "serve", pool.folder, *options)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True)

    def __enter__(self):
        if not self.process.stdout.readline().startswith("listening"):
            self.__exit__()
            self.log.seek(0)
            raise ScaleError("wafer serve: " + self.log.read().strip()[-300:])
        return self

    def first_reply(self, export):
        """Seconds from the server's start to the first reply to a read."""
        client = Client(self.socket, export)
        client.read(0, 4096)
        seconds = time.monotonic() - self.began
        client.close()
        return seconds

    def memory(self):
        """MiB that are in memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+)", status).group(1)) / 1024

    def command(self, *words):
        """`wafer` with the server at work: output and seconds."""
        return call(self.pool.wafer, words[0], words[1], self.pool.folder, *words[2:])

    def volumes(self):
        return json.loads(self.command("volume", "list", "--json")[0])

    def load(self, export, rw, depth, seconds, log=None, **options):
        return Load(self, export, rw, depth, seconds, log, options)

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Load:
    """fio against one export, in the background until `result`."""

    def __init__(self, server, export, rw, depth, seconds, log, options):
        self.log = log and Path(log)
        words = [
            "fio", "--name=load", "--ioengine=nbd", "--thread", "--bs=4k", f"--rw={rw}",
            f"--uri=nbd+unix:///{export}?socket={server.socket}", f"--iodepth={depth}",
            "--time_based", f"--runtime={seconds}", "--norandommap", "--randrepeat=0",
            "--random_generator=tausworthe64", "--output-format=json"]
        words += [f"--{key}={value}" for key, value in options.items()]
        if log:
            words += [f"--write_lat_log={log}", "--log_unix_epoch=1"]
        self.process = subprocess.Popen(
            words, cwd=server.pool.folder.parent, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def result(self):
        output, _ = self.process.communicate()
        try:
            job = json.loads(output[output.index("{"):])["jobs"][0]
            side = max(job["read"], job["write"], key=lambda side: side["total_ios"])
            if job["error"] or not side["total_ios"]:
                raise ValueError
        except (ValueError, KeyError, IndexError):
            raise ScaleError("fio failed: " + output.strip()[-300:]) from None
        latency = side["clat_ns"]
        return dict(
            iops=side["iops"], p50_us=latency["percentile"]["50.000000"] / 1000,
            p99_us=latency["percentile"]["99.000000"] / 1000, max_us=latency["max"] / 1000)

    def latencies(self):
        """Every request after `result`: seconds since 1970 when it ended, seconds it took."""
        path = Path(f"{self.log}_clat.1.log")
        found = []
        with open(path) as file:
            for line in file:
                when, taken, _ = line.split(",", 2)
                found.append((int(when) / 1000, int(taken) / 1e9))
        for name in os.listdir(path.parent):
            if name.startswith(self.log.name + "_"):
                (path.parent / name).unlink()
        return found
