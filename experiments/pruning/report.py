# SPDX-License-Identifier: Apache-2.0
"""Accuracy and size against sparsity, as a table and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path

from experiments import run_log
from experiments.report.logs import Experiment, RunLog
from experiments.report.summary import Spread
from experiments.report.table import aligned, csv_of, text

from .methods import DENSE, METHODS, STRUCTURES

VARIED = ("method", "structure", "sparsity", "seed")

_SIZE_COLUMNS = ["of all", "MFLOPs", "of all", "forward as built, ms", "forward, ms", "times as fast"]
_SIZES_NOTE = (
    "Parameters, FLOPs (two for a product and its sum, for one image) and the forward pass (median, batches of up to "
    '128 images) are those of the exported model; "of all" and "as built": beside the network before pruning, which '
    "was timed in turn with it."
)

Cell = tuple[str, str, float]  # structure, method, sparsity


def table(experiment: Experiment) -> str:
    """As Markdown."""
    measured = all("flops" in run.results for run in experiment.runs)  # not in logs of earlier versions
    head = ["structure", "method", "sparsity", "test accuracy, %", "zeros in convolutions, %", "parameters exported"]
    rows = [head + (_SIZE_COLUMNS if measured else [])]
    cells = _cells(experiment)
    for (structure, method, sparsity), runs in cells.items():
        size = statistics.fmean(run.results["exported"] for run in runs)
        rows.append(
            [
                structure,
                METHODS[method][0] if method in METHODS else method,
                f"{sparsity:.0%}",
                text(Spread.of([100 * run.epochs[-1]["test_accuracy"] for run in runs]), 2),
                text(Spread.of([100 * run.results["zeros"] for run in runs]), 1),
                f"{size:,.0f}",
                *(_size(runs) if measured else []),
            ]
        )
    worst = max(run.results["difference"] for run in experiment.runs)
    seeds = sorted({len(runs) for runs in cells.values()})
    parts = [
        _describe(experiment),
        aligned(rows),
        f"Mean ± standard deviation over {' to '.join(map(str, seeds))} seeds. "
        f"Largest difference of an exported model's logits, relative to the largest logit: {worst:.1e}."
        + (f" {_SIZES_NOTE}" if measured else ""),
        experiment.environment(),
    ]
    return "\n\n".join(parts) + "\n"


def _size(runs: list[RunLog]) -> list[str]:
    """The columns _SIZE_COLUMNS of the runs of a cell."""
    mean = {name: statistics.fmean(run.results[name] for run in runs) for name in runs[0].results}
    times = [run.results["seconds"] / run.results["exported_seconds"] for run in runs]
    return [
        f"{mean['exported'] / mean['weights']:.1%}",
        f"{mean['exported_flops'] / 1e6:.2f}",
        f"{mean['exported_flops'] / mean['flops']:.1%}",
        f"{1000 * mean['seconds']:.1f}",
        f"{1000 * mean['exported_seconds']:.1f}",
        text(Spread.of(times), 2),
    ]


def write(experiment: Experiment, out: Path) -> list[str]:
    """A line for each run, and the plot."""
    from matplotlib.figure import Figure  # here, since the table does not need it

    cells = _cells(experiment)
    lines = [
        {"structure": structure, "method": method, "sparsity": sparsity, "seed": run.seed}
        | {"test_accuracy": run.epochs[-1]["test_accuracy"], **run.results}
        for (structure, method, sparsity), runs in cells.items()
        for run in runs
    ]
    run_log.write_atomically(out / "summary.csv", csv_of(lines))
    structures = [name for name in STRUCTURES if any(key[0] == name for key in cells)] or [DENSE]
    figure = Figure(figsize=(5 * len(structures), 4), layout="constrained")
    panels = figure.subplots(1, len(structures), sharey=True, squeeze=False)[0]
    dense = {key[2]: runs for key, runs in cells.items() if key[1] == DENSE}
    for panel, structure in zip(panels, structures, strict=True):
        for k, (method, (label, _)) in enumerate(METHODS.items()):  # of a method the same colour in every picture
            points = {key[2]: runs for key, runs in cells.items() if key[:2] == (structure, method)}
            if not points:
                continue
            points = dense | points
            spreads = [Spread.of([100 * run.epochs[-1]["test_accuracy"] for run in runs]) for runs in points.values()]
            bars = [spread.std if spread.count > 1 else 0 for spread in spreads]
            places = [100 * sparsity + 0.4 * (k - 1.5) for sparsity in points]  # bars side by side
            means = [spread.mean for spread in spreads]
            panel.errorbar(places, means, bars, marker="o", capsize=3, label=label, color=f"C{k}")
        panel.set(title=f"structure: {structure}", xlabel="sparsity aimed at, % of weights")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend()
    figure.suptitle(_describe(experiment), wrap=True)
    figure.savefig(out / "accuracy.png", dpi=150)
    return ["summary.csv", "accuracy.png"]


def _cells(experiment: Experiment) -> dict[Cell, list[RunLog]]:
    """The runs of all seeds: the dense ones first, then by structure, method and sparsity."""
    structures, methods = [DENSE, *STRUCTURES], [DENSE, *METHODS]
    found: dict[Cell, list[RunLog]] = {}
    for run in experiment.runs:
        found.setdefault((run.settings["structure"], run.method, run.settings["sparsity"]), []).append(run)

    def place(key: Cell) -> tuple[int, int, float]:
        return structures.index(key[0]), methods.index(key[1]), key[2]

    return {key: found[key] for key in sorted(found, key=place)}


def _describe(experiment: Experiment) -> str:
    common, first = experiment.common, experiment.runs[0]
    limit = common["data"]["limit"]
    images = f", {limit:,} training images" if limit else ""
    what = f"{common['data']['data']}{images}, network {common['model']}"
    return f"{what}, {common['recipe']['epochs']} epochs, calibration {first.calibration:g}"
