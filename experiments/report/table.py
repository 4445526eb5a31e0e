# SPDX-License-Identifier: Apache-2.0
"""The summary as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from .logs import Experiment
from .summary import Spread, Summary, Variant

_UNKNOWN = "-"


def describe(experiment: Experiment) -> list[str]:
    """What was run, in two lines."""
    common, about = experiment.common, experiment.common["about"]
    recipe, execution = common["recipe"], common["execution"]
    images = ", ".join(f"{count:,} {split}" for split, count in about.get("images", {}).items())
    size = " x ".join(map(str, about.get("image_size", [])))
    data = f"{common['data']['data']} ({images} images{f' of {size}' if size else ''})"
    flags = [name for name in ("amp", "channels_last", "compile") if execution[name]]
    how = [
        f"{recipe['epochs']} epochs",
        f"batch size {recipe['batch_size']}",
        f"{schedule(recipe)} learning rate",
        f"momentum {recipe['momentum']:g}" + (" (Nesterov)" if recipe["nesterov"] else ""),
        f"weight decay {recipe['weight_decay']:g}",
        *(["augmented"] if common["data"]["augment"] else []),
        execution["device"],
        *flags,
    ]
    return [f"{data}, network {common['model']}", ", ".join(how)]


def schedule(recipe: dict[str, Any]) -> str:
    """Of the learning rate, in words."""
    how = recipe["schedule"]
    text = how["kind"]
    if how["milestones"]:
        text += f" at epochs {', '.join(map(str, how['milestones']))}"
    return text + (f", {how['warmup']} epochs of warm-up" if how["warmup"] else "")


def markdown(summary: Summary) -> str:
    """What was run, the table, how to read it, and where it was run."""
    parts = ["  \n".join(describe(summary.experiment)), aligned(_rows(summary)), _notes(summary)]
    if len(summary.lrs) > 1:
        parts += [
            f"Test {summary.headline} at every learning rate, whichever was chosen, %:",
            aligned(_all_lrs(summary)),
        ]
    parts.append(summary.experiment.environment())
    return "\n\n".join(parts) + "\n"


def _rows(summary: Summary) -> list[list[str]]:
    split, headline = summary.experiment.selection, summary.headline
    lrs = [f"{split}, lr {lr:g}" for lr in summary.lrs]
    difference = ["to SGD float32, points"] if summary.baseline else []
    fewer_bytes = ["plain bytes / bytes"] if summary.exchanged else []
    rows = [
        [
            "method",
            "dtype",
            "seeds",
            *lrs,
            "lr chosen",
            f"**test {headline}, %**",
            *difference,
            *fewer_bytes,
            "train loss",
            "density, %",
        ]
    ]
    for variant, cells in summary.cells.items():
        best = summary.best(variant)
        seeds = len(best.runs)
        grid = []
        for lr in summary.lrs:
            grid.append(_grid_cell(cells[lr], summary.selected_by, seeds) if lr in cells else _UNKNOWN)
        chosen = f"{summary.best_lr(variant):g}" + ("†" if summary.at_end_of_grid(variant) else "")
        row = [variant.label, variant.dtype, str(seeds), *grid, chosen, f"**{_percent(summary.result(variant))}**"]
        if summary.baseline:
            row.append(_difference(summary, variant))
        if summary.exchanged:
            times = summary.fewer_bytes(variant)
            row.append(_UNKNOWN if times is None else f"{times.mean:.1f}")
        rows.append([*row, _plain(best.last("train_loss")), _percent(best.mean_over_epochs("density"), 1)])
    return rows


def _all_lrs(summary: Summary) -> list[list[str]]:
    rows = [["method", "dtype", *(f"lr {lr:g}" for lr in summary.lrs)]]
    for variant, cells in summary.cells.items():
        seeds = len(summary.best(variant).runs)
        column = f"test_{summary.headline}"
        grid = [_grid_cell(cells[lr], column, seeds) if lr in cells else _UNKNOWN for lr in summary.lrs]
        rows.append([variant.label, variant.dtype, *grid])
    return rows


def _grid_cell(cell: Any, column: str, seeds: int) -> str:
    text = _percent(cell.last(column))
    if len(cell.runs) != seeds:
        text += f" (of {len(cell.runs)})"
    return text + (f" ({cell.diverged} diverged)" if cell.diverged else "")


def _difference(summary: Summary, variant: Variant) -> str:
    pair = summary.difference(variant)
    if pair is None:
        return _UNKNOWN
    mean, error = (100 * value for value in pair)
    return f"{mean:+.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")


def _percent(spread: Spread | None, digits: int = 2) -> str:
    return _UNKNOWN if spread is None else text(Spread(100 * spread.mean, 100 * spread.std, spread.count), digits)


def _plain(spread: Spread | None) -> str:
    return _UNKNOWN if spread is None else text(spread, 4)


def text(spread: Spread, digits: int) -> str:
    """Mean ± standard deviation, where there is one."""
    return f"{spread.mean:.{digits}f}" + (f" ± {spread.std:.{digits}f}" if math.isfinite(spread.std) else "")


def _notes(summary: Summary) -> str:
    split = summary.experiment.selection
    how = (
        "held-out training images; the test images had no part in it"
        if split == "validation"
        else "the TEST images themselves, for all methods alike, so each test figure is a little too good"
    )
    notes = [
        "Mean ± standard deviation over the seeds, after the last epoch. The learning rate is chosen for each row by "
        f"its mean {split} {summary.headline}, on {how}."
    ]
    if summary.baseline:
        notes.append("The difference is over the seeds that both have, paired by seed; its ± is the standard error.")
    if any(map(summary.at_end_of_grid, summary.cells)):
        notes.append("† At the end of the grid: a learning rate beyond it may be better.")
    notes.append(
        "Density: share of the coordinates that a step moves (CSGD's count, for SGD those whose bits changed), for "
        "the layer share of its gradients' coordinates that it lets through; mean over every tenth step."
    )
    return " ".join(notes)


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table with columns of even width; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def csv_of(rows: list[dict[str, Any]]) -> str:
    """CSV whose first line names the columns of all rows; a cell that a row lacks is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def summary_csv(summary: Summary) -> str:
    """A line per variant and learning rate: mean and standard deviation of every figure, shares as 0 to 1."""
    stream = io.StringIO()
    first = summary.experiment.runs[0].epochs[0]
    columns = [name for name in first if name not in ("epoch", "density", "seconds")]
    head = ["method", "calibration", "dtype", "lr", "chosen", "seeds", "diverged"]
    for name in [*columns, "density", "seconds_per_epoch"]:
        head += [f"{name}_mean", f"{name}_std"]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*head, f"test_{summary.headline}_minus_sgd_float32", "standard_error"])
    for variant, cells in summary.cells.items():
        for lr, cell in cells.items():
            chosen = lr == summary.best_lr(variant)
            what = [variant.method, variant.calibration, variant.dtype, lr, int(chosen), len(cell.runs), cell.diverged]
            spreads = [*map(cell.last, columns), cell.mean_over_epochs("density"), cell.mean_over_epochs("seconds")]
            figures = [number for spread in spreads for number in _pair(spread)]
            difference = summary.difference(variant) if chosen else None
            writer.writerow([*what, *figures, *(_known(difference) if difference else ("", ""))])
    return stream.getvalue()


def _pair(spread: Spread | None) -> tuple:
    return ("", "") if spread is None else _known((spread.mean, spread.std))


def _known(values: tuple[float, float]) -> tuple:
    return tuple(value if math.isfinite(value) else "" for value in values)
