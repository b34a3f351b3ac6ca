"""The samples as Markdown: medians, their spread, and Wafer's ratio to the other servers.

A ratio is that of two medians; the range after it is that of the ratios of the single rounds, whose
samples were taken within seconds of each other.
"""
from statistics import median

from servers import DEVICE
from workloads import WORKLOADS

BEGIN = "<!-- results -->"
END = "<!-- end of results -->"
NONE = "n/a"
# More processors than this busy with other things make a run a poor one.
BUSY_CORES = 0.3


class Row:
    """The samples of one workload on one storage."""

    def __init__(self, samples):
        self.cells = {}
        for sample in samples:
            self.cells.setdefault(sample["server"], []).append(sample)
        self.errors = {server: next(s["error"] for s in cell if "error" in s)
                       for server, cell in self.cells.items() if any("error" in s for s in cell)}
        self.cells = {server: [s for s in cell if "error" not in s]
                      for server, cell in self.cells.items()}
        self.cells = {server: cell for server, cell in self.cells.items() if cell}

    def median(self, server, key):
        return median(sample[key] for sample in self.cells[server])

    def spread(self, server, key):
        values = [sample[key] for sample in self.cells[server]]
        return min(values), max(values)

    def best(self, key, servers, largest):
        there = [server for server in self.cells if server != "wafer" and server in servers]
        choose = max if largest else min
        return choose(there, key=lambda server: self.median(server, key), default=None)

    def ratio(self, key, other):
        """"1.20 (1.11-1.31) other", Wafer's divided by the other's."""
        if other is None or "wafer" not in self.cells:
            return NONE
        theirs = {sample["round"]: sample[key] for sample in self.cells[other]}
        ratios = [sample[key] / theirs[sample["round"]] for sample in self.cells["wafer"]
                  if theirs.get(sample["round"])]
        middle = self.median(other, key)
        if not middle or not ratios:
            return NONE
        return (f"{self.median('wafer', key) / middle:.2f} "
                f"({min(ratios):.2f}–{max(ratios):.2f}) {other}")


def number(value):
    """Three digits or so: 118k, 9.4k, 870, 8.2"""
    if value >= 100_000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def machine_section(result):
    facts = result["facts"]
    others = [sample["other_cores"] for sample in result["samples"] if "error" not in sample]
    versions = "; ".join(facts["versions"].values())
    lines = [
        f"`{facts['command'].strip()}`, {facts['date']}, {facts['minutes']} minutes.",
        f"{facts['processor']}, {facts['processors']} processors, {facts['memory_gib']} GiB; Linux "
        f"{facts['kernel']}. {versions}.",
        f"{facts['rounds']} rounds, samples of {facts['seconds']} s, volumes of "
        f"{facts['size_mib']} MiB, seed {facts['seed']}. Load average {facts['load_before'][0]} "
        f"before and {facts['load_after'][0]} after; processors busy with other things during a "
        f"sample: median {median(others or [0]):.2f}, at most {max(others or [0]):.2f}.",
    ]
    if median(others or [0]) > BUSY_CORES:
        lines.append("**Measured on a loaded machine: the ratios are rough, the rest says little.**")
    text = "\n\n".join(lines) + "\n\n"
    text += table(
        ["server", "command", "an acknowledged write is in", "a flush is"],
        [[server["name"], f"`{server['command']}`", server["reaches"], server["flush"]]
         for server in result["servers"]])
    if result["skipped"]:
        text += "\nLeft out:\n\n" + "".join(f"- {line}\n" for line in result["skipped"])
    return text


def rows_of(result, storage):
    for workload in WORKLOADS:
        samples = [sample for sample in result["samples"]
                   if sample["storage"] == storage["name"] and sample["workload"] == workload.name]
        if samples:
            yield workload, Row(samples)


def ratio_section(result, storage):
    facts = {server["name"]: server for server in result["servers"]}
    head = ["Wafer's share of", "IOPS: best server", "best with O_DIRECT", "best qcow2",
            "CPU a request: least", "p99: lowest"]
    lines = []
    for workload, row in rows_of(result, storage):
        every = set(row.cells)
        direct = {s for s in every if facts[s.partition(",")[0]]["reaches"] == DEVICE}
        thin = {s for s in every if facts[s.partition(",")[0]]["is_thin"]}
        line = [workload.title]
        line += [row.ratio("iops", row.best("iops", servers, largest=True))
                 for servers in (every, direct, thin)]
        line += [row.ratio(key, row.best(key, every, largest=False))
                 for key in ("cpu_us", "p99_us")]
        lines.append(line)
    kept = [column for column in range(len(head))
            if any(line[column] != NONE for line in lines)]
    return table([head[column] for column in kept],
                 [[line[column] for column in kept] for line in lines])


def value_section(result, storage):
    lines = []
    for workload, row in rows_of(result, storage):
        order = sorted(row.cells, key=lambda server: -row.median(server, "iops"))
        for server in order:
            least, most = row.spread(server, "iops")
            lines.append([
                workload.title if server == order[0] else "", server,
                number(row.median(server, "iops")), f"{number(least)}–{number(most)}",
                number(row.median(server, "bytes_a_second") / 1e6),
                number(row.median(server, "cpu_us")), number(row.median(server, "p99_us")),
                number(row.spread(server, "max_us")[1] / 1000)])
        lines += [[workload.title, server, "failed: " + error.replace("\n", " ")] + [""] * 5
                  for server, error in row.errors.items()]
    return table(
        ["", "server", "IOPS", "min–max", "MB/s", "CPU, µs a request", "p99, µs",
         "longest, ms"], lines)


def markdown(result):
    text = machine_section(result)
    for storage in result["facts"]["storage"]:
        kind = "In memory" if storage["is_memory"] else "On disk"
        if not any(True for _ in rows_of(result, storage)):
            continue
        text += f"\n### {kind}: {storage['filesystem']}, {storage['name']}\n\n"
        text += ratio_section(result, storage) + "\n" + value_section(result, storage)
    return text


def write(path, text):
    """Into the file, or between its two marks if it has them."""
    if path.exists():
        old = path.read_text()
        before, begin, rest = old.partition(BEGIN + "\n")
        _, end, after = rest.partition(END)
        if begin and end:
            text = before + begin + "\n" + text + "\n" + end + after
    path.write_text(text)
