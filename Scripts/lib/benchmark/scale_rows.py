"""The rows of Scripts/scale. Each makes its pools, measures, and returns its figures and the goals:
what is to be, what was measured, whether that is met."""
import random
import time
from statistics import median

from nbd import Client
from scale_pool import ScaleError

MILLION = 1_000_000
BLOCK = 64 << 10
OPEN_SECONDS = 2
MEMORY_MIB = 512
OTHER_MIB = 64
SNAPSHOT_MS = 20
# "Linear": of two sizes, the larger one may cost its share of the smaller one's cost and this more.
LINEAR_SLACK = 1.25


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0


def is_linear(points, size, key, floor):
    """No faster than linearly, between any two neighbours; below `floor` nothing is compared."""
    for one, other in zip(points, points[1:]):
        if other[key] > max(floor, one[key] * other[size] / one[size] * LINEAR_SLACK):
            return False
    return True


def growth(what, points, size):
    """The goals that opening and memory grow no faster than linearly."""
    first, last = points[0], points[-1]
    return [
        (f"{what}: open time grows at most linearly",
         f"{first['open_s'] * 1000:.0f} to {last['open_s'] * 1000:.0f} ms",
         is_linear(points, size, "open_s", 0.1)),
        (f"{what}: memory grows at most linearly",
         f"{first['rss_mib']:.0f} to {last['rss_mib']:.0f} MiB",
         is_linear(points, size, "rss_mib", 64))]


def reads(maker, short):
    """16 TiB, 20 million mappings: opening, and random reads within bounds of memory."""
    pool = maker.pool("--size", "16TiB", "--mappings", 20 * MILLION)
    found, seconds = [], 4 if short else 20
    try:
        for bound in (64, 128, 256, 512, None):
            with pool.serve(*(["--cache-size", f"{bound}MiB"] if bound else [])) as server:
                opened = server.first_reply("v0")
                server.load("v0", "randread", 32, seconds).result()
                before = server.memory()
                row = server.load("v0", "randread", 32, seconds).result()
                row |= dict(cache_mib=bound, open_s=opened, rss_before_mib=before,
                            rss_mib=server.memory())
                one = server.load("v0", "randread", 1, 2).result()
                found.append(row | dict(qd1_iops=one["iops"], qd1_p50_us=one["p50_us"]))
    finally:
        pool.remove()
    opened = max(row["open_s"] for row in found)
    goals = [(f"16 TiB, 20 M mappings: first reply within {OPEN_SECONDS} s",
              f"{opened * 1000:.0f} ms", opened < OPEN_SECONDS)]
    for row in found:
        # Besides the cache there are buffers, stacks and the program.
        bound, name = row["cache_mib"], "by default"
        limit = MEMORY_MIB
        if bound:
            limit, name = bound + OTHER_MIB, f"--cache-size {bound}MiB"
        goals.append((
            f"  random reads, {name}: RSS up to {limit} MiB",
            f"{row['rss_mib']:.0f} MiB, {row['iops'] / 1000:.0f}k IOPS", row["rss_mib"] <= limit))
    return dict(points=found), goals


def mappings(maker, short):
    """Open time and memory with 1, 5, 10, 20 million mappings."""
    points = []
    for count in (1, 5, 10, 20):
        pool = maker.pool("--size", "16TiB", "--mappings", count * MILLION)
        try:
            with pool.serve() as server:
                opened = server.first_reply("v0")
                idle = server.memory()
                row = server.load("v0", "randread", 32, 3 if short else 10).result()
                points.append(row | dict(
                    mappings=count * MILLION, open_s=opened, idle_mib=idle,
                    rss_mib=server.memory()))
        finally:
            pool.remove()
    return dict(points=points), growth("1 to 20 M mappings", points, "mappings")


def snapshot(maker, short):
    """Snapshots of that volume while somebody writes to it."""
    pool = maker.pool("--size", "16TiB", "--mappings", 20 * MILLION, data_in_memory=True)
    count, gap = (5, 1.0) if short else (20, 1.0)
    commands, pauses = [], []
    try:
        with pool.serve() as server:
            server.load("v0", "randwrite", 4, 3).result()
            load = server.load("v0", "randwrite", 4, count * gap + 4,
                               log=pool.folder.parent / "latency")
            time.sleep(2)
            windows = []
            for number in range(count):
                began = time.time()
                _, taken = server.command("volume", "snapshot", "v0", f"s{number}")
                commands.append(taken * 1000)
                windows.append((began, time.time() + 0.05))
                time.sleep(gap)
            whole = load.result()
            ended = load.latencies()
            for first, last in windows:
                pauses.append(max(
                    (taken * 1000 for when, taken in ended if first <= when <= last), default=0))
            steady = [taken * 1000 for when, taken in ended if when < windows[0][0]]
        pool.check()
    finally:
        pool.remove()
    figures = dict(commands_ms=commands, pauses_ms=pauses, load=whole,
                   steady_p99_ms=percentile(steady, 0.99), steady_max_ms=max(steady, default=0))
    return figures, [
        (f"snapshot of it under load: longest write within {SNAPSHOT_MS} ms",
         f"{median(pauses):.1f}, at most {max(pauses):.1f} ms", median(pauses) <= SNAPSHOT_MS),
        (f"snapshot of it under load: the command within {SNAPSHOT_MS} ms",
         f"{median(commands):.1f}, at most {max(commands):.1f} ms",
         median(commands) <= SNAPSHOT_MS)]


def volumes(maker, short):
    """100, 1000, 10,000 volumes: opening, listing, serving, and one volume more."""
    points = []
    for count in (100, 1000, 10_000):
        pool = maker.pool("--size", "1GiB", "--volumes", count, "--mappings", 16)
        try:
            with pool.serve() as server:
                opened = server.first_reply(f"v{count - 1}")
                idle = server.memory()
                listed, list_s = server.command("volume", "list")
                client = Client(server.socket)
                began = time.monotonic()
                names = client.list()
                names_s = time.monotonic() - began
                client.close()
                if len(names) != count or len(listed.splitlines()) != count + 1:
                    raise ScaleError(f"{len(names)} exports listed of {count}")
                began = time.monotonic()
                chosen = random.Random(1).sample(names, min(count, 1000))
                for name in chosen:
                    client = Client(server.socket, name)
                    client.read(0, 4096)
                    client.close()
                served = (time.monotonic() - began) / len(chosen)
                _, create_s = server.command("volume", "create", "more", "1GiB")
                _, snapshot_s = server.command("volume", "snapshot", "v0", "copy")
                _, delete_s = server.command("volume", "delete", "more")
                points.append(dict(
                    volumes=count, open_s=opened, idle_mib=idle, rss_mib=server.memory(),
                    list_s=list_s, export_list_s=names_s, connect_and_read_s=served,
                    create_s=create_s, snapshot_s=snapshot_s, delete_s=delete_s))
        finally:
            pool.remove()
    last = points[-1]
    return dict(points=points), [
        (f"10,000 volumes: first reply within {OPEN_SECONDS} s",
         f"{last['open_s'] * 1000:.0f} ms", last["open_s"] < OPEN_SECONDS),
        ("  listed within 1 s, by wafer and by NBD",
         f"{last['list_s'] * 1000:.0f}, {last['export_list_s'] * 1000:.0f} ms",
         max(last["list_s"], last["export_list_s"]) < 1),
        ("  connecting to one of them and reading: 10 ms",
         f"{last['connect_and_read_s'] * 1000:.1f} ms", last["connect_and_read_s"] < 0.01),
        ("  one volume more, a snapshot, a deletion: 100 ms each",
         ", ".join(f"{last[key] * 1000:.0f}" for key in ("create_s", "snapshot_s", "delete_s"))
         + " ms", max(last["create_s"], last["snapshot_s"], last["delete_s"]) < 0.1),
        *growth("100 to 10,000 volumes", points, "volumes")]


def chain(maker, short):
    """Reads of a volume with 1000 snapshots, and of the snapshots, next to one without any."""
    seconds, rounds = (2, 2) if short else (5, 3)
    size = ["--size", "1TiB", "--mappings", MILLION]
    samples = {}
    for snapshots in (0, 1000):
        pool = maker.pool(*size, "--snapshots", snapshots, "--changes", 500 if snapshots else 0)
        try:
            with pool.serve() as server:
                exports = ["v0"] + (["s0", f"s{snapshots - 1}"] if snapshots else [])
                for number in range(rounds):
                    for export in exports:
                        row = server.load(export, "randread", 32, seconds).result()
                        samples.setdefault(f"{export} of {snapshots}", []).append(row["iops"])
        finally:
            pool.remove()
    best = {name: max(values) for name, values in samples.items()}
    alone = best.pop("v0 of 0")
    worst = min(best.values()) / alone
    return dict(samples=samples), [(
        "chain of 1000 snapshots: reads at least 0.9 times as fast",
        f"{worst:.2f} times", worst >= 0.9)]


def deletion(maker, short):
    """A snapshot with 16 million mappings of its own goes, while somebody writes."""
    pool = maker.pool("--size", "1TiB", "--volumes", 2, "--mappings", 1 << 24, "--dense",
                      data_in_memory=True)
    seconds = 5 if short else 15
    rows, goals = {}, []
    try:
        with pool.serve() as server:
            # In place only, and first writes, which need the pool's lock.
            server.command("volume", "create", "empty", "1TiB")
            kinds = {"in place": "v0", "first writes": "empty"}
            for name, export in kinds.items():
                rows[name] = {}
                rows[name]["before"] = server.load(
                    export, "randwrite", 4, seconds, rate_iops=2000).result()
            began = time.monotonic()
            server.command("volume", "delete", "v1")
            for name, export in kinds.items():
                load = server.load(export, "randwrite", 4, seconds, rate_iops=2000)
                rows[name]["during"] = load.result()
                left = [v for v in server.volumes() if v["state"] == "deleting"]
                rows[name]["still_deleting"] = bool(left)
                rows[name]["left_bytes"] = left[0]["mappedBytes"] if left else 0
            if not short:
                while any(v["state"] == "deleting" for v in server.volumes()):
                    time.sleep(0.5)
                rows["all_s"] = time.monotonic() - began
            rows["rss_mib"] = server.memory()
        if not short:
            pool.check()
    finally:
        pool.remove()
    for name in kinds:
        before, during = rows[name]["before"]["p99_us"], rows[name]["during"]["p99_us"]
        goals.append((
            f"deleting 16 M mappings: p99 of writes ({name}) at most double",
            f"{before:.0f} to {during:.0f} us", during <= 2 * before))
    if "all_s" in rows:
        goals.append(("  and it ends", f"after {rows['all_s']:.0f} s", True))
    return rows, goals


ROWS = dict(reads=reads, mappings=mappings, snapshot=snapshot, volumes=volumes, chain=chain,
            deletion=deletion)
