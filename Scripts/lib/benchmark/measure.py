"""One sample: fio runs for a while against a server, and the server's processor time is counted.

Processor time is user and system time of the server's process, its threads (io_uring's workers are
threads of it) and its children. What the kernel writes back on its own is not in it.
"""
import json
import os
import subprocess
import time

from workloads import BLOCK

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# A server that lets fio wait this much longer than the sample's length is called stalled.
PATIENCE_SECONDS = 60


class SampleError(Exception):
    pass


def process_times(process_id):
    """Parent and ticks of processor time, own and of ended children; None if it is gone."""
    try:
        with open(f"/proc/{process_id}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), sum(int(field) for field in fields[11:15])


def tree_seconds(root):
    """Processor time of a process and its descendants."""
    every = {int(name): process_times(name) for name in os.listdir("/proc") if name.isdigit()}
    children = {}
    for process_id, times in every.items():
        if times:
            children.setdefault(times[0], []).append(process_id)
    ticks, pending = 0, [root]
    while pending:
        process_id = pending.pop()
        if every.get(process_id):
            ticks += every[process_id][1]
            pending += children.get(process_id, [])
    return ticks / CLOCK_TICKS


def machine_seconds():
    """Time all processors were busy."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / CLOCK_TICKS


class Sampler:
    def __init__(self, seconds, scratch):
        self.seconds = seconds
        self.scratch = scratch

    def run(self, running, workload, seed):
        limits = ["--size=100%"]
        if workload.loops:
            limits = ["--time_based", f"--runtime={self.seconds}"]
        elif workload.name != "fill":
            limits.append(f"--runtime={self.seconds}")
        if workload.requests_a_block:
            limits.append(f"--number_ios={int(running.size / BLOCK * workload.requests_a_block)}")
        command = [
            "fio", "--name=sample", "--ioengine=nbd", f"--uri={running.uri}", "--thread",
            f"--randseed={seed}", "--output-format=json", *workload.fio, *limits]
        began, busy = time.monotonic(), machine_seconds()
        server = tree_seconds(running.process_id)
        output, client = self.call(command)
        time.sleep(0.05)          # a child for the connection ends and is waited for
        server = tree_seconds(running.process_id) - server
        other = max(0, machine_seconds() - busy - server - client)
        found = self.parse(output)
        found |= dict(
            cpu_us=server / found["requests"] * 1e6,
            client_cpu_us=client / found["requests"] * 1e6,
            other_cores=other / (time.monotonic() - began))
        return found

    def call(self, command):
        """fio's output and the processor time it took."""
        process = subprocess.Popen(
            command, cwd=self.scratch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        before = os.times()
        try:
            output, _ = process.communicate(timeout=self.seconds + PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise SampleError(f"stalled: fio did not end within {PATIENCE_SECONDS} s") from None
        finally:
            process.kill()
            process.wait()
        after = os.times()
        return output, (after.children_user + after.children_system
                        - before.children_user - before.children_system)

    def parse(self, output):
        try:
            job = json.loads(output[output.index("{"):])["jobs"][0]
            side = max(job["read"], job["write"], key=lambda side: side["total_ios"])
            if job["error"] or not side["total_ios"]:
                raise ValueError
            latency = side["clat_ns"]
            flush = job["sync"]["lat_ns"]
        except (ValueError, KeyError, IndexError):
            raise SampleError("fio failed: " + output.strip()[-300:]) from None
        if job["sync"]["total_ios"]:
            latency = flush       # where writes and flushes alternate, the flush is what takes long
        percentiles = latency.get("percentile", {})
        return dict(
            requests=side["total_ios"], seconds=side["runtime"] / 1000, iops=side["iops"],
            bytes_a_second=side["bw_bytes"],
            p50_us=percentiles.get("50.000000", 0) / 1000,
            p99_us=percentiles.get("99.000000", 0) / 1000, max_us=latency["max"] / 1000)
