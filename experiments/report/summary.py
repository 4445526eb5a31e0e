# SPDX-License-Identifier: Apache-2.0
"""Means and standard deviations over the seeds, the learning rate chosen for each method, differences to SGD."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from .logs import Experiment, RunLog


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (NaN for a single value) of ``count`` values."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """At least one value; NaN and infinities make the result NaN."""
        mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
        known = len(values) > 1 and math.isfinite(mean)
        return cls(mean, statistics.stdev(values) if known else math.nan, len(values))

    def mean_and_error(self) -> tuple[float, float]:
        """The mean and its standard error (NaN for a single value)."""
        return self.mean, self.std / math.sqrt(self.count)


@dataclass(frozen=True)
class Variant:
    """A row of the table: what is compared, at every learning rate. dtype: of parameters and momentum."""

    method: str
    calibration: float | None
    dtype: str

    @property
    def label(self) -> str:
        """For legends and tables, without the dtype."""
        if self.calibration is None:
            return "SGD" if self.method == "sgd" else f"SGD, {self.method}"
        name, _, where = self.method.partition("-")
        return f"{'CSGD' if name == 'csgd' else f'layer on {where}s'}, c = {self.calibration:g}"


@dataclass(frozen=True)
class Cell:
    """A variant at one learning rate: its runs, one per seed."""

    runs: list[RunLog]

    def last(self, column: str) -> Spread | None:
        """Of a column after the last epoch; None where it is empty."""
        return self._spread([run.epochs[-1].get(column) for run in self.runs])

    def mean_over_epochs(self, column: str) -> Spread | None:
        """Of the mean of a column over a training."""
        values = [[epoch.get(column) for epoch in run.epochs] for run in self.runs]
        return self._spread([None if None in column else statistics.fmean(column) for column in values])

    def at_epoch(self, column: str, epoch: int) -> Spread:
        """Of a column after an epoch (from 0)."""
        return Spread.of([run.epochs[epoch][column] for run in self.runs])

    def difference(self, to: Cell, column: str) -> tuple[float, float] | None:
        """Of a column after the last epoch to that of ``to``: mean over the seeds that both have, and standard error.

        Paired by seed, since runs of one seed start from the same weights and see the same batches. None without a
        common seed.
        """
        of_seed = {run.seed: run.epochs[-1][column] for run in to.runs}
        pairs = [run.epochs[-1][column] - of_seed[run.seed] for run in self.runs if run.seed in of_seed]
        return Spread.of(pairs).mean_and_error() if pairs else None

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(run.diverged for run in self.runs)

    @staticmethod
    def _spread(values: list[float | None]) -> Spread | None:
        return None if None in values else Spread.of(values)


class Summary:
    """cells: for each variant, in the order of the tables, its cells by learning rate, ascending."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        found: dict[Variant, dict[float, list[RunLog]]] = defaultdict(lambda: defaultdict(list))
        for run in experiment.runs:
            found[Variant(run.method, run.calibration, run.dtype)][run.lr].append(run)
        self.cells = {
            variant: {lr: Cell(sorted(found[variant][lr], key=lambda run: run.seed)) for lr in sorted(found[variant])}
            for variant in sorted(found, key=_order)
        }
        self.headline = experiment.headline
        self.selected_by = f"{experiment.selection}_{self.headline}"

    @property
    def lrs(self) -> list[float]:
        """All learning rates, ascending."""
        return sorted({lr for cells in self.cells.values() for lr in cells})

    def best_lr(self, variant: Variant) -> float:
        """That with the highest mean by the selection split after the last epoch, of those with the most seeds.

        The lower one where two are equal.
        """
        cells = self.cells[variant]
        seeds = max(len(cell.runs) for cell in cells.values())
        complete = [lr for lr, cell in cells.items() if len(cell.runs) == seeds]
        return max(complete, key=lambda lr: (cells[lr].last(self.selected_by).mean, -lr))

    def best(self, variant: Variant) -> Cell:
        """The cell at best_lr()."""
        return self.cells[variant][self.best_lr(variant)]

    def at_end_of_grid(self, variant: Variant) -> bool:
        """Whether the best learning rate is the lowest or highest tried, so that one beyond it may be better."""
        lrs = list(self.cells[variant])
        return len(lrs) > 1 and self.best_lr(variant) in (lrs[0], lrs[-1])

    def result(self, variant: Variant) -> Spread:
        """Headline metric on the test images after the last epoch, at the best learning rate."""
        return self.best(variant).last(f"test_{self.headline}")

    def fewer_bytes(self, variant: Variant) -> Spread | None:
        """How many times fewer bytes than plain DistributedDataParallel an exchange of gradients sent, if any did."""
        return self.best(variant).last("fewer_bytes")

    @property
    def exchanged(self) -> bool:
        """Whether exchanges of gradients are compared."""
        return any(map(self.fewer_bytes, self.cells))

    @property
    def baseline(self) -> Variant | None:
        """SGD in float32, where it was run."""
        sgd = Variant("sgd", None, "float32")
        return sgd if sgd in self.cells else None

    def difference(self, variant: Variant) -> tuple[float, float] | None:
        """Of the results to the baseline's, as Cell.difference(); None for the baseline, and where there is none."""
        if self.baseline in (None, variant):
            return None
        return self.best(variant).difference(self.best(self.baseline), f"test_{self.headline}")


def _order(variant: Variant) -> tuple:
    """float32 before lower precision; SGD, CSGD, layers, others by name; by strength."""
    methods = ["sgd", "csgd", "layer-output", "layer-weight"]
    place = methods.index(variant.method) if variant.method in methods else len(methods)
    return variant.dtype != "float32", variant.dtype, place, variant.method, variant.calibration or 0.0
