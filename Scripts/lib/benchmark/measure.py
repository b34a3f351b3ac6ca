"""One sample: a load generator runs for a while against a server, and both are accounted for."""
import os
import subprocess
import time

from generators import Unusable
from processor_time import machine_seconds, tree_seconds
from rows import FILL

# A server that lets its client wait this much longer than the sample's length is called stalled.
PATIENCE_SECONDS = 60


class SampleError(Exception):
    pass


class Sampler:
    def __init__(self, seconds, scratch, generators):
        self.seconds = seconds
        self.scratch = scratch
        self.generators = generators

    def fill(self, running, written):
        """Writes the first bytes of a volume."""
        light = self.generators.light
        try:
            light.parse(self.call(light.fill_command(running, FILL, written))[0], 0)
        except Unusable as error:
            raise SampleError(str(error)) from None

    def run(self, running, row, seed):
        generator = self.generators.of(row, running.server)
        command = generator.command(running, row, self.seconds, seed)
        began, busy = time.monotonic(), machine_seconds()
        server = self.server_seconds(running)
        output, client, elapsed = self.call(command)
        time.sleep(0.05)          # a child for the connection ends and is waited for
        server = self.server_seconds(running) - server
        other = max(0, machine_seconds() - busy - server - client)
        try:
            found = generator.parse(output, elapsed)
        except Unusable as error:
            raise SampleError(str(error)) from None
        found |= dict(
            client_cpu_us=client / found["requests"] * 1e6,
            other_cores=other / (time.monotonic() - began))
        if running.process_id:
            found["cpu_us"] = server / found["requests"] * 1e6
        return found

    def server_seconds(self, running):
        return tree_seconds(running.process_id) if running.process_id else 0

    def call(self, command):
        """What the command prints, its processor time and the time it took."""
        process = subprocess.Popen(
            [str(word) for word in command], cwd=self.scratch, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        before, began = os.times(), time.monotonic()
        try:
            output, _ = process.communicate(timeout=self.seconds + PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise SampleError(f"stalled: no end within {PATIENCE_SECONDS} s") from None
        finally:
            process.kill()
            process.wait()
        after, elapsed = os.times(), time.monotonic() - began
        if process.returncode:
            raise SampleError(f"{process.args[0]}: {output.strip()[-300:]}")
        return output, (after.children_user + after.children_system
                        - before.children_user - before.children_system), elapsed
