"""Processor time of a server: user and system time of its process, its threads (io_uring's workers
are threads of it) and its children. What the kernel does on its own, such as writing back the page
cache, is not in it.
"""
import os
import time

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# In a clock's number: the kind that counts time as the scheduler does, of a whole process.
SCHEDULER_CLOCK = 2


def process_seconds(process_id):
    """Exact, of all threads that it has and had; 0 if it is gone."""
    try:
        return time.clock_gettime((~process_id << 3) | SCHEDULER_CLOCK)
    except OSError:
        return 0


def parent_and_waited(process_id):
    """Its parent, and the time of children that have ended; None if it is gone."""
    try:
        with open(f"/proc/{process_id}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), (int(fields[13]) + int(fields[14])) / CLOCK_TICKS


def tree_seconds(root):
    """Of a process and its descendants."""
    every = {int(name): parent_and_waited(int(name))
             for name in os.listdir("/proc") if name.isdigit()}
    children = {}
    for process_id, found in every.items():
        if found:
            children.setdefault(found[0], []).append(process_id)
    seconds, pending = 0, [root]
    while pending:
        process_id = pending.pop()
        if every.get(process_id):
            seconds += process_seconds(process_id) + every[process_id][1]
            pending += children.get(process_id, [])
    return seconds


def machine_seconds():
    """Time all processors were busy."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / CLOCK_TICKS
