"""Charts of a result of Scripts/scale: how open time and memory grow."""
import sys


def draw(result, folder):
    try:
        import matplotlib
    except ImportError:
        print("scale: no charts: matplotlib is not installed (pip install matplotlib)",
              file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    folder.mkdir(parents=True, exist_ok=True)
    for row, label, scale in (("mappings", "million mappings", 1e6), ("volumes", "volumes", 1)):
        points = result["figures"].get(row, {}).get("points")
        if not points:
            continue
        sizes = [point[row] / scale for point in points]
        figure, axes = pyplot.subplots(1, 2, figsize=(8, 3))
        for axis, key, unit in ((axes[0], "open_s", "open, s"), (axes[1], "rss_mib", "RSS, MiB")):
            axis.plot(sizes, [point[key] for point in points], marker="o")
            axis.set_xlabel(label)
            axis.set_title(unit)
            axis.set_ylim(bottom=0)
        figure.tight_layout()
        figure.savefig(folder / f"scale-{row}.svg")
        pyplot.close(figure)
