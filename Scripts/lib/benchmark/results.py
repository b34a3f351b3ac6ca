"""The samples by row and server, their medians, and ratios.

A ratio is that of two medians; its spread is that of the ratios of the single rounds, whose samples
were taken within seconds of each other.
"""
import re
from dataclasses import dataclass
from statistics import median

from goals import GOALS
from rows import ROWS


@dataclass
class Ratio:
    value: float
    least: float
    most: float
    other: str


class Cells:
    """The samples of one row on one storage, by server."""

    def __init__(self, samples):
        every = {}
        for sample in samples:
            every.setdefault(sample["server"], []).append(sample)
        self.errors = {server: next(s["error"] for s in cell if "error" in s)
                       for server, cell in every.items() if any("error" in s for s in cell)}
        good = {server: [s for s in cell if "error" not in s] for server, cell in every.items()}
        self.cells = {server: cell for server, cell in good.items() if cell}

    def has(self, server, key):
        return server in self.cells and all(key in sample for sample in self.cells[server])

    def median(self, server, key):
        return median(sample[key] for sample in self.cells[server])

    def spread(self, server, key):
        values = [sample[key] for sample in self.cells[server]]
        return min(values), max(values)

    def best(self, key, pattern, largest):
        there = [server for server in self.cells
                 if re.fullmatch(pattern, server) and self.has(server, key)]
        choose = max if largest else min
        return choose(there, key=lambda server: self.median(server, key), default=None)

    def ratio(self, key, other, others=None, server="wafer"):
        """Of a server here to another, here or in the cells of another row; None if one is
        missing."""
        others = others or self
        if other is None or not self.has(server, key) or not others.has(other, key):
            return None
        theirs = {sample["round"]: sample[key] for sample in others.cells[other]}
        ratios = [sample[key] / theirs[sample["round"]] for sample in self.cells[server]
                  if theirs.get(sample["round"])]
        middle = others.median(other, key)
        if not middle or not ratios:
            return None
        return Ratio(self.median(server, key) / middle, min(ratios), max(ratios), other)


@dataclass
class Verdict:
    goal: object
    row: object
    ratio: object                 # None: not measured

    @property
    def is_met(self):
        if self.goal.is_floor:
            return self.ratio.value >= self.goal.bound
        return self.ratio.value <= self.goal.bound


class Results:
    """What a run has found. `result` is what --json writes."""

    def __init__(self, result):
        self.facts = result["facts"]
        self.servers = result["servers"]
        self.skipped = result["skipped"]
        self.samples = result["samples"]
        self.rows = {row.name: row for row in ROWS}

    def cells(self, storage, row):
        """Of the storage of that name."""
        return Cells([sample for sample in self.samples
                      if sample["storage"] == storage and sample["row"] == row])

    def measured_rows(self, storage):
        there = {sample["row"] for sample in self.samples if sample["storage"] == storage}
        return [row for row in ROWS if row.name in there]

    def verdicts(self):
        """Of every goal, on the first storage of its kind."""
        storage = {}
        for description in self.facts["storage"]:
            storage.setdefault(description["kind"], description["name"])
        for goal in GOALS:
            name = storage.get(goal.storage)
            cells = self.cells(name, goal.row)
            others = self.cells(name, goal.other_row) if goal.other_row else cells
            best = others.best(goal.figure, goal.against, largest=goal.is_floor)
            yield Verdict(goal, self.rows[goal.row], cells.ratio(goal.figure, best, others))
