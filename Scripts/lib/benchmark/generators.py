"""What puts load on a server: the project's own nbdload, fio's nbd engine, nbdcopy. Each says its
command for a row and takes the figures out of what it prints.

The kind of server that is just a file gets the same load from fio without NBD.
"""
import json

from rows import COPY, FIO, LIGHT, TCP

# Of nbdcopy. It has up to four connections and asks what is mapped, where a server can tell.
COPY_REQUEST = 4 << 20
COPY_REQUESTS = 8


class Unusable(Exception):
    """The output holds no figures."""


class Light:
    program = "nbdload"

    def __init__(self, program):
        self.program = program

    def command(self, running, row, seconds, seed):
        words = [self.program, "--export", running.server.export, "--operation", row.operation,
                 "--block-size", row.block, "--depth", row.depth, "--connections", row.connections,
                 "--seed", seed]
        words += (["--connect", f"127.0.0.1:{running.port}"] if row.transport == TCP
                  else ["--unix", running.address])
        if row.requests_a_block:
            words += ["--requests", row.requests(running.size)]
        return words + ["--seconds", seconds]

    def fill_command(self, running, row, written):
        return [self.program, "--export", running.server.export, "--operation", row.operation,
                "--block-size", row.block, "--depth", row.depth, "--size", written,
                "--requests", written // row.block,
                *(["--connect", f"127.0.0.1:{running.port}"] if running.transport == TCP
                  else ["--unix", running.address])]

    def parse(self, output, elapsed):
        try:
            found = json.loads(output)
        except ValueError:
            raise Unusable("nbdload failed: " + output.strip()[-300:]) from None
        if not found["requests"]:
            raise Unusable("nbdload did nothing")
        return {key: found[key] for key in (
            "requests", "seconds", "iops", "bytes_a_second", "p50_us", "p99_us", "p999_us",
            "max_us")}


class Fio:
    program = "fio"
    modes = {"write+flush": ["--rw=randwrite", "--fsync=1"]}

    def command(self, running, row, seconds, seed):
        words = ["--ioengine=nbd", f"--uri={running.uri}"]
        return self.job(row, seconds, seed, words)

    def job(self, row, seconds, seed, words):
        return ["fio", "--name=sample", "--thread", "--group_reporting", f"--randseed={seed}",
                "--output-format=json", f"--bs={row.block}", f"--iodepth={row.depth}",
                f"--numjobs={row.connections}", f"--runtime={int(seconds * 1000)}ms", "--size=100%",
                "--time_based",
                *self.modes.get(row.operation, [f"--rw={row.operation}"]), *words]

    def parse(self, output, elapsed):
        try:
            job = json.loads(output[output.index("{"):])["jobs"][0]
            side = max(job["read"], job["write"], key=lambda side: side["total_ios"])
            if job["error"] or not side["total_ios"]:
                raise ValueError
            latency = side["clat_ns"]
            flush = job["sync"]["lat_ns"]
        except (ValueError, KeyError, IndexError):
            raise Unusable("fio failed: " + output.strip()[-300:]) from None
        if job["sync"]["total_ios"]:
            latency = flush       # where writes and flushes alternate, the flush is what takes long
        percentiles = latency.get("percentile", {})
        return dict(
            requests=side["total_ios"], seconds=side["runtime"] / 1000, iops=side["iops"],
            bytes_a_second=side["bw_bytes"],
            p50_us=percentiles.get("50.000000", 0) / 1000,
            p99_us=percentiles.get("99.000000", 0) / 1000,
            p999_us=percentiles.get("99.900000", 0) / 1000, max_us=latency["max"] / 1000)


class FileFio(Fio):
    """The same writes to a plain file, each followed by fdatasync."""
    modes = {"write+flush": ["--rw=randwrite", "--fdatasync=1"]}

    def command(self, running, row, seconds, seed):
        return self.job(row, seconds, seed, [
            "--ioengine=psync", f"--filename={running.server.image(running)}"])

    def parse(self, output, elapsed):
        """Without the latencies: fio does not count the fdatasync in."""
        found = super().parse(output, elapsed)
        return {key: found[key] for key in ("requests", "seconds", "iops", "bytes_a_second")}


class Copy:
    program = "nbdcopy"

    def command(self, running, row, seconds, seed):
        return ["nbdcopy", f"--request-size={COPY_REQUEST}", f"--requests={COPY_REQUESTS}",
                running.uri, "null:"]

    def parse(self, output, elapsed):
        if output.strip():
            raise Unusable("nbdcopy: " + output.strip()[-300:])
        return dict(requests=1, seconds=elapsed, iops=1 / elapsed)


class Generators:
    def __init__(self, nbdload):
        self.light = Light(nbdload)
        self.by_name = {LIGHT: self.light, FIO: Fio(), COPY: Copy()}
        self.file = FileFio()

    def of(self, row, server):
        return self.file if server.is_file else self.by_name[row.generator]
