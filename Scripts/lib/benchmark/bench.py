"""Runs the rows: round by round, in a round row by row, in a row one sample of each server in a
shuffled order."""
import random
import shutil
import sys

import machine
from generators import Generators
from measure import SampleError, Sampler
from rows import COPY, FIO, ROWS, TCP, UNIX, Volume
from running import Running
from servers import ServerError, all_servers


def label(server, kind):
    """A server in a table; `kind` is the way it takes its snapshot, where there is a choice."""
    return server.name + (f", {kind}" if kind else "")


class Bench:
    def __init__(self, options, scratch):
        self.options = options
        self.scratch = scratch            # short paths, for sockets
        self.random = random.Random(options.seed)
        self.sampler = Sampler(options.seconds, scratch, Generators(options.nbdload))
        self.turn = machine.Turn(options.lock)
        self.samples = []
        self.skipped = []
        self.servers = []
        for server in all_servers(options.wafer, options.floor):
            if options.servers and server.name not in options.servers and server.name != "wafer":
                continue
            if not shutil.which(server.program):
                self.skip(server.name, f"{server.program} is not installed")
                continue
            self.servers.append(server)
        self.missing = {generator for generator in (FIO, COPY) if not shutil.which(generator)}
        for generator in self.missing:
            self.skip(f"rows with {generator}", f"{generator} is not installed")

    def skip(self, what, why):
        self.skipped.append(f"{what}: {why}")
        print(f"left out: {what}: {why}", file=sys.stderr, flush=True)

    def measures(self, storage, row, server, label=None):
        """Does the row have this server, with that way to take its snapshot?"""
        options = self.options
        if options.rows and row.name not in options.rows:
            return False
        if row.generator in self.missing or not server.has(row, storage):
            return False
        if not options.short:
            return True
        others = row.short.get(storage.kind)
        if others is None or server.name == "wafer":
            return others is not None
        return label in others if label else any(
            other.partition(",")[0] == server.name for other in others)

    def space(self, storage):
        """Bytes of storage that are used at once, at most."""
        size = self.options.size << 20
        pairs = [(row, server) for row in ROWS for server in self.servers
                 if self.measures(storage, row, server)]
        filled = {server for row, server in pairs if row.volume is Volume.FILLED}
        fresh = [row.volume.space(size) for row, _ in pairs if row.volume is not Volume.FILLED]
        return len(filled) * size + max(fresh, default=0)

    def run(self, storage):
        """All rounds over one storage, first over Unix sockets, then over TCP."""
        for transport in (UNIX, TCP):
            rows = [row for row in ROWS if row.transport == transport
                    and any(self.measures(storage, row, server) for server in self.servers)]
            if rows:
                self.run_rows(storage, transport, rows)

    def run_rows(self, storage, transport, rows):
        """The filled volumes are served throughout; a row about empty or shared space makes its
        volume afresh for each sample."""
        filled = {}
        try:
            for server in list(self.servers):
                if any(row.volume is Volume.FILLED and self.measures(storage, row, server)
                       for row in rows):
                    self.turn.take()
                    running = self.start(storage, server, Volume.FILLED, transport)
                    if running:
                        filled[server.name] = running
            for round_number in range(1, self.options.rounds + 1):
                for row in rows:
                    line = [(server, kind) for server in self.servers
                            for kind in row.variants(server)
                            if self.measures(storage, row, server, label(server, kind))]
                    self.random.shuffle(line)
                    self.turn.take()
                    for server, kind in line:
                        if row.volume is not Volume.FILLED:
                            self.sample_fresh(storage, round_number, row, server, kind)
                        elif server.name in filled:
                            self.sample(storage, round_number, row, filled[server.name], kind)
        finally:
            for running in filled.values():
                running.stop()
            self.turn.end()

    def start(self, storage, server, volume, transport):
        running = Running(server, storage, self.scratch, transport)
        size, written = volume.sizes(self.options.size << 20)
        try:
            running.create(size)
            running.start()
            if written and not server.is_file:
                self.sampler.fill(running, written)
            if written:
                storage.settle()
            return running
        except (ServerError, SampleError) as error:
            running.stop()
            self.skip(f"{server.name} in {storage.name}", error)
            if server.name != "wafer" and isinstance(error, ServerError):
                self.servers = [s for s in self.servers if s is not server]
            return None
        except BaseException:
            running.stop()
            raise

    def sample_fresh(self, storage, round_number, row, server, kind):
        running = self.start(storage, server, row.volume, row.transport)
        if running is None:
            return
        try:
            storage.warm(row.volume.space(self.options.size << 20))
            if row.volume is Volume.SNAPSHOT:
                running.snapshot(kind)
            self.sample(storage, round_number, row, running, kind)
        except ServerError as error:
            self.skip(f"{server.name}, {row.name} in {storage.name}", error)
        finally:
            running.stop()

    def sample(self, storage, round_number, row, running, kind):
        name = label(running.server, kind)
        storage.settle()
        found = dict(storage=storage.name, round=round_number, row=row.name, server=name)
        try:
            found |= self.sampler.run(running, row, self.options.seed + round_number)
            line = "%9.4g IOPS %8.2f us CPU %8.1f us p99" % (
                found["iops"], found.get("cpu_us", 0), found.get("p99_us", 0))
        except SampleError as error:
            found["error"] = line = str(error)
        self.samples.append(found)
        print(f"{storage.name:12} {round_number} {row.name:22} {name:30} {line}",
              file=sys.stderr, flush=True)
