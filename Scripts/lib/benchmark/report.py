"""The results as Markdown: the machine, the goals, and every row."""
from statistics import median

from goals import CPU, FILE, IOPS, P99, PEERS, QCOW2, QCOW2X, QEMU, SECONDS, WAFER
from results import Results
from rows import COPY, DISK, LOOP, MEMORY

RESULTS = ("<!-- results -->", "<!-- end of results -->")
PROFILE = ("<!-- profile -->", "<!-- end of profile -->")
# More processors than this busy with other things make a run a poor one.
BUSY_CORES = 0.3

STORAGE_TITLES = {MEMORY: "In memory", DISK: "On disk", LOOP: "On a block device, direct I/O"}
STORAGE_WORDS = {MEMORY: "in memory", DISK: "on disk", LOOP: "loop device"}
FIGURES = {IOPS: "IOPS", CPU: "CPU a request", P99: "p99", SECONDS: "time"}
AGAINST = {
    PEERS: "best other server", QEMU: "qemu-nbd's best setting", QCOW2: "qcow2",
    QCOW2X: "qcow2 with subclusters", FILE: "the file itself, fdatasync",
    QCOW2 + ", internal": "qcow2, internal snapshot", QCOW2 + ", overlay": "qcow2, overlay",
    QCOW2X + ", overlay": "qcow2 with subclusters, overlay",
}


def number(value):
    """Three digits or so: 118k, 9.4k, 870, 8.2, 0.45"""
    if value >= 100_000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def share(ratio):
    return "–" if ratio is None else f"{ratio.value:.2f} ({ratio.least:.2f}–{ratio.most:.2f})"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def machine_section(results):
    facts = results.facts
    others = [sample["other_cores"] for sample in results.samples if "error" not in sample] or [0]
    versions = "; ".join(facts["versions"].values())
    lines = [
        f"`{facts['command'].strip()}`, {facts['date']}, {facts['minutes']} minutes.",
        f"{facts['processor']}, {facts['processors']} processors, {facts['memory_gib']} GiB; Linux "
        f"{facts['kernel']}. {versions}.",
        f"{facts['rounds']} rounds, samples of {facts['seconds']:g} s, volumes of "
        f"{facts['size_mib']} MiB, seed {facts['seed']}. Load average {facts['load_before'][0]} "
        f"before and {facts['load_after'][0]} after; processors busy with other things during a "
        f"sample: median {median(others):.2f}, at most {max(others):.2f}.",
    ]
    if median(others) > BUSY_CORES:
        lines.append(
            "**Measured on a loaded machine: the ratios are rough, the rest says little.**")
    text = "\n\n".join(lines) + "\n"
    if results.skipped:
        text += "\nLeft out:\n\n" + "".join(f"- {line}\n" for line in results.skipped)
    return text


def server_section(results):
    there = {sample["server"].partition(",")[0] for sample in results.samples}
    return table(
        ["server", "command", "an acknowledged write is in", "a flush is"],
        [[server["name"], f"`{server['command']}`", server["reaches"], server["flush"]]
         for server in results.servers if server["name"] in there])


def against_words(results, goal):
    if goal.against == WAFER:
        return "Wafer: " + results.rows[goal.other_row].title
    return AGAINST[goal.against]


def goal_section(results):
    lines, met, measured = [], 0, 0
    for verdict in results.verdicts():
        goal, ratio = verdict.goal, verdict.ratio
        sign = "≥" if goal.is_floor else "≤"
        line = [f"{verdict.row.title} ({STORAGE_WORDS[goal.storage]})", FIGURES[goal.figure],
                against_words(results, goal), f"{sign} {goal.bound:.2f}"]
        if ratio is None:
            lines.append(line + ["not measured", "", ""])
            continue
        measured += 1
        met += verdict.is_met
        lines.append(line + [share(ratio), ratio.other if ratio.other != "wafer" else "",
                             "met" if verdict.is_met else "**not met**"])
    text = f"{met} of {measured} goals that were measured are met.\n\n"
    return text + table(
        ["", "Wafer's", "divided by that of", "goal", "measured", "which was", ""], lines)


def value_section(results, storage):
    lines = []
    for row in results.measured_rows(storage["name"]):
        cells = results.cells(storage["name"], row.name)
        order = sorted(cells.cells, key=lambda server: -cells.median(server, "iops"))
        for server in order:
            def middle(key, scale=1):
                return (number(cells.median(server, key) * scale) if cells.has(server, key)
                        else "–")
            line = [row.title if server == order[0] else "", server]
            if row.generator == COPY:
                line += [middle("seconds") + " s", "", "", middle("cpu_us", 1e-6) + " s", "", "",
                         ""]
            else:
                least, most = cells.spread(server, "iops")
                line += [middle("iops"), f"{number(least)}–{number(most)}",
                         middle("bytes_a_second", 1e-6), middle("cpu_us"),
                         middle("client_cpu_us"), middle("p50_us"), middle("p99_us")]
            lines.append(line + ["" if server == "wafer" else share(cells.ratio("iops", server))])
        lines += [[row.title, server, "failed: " + error.replace("\n", " ")] + [""] * 7
                  for server, error in cells.errors.items()]
    return table(
        ["", "server", "IOPS", "min–max", "MB/s", "CPU, µs a request", "the client's", "p50, µs",
         "p99, µs", "Wafer's IOPS ÷ these"], lines)


def markdown(result):
    results = Results(result)
    text = machine_section(results) + "\n### Goals\n\n" + goal_section(results)
    for storage in results.facts["storage"]:
        if results.measured_rows(storage["name"]):
            text += (f"\n### {STORAGE_TITLES[storage['kind']]}: {storage['filesystem']}, "
                     f"{storage['name']}\n\n{value_section(results, storage)}")
    return text + "\n### Servers\n\n" + server_section(results)


def write(path, text, marks):
    """Into the file, or between the two marks if it has them."""
    if path.exists():
        old = path.read_text()
        before, begin, rest = old.partition(marks[0] + "\n")
        _, end, after = rest.partition(marks[1])
        if begin and end:
            text = f"{before}{begin}\n{text}\n{end}{after}"
    path.write_text(text)
