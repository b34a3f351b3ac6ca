"""One chart for each kind of storage: every server's IOPS next to Wafer's, and its processor time
for a request.

Needs matplotlib (Debian: python3-matplotlib).
"""
import sys

from results import Results
from rows import COPY
from report import STORAGE_TITLES

try:
    import matplotlib
except ImportError:
    sys.exit("bench: --charts needs matplotlib (apt-get install python3-matplotlib, or "
             "pip install matplotlib)")
matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

# The same servers look the same in every chart; those that are not peers are hollow.
STYLES = {
    "wafer": ("black", "|"), "floor": ("black", "o"), "file": ("black", "s"),
    "nbdkit-file": ("tab:blue", "o"), "nbdkit-memory": ("tab:cyan", "o"),
    "nbd-server": ("tab:green", "o"),
    "qemu-raw-cached": ("tab:orange", "o"), "qemu-raw-direct": ("tab:orange", "s"),
    "qemu-raw-native": ("tab:orange", "^"),
    "qemu-qcow2-cached": ("tab:red", "o"), "qemu-qcow2-direct": ("tab:red", "s"),
    "qemu-qcow2-native": ("tab:red", "^"),
    "qemu-qcow2x-cached": ("tab:purple", "o"), "qemu-qcow2x-direct": ("tab:purple", "s"),
    "qemu-qcow2x-native": ("tab:purple", "^"),
}
HOLLOW = ("floor", "file")
INCHES_A_ROW = 0.32


def plain(value, _):
    return f"{value:g}"


def draw_storage(results, storage, path):
    rows = [row for row in results.measured_rows(storage["name"]) if row.generator != COPY]
    cells = {row.name: results.cells(storage["name"], row.name) for row in rows}
    rows = [row for row in rows if "wafer" in cells[row.name].cells]
    if not rows:
        return False
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(11, 1.6 + INCHES_A_ROW * len(rows)), layout="constrained")
    shown = {}
    for y, row in enumerate(rows):
        cell = cells[row.name]
        ours = cell.median("wafer", "iops")
        for server in cell.cells:
            name, _, way = server.partition(", ")
            color, marker = STYLES[name]
            fill = "none" if name in HOLLOW or way == "overlay" else color
            style = dict(color=color, marker=marker, markerfacecolor=fill, linestyle="none",
                         markersize=11 if name == "wafer" else 6,
                         markeredgewidth=2.5 if name == "wafer" else 1.2)
            handle, = left.plot(cell.median(server, "iops") / ours, y, **style)
            shown.setdefault(server, handle)
            if cell.has(server, "cpu_us"):
                right.plot(cell.median(server, "cpu_us"), y, **style)
    left.set_title("IOPS, Wafer = 1 (more is better)", fontsize=10)
    right.set_title("CPU of the server, µs a request (less is better)", fontsize=10)
    left.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    left.invert_yaxis()
    for axes in (left, right):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.3)
    figure.legend(shown.values(), shown.keys(), loc="upper center", bbox_to_anchor=(0.5, 0),
                  ncol=5, fontsize=8)
    figure.suptitle(f"{STORAGE_TITLES[storage['kind']]}: {storage['filesystem']}, "
                    f"{storage['name']}", fontsize=11)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True


def draw(result, folder):
    """The charts' files, in the folder."""
    results = Results(result)
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "wafer"   # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    drawn = set()
    for storage in results.facts["storage"]:
        if storage["kind"] not in drawn and draw_storage(
                results, storage, folder / f"{storage['kind']}.svg"):
            drawn.add(storage["kind"])
