# SPDX-License-Identifier: Apache-2.0
"""The report: each kind of filters under each optimizer, beside plain ones of the same and of half the width."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments import run_log
from experiments.report.logs import Experiment, RunLog
from experiments.report.summary import Cell, Spread, Summary, Variant
from experiments.report.table import aligned, csv_of, describe, text
from tools.program import UserError

from .filters import FILTERS

VARIED = ("method", "calibration", "filters", "lr", "seed")
_OPTIMIZERS = {"sgd": "SGD", "csgd": "CSGD"}


@dataclass(frozen=True)
class _Row:
    """filters: one of FILTERS; method: "sgd" or "csgd"."""

    filters: str
    method: str
    summary: Summary
    variant: Variant

    @property
    def label(self) -> str:
        c = self.variant.calibration
        return f"{FILTERS[self.filters].label}, {_OPTIMIZERS[self.method]}" + ("" if c is None else f", c = {c:g}")

    @property
    def best(self) -> Cell:
        return self.summary.best(self.variant)

    def difference(self, to: _Row | None) -> tuple[float, float] | None:
        """Of the test accuracy to that of another row, in points, and its standard error; paired by seed."""
        if to is None or to == self:
            return None
        pair = self.best.difference(to.best, f"test_{self.summary.headline}")
        return pair and (100 * pair[0], 100 * pair[1])


def _rows(experiment: Experiment) -> list[_Row]:
    """In the order of FILTERS, SGD before CSGD."""
    by_filters: dict[str, list[RunLog]] = {name: [] for name in FILTERS}
    for run in experiment.runs:
        name = run.settings["filters"]
        if name not in by_filters:
            raise UserError(
                f"a log has the filters {name!r}, which this version does not have; report by the newer one."
            )
        by_filters[name].append(run)
    rows = []
    for filters, runs in by_filters.items():
        if runs:
            summary = Summary(Experiment(runs, experiment.common))
            rows += [_Row(filters, variant.method, summary, variant) for variant in summary.cells]
    return rows


def _like(rows: list[_Row], row: _Row, filters: str) -> _Row | None:
    """The row with these filters and the same optimizer, where there is one."""
    found = [other for other in rows if (other.filters, other.method) == (filters, row.method)]
    return found[0] if found else None


def table(experiment: Experiment) -> str:
    """As Markdown."""
    rows = _rows(experiment)
    split = experiment.selection
    lines = [
        [
            "filters and optimizer",
            "seeds",
            "lr",
            f"{split} accuracy, %",
            "**test accuracy, %**",
            "to plain",
            "to half",
            "parameters",
            "folded",
            "s per epoch",
            "inference, ms",
        ]
    ]
    for row in rows:
        best = row.best
        results = [run.results for run in best.runs]
        lines.append(
            [
                row.label,
                str(len(best.runs)),
                f"{row.summary.best_lr(row.variant):g}" + ("†" if row.summary.at_end_of_grid(row.variant) else ""),
                _percent(best.last(f"{split}_accuracy")),
                f"**{_percent(best.last('test_accuracy'))}**",
                points(row.difference(_like(rows, row, "plain"))),
                points(row.difference(_like(rows, row, "half"))),
                f"{results[0]['parameters']:,}",
                f"{results[0]['folded']:,}",
                f"{_seconds(best):.1f}",
                f"{statistics.median(result['inference_ms'] for result in results):.1f}",
            ]
        )
    same = all(run.results["same"] for run in experiment.runs)
    notes = [
        "Mean ± standard deviation over the seeds, after the last epoch, at the learning rate with the best mean "
        f"{split} accuracy. To plain, to half: difference in points to the plain network of the same width and of half "
        "the width under the same optimizer, each at its best learning rate, paired by seed; ± is the standard error, "
        "in brackets how many of them the difference is.",
        "Parameters: in training; folded: of the plain network for inference. Times are medians over the runs, with "
        "other trainings beside them. Inference: a forward pass of 500 images.",
        f"Every folded network gave the bits of the trained one: {'yes' if same else '**no**'}.",
    ]
    if any(row.summary.at_end_of_grid(row.variant) for row in rows):
        notes.append("† At the end of the grid: a learning rate beyond it may be better.")
    head = "  \n".join(describe(experiment))
    return "\n\n".join([head, aligned(lines), " ".join(notes), experiment.environment()]) + "\n"


def write(experiment: Experiment, out: Path) -> list[str]:
    """Every learning rate as CSV, and the plot."""
    from matplotlib.figure import Figure  # here, since the table does not need it

    rows = _rows(experiment)
    run_log.write_atomically(out / "summary.csv", _csv(rows))
    figure = Figure(figsize=(10, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for method, label in _OPTIMIZERS.items():
        places = [k for k, row in enumerate(rows) if row.method == method]
        if not places:
            continue
        spreads = [rows[k].best.last("test_accuracy") for k in places]
        means = [100 * spread.mean for spread in spreads]
        bars = [100 * spread.std if spread.count > 1 else 0 for spread in spreads]
        axes.errorbar(means, places, xerr=bars, fmt="o", capsize=3, label=label)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %: mean ± standard deviation over the seeds")
    figure.suptitle("\n".join(describe(experiment)), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "accuracy.png", dpi=120)
    return ["summary.csv", "accuracy.png"]


def points(difference: tuple[float, float] | None) -> str:
    """Difference ± standard error, and how many standard errors it is."""
    if difference is None:
        return ""
    mean, error = difference
    if not math.isfinite(error):
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ± {error:.2f}" + (f" ({abs(mean) / error:.1f})" if error else "")


def _percent(spread: Spread) -> str:
    return text(Spread(100 * spread.mean, 100 * spread.std, spread.count), 2)


def _seconds(cell: Cell) -> float:
    return statistics.median(epoch["seconds"] for run in cell.runs for epoch in run.epochs)


def _csv(rows: list[_Row]) -> str:
    """A line for each run."""
    columns = ["train_loss", "validation_accuracy", "test_accuracy", "density"]
    return csv_of(
        [
            {"filters": row.filters, "method": row.method, "calibration": row.variant.calibration, "lr": lr}
            | {"seed": run.seed, "diverged": int(run.diverged)}
            | {column: run.epochs[-1].get(column) for column in columns}
            | {"seconds_per_epoch": f"{statistics.median(epoch['seconds'] for epoch in run.epochs):.2f}"}
            for row in rows
            for lr, cell in row.summary.cells[row.variant].items()
            for run in cell.runs
        ]
    )
