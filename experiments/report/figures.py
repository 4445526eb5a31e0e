# SPDX-License-Identifier: Apache-2.0
"""The plots: metric and loss over the epochs, metric over the learning rate, and over the bytes of an exchange."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we want: works without a display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .summary import Summary, Variant
from .table import describe

# The Okabe-Ito palette: told apart with any colour vision. Black is SGD's.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#F0E442")
_SHOWN_POINTS = 10  # below the best mean; what is further down belongs to trainings that broke down
_APART = 1.012  # factor between the points of two methods at the same learning rate, lest one hides the other
_MARKERS = "osD^v<>pP*X"
_LINES = {"float32": "-", "bfloat16": "--"}


class _Styles:
    """A colour for each method and strength, a line style for each dtype."""

    def __init__(self, summary: Summary):
        labels = dict.fromkeys(variant.label for variant in summary.cells)
        others = [label for label in labels if label != "SGD"]
        self._colours = {"SGD": "black"} | {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(others)}
        self._several = len({variant.dtype for variant in summary.cells}) > 1

    def of(self, variant: Variant) -> dict[str, str]:
        return {"color": self._colours[variant.label], "linestyle": _LINES.get(variant.dtype, ":")}

    def label(self, variant: Variant) -> str:
        return f"{variant.label}, {variant.dtype}" if self._several else variant.label


def draw_curves(summary: Summary, path: Path) -> None:
    """PNG: test metric and training loss over the epochs, mean and band of ± one standard deviation."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    figure.suptitle(_title(summary), fontsize=10)
    metric = f"test_{summary.headline}"
    _draw_epochs(left, summary, metric, 100)
    left.set(title=f"Test {summary.headline}", xlabel="epoch", ylabel=f"{summary.headline} on the test images (%)")
    _leave_out_first_epoch(left, summary, metric)
    _draw_epochs(right, summary, "train_loss", 1)
    unit = " (nats per image)" if summary.experiment.common["task"] == "classification" else ""
    right.set(title="Training loss", xlabel="epoch", ylabel=f"mean loss of the epoch{unit}")
    if any(math.isfinite(y) and y > 0 for line in right.get_lines() for y in line.get_ydata()):
        right.set_yscale("log")  # else all have diverged, and log would raise
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _title(summary: Summary) -> str:
    seeds = {len(cell.runs) for cells in summary.cells.values() for cell in cells.values()}
    number = str(min(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return "\n".join([*describe(summary.experiment), f"mean ± standard deviation over {number} seeds"])


def _draw_epochs(axes: Axes, summary: Summary, column: str, factor: float) -> None:
    styles = _Styles(summary)
    epochs = summary.experiment.common["recipe"]["epochs"]
    for variant in summary.cells:
        cell = summary.best(variant)
        spreads = [cell.at_epoch(column, epoch) for epoch in range(epochs)]
        mean = [factor * spread.mean for spread in spreads]
        margin = [0.0 if math.isnan(spread.std) else factor * spread.std for spread in spreads]
        label = f"{styles.label(variant)} (lr {summary.best_lr(variant):g})"
        # A single point draws no line.
        axes.plot(range(1, epochs + 1), mean, label=label, marker="o" if epochs == 1 else None, **styles.of(variant))
        low, high = ([m + sign * d for m, d in zip(mean, margin, strict=True)] for sign in (-1, 1))
        axes.fill_between(range(1, epochs + 1), low, high, alpha=0.12, linewidth=0, color=styles.of(variant)["color"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _leave_out_first_epoch(axes: Axes, summary: Summary, column: str) -> None:
    """It would press all the others together; its points are outside the axes then."""
    epochs = summary.experiment.common["recipe"]["epochs"]
    if epochs < 3:
        return
    means = [
        100 * summary.best(variant).at_epoch(column, epoch).mean
        for variant in summary.cells
        for epoch in range(1, epochs)
    ]
    margin = 0.08 * (max(means) - min(means)) + 0.1
    axes.set_ylim(min(means) - margin, max(means) + margin)


def draw_lr(summary: Summary, path: Path) -> None:
    """PNG: the metric after the last epoch over the learning rate, on the split that chooses it."""
    figure, axes = plt.subplots(figsize=(8.5, 6.5), layout="constrained")
    figure.suptitle(_title(summary), fontsize=9)
    styles = _Styles(summary)
    for i, (variant, cells) in enumerate(summary.cells.items()):
        spreads = [cell.last(summary.selected_by) for cell in cells.values()]
        mean = [100 * spread.mean for spread in spreads]
        margin = [0.0 if math.isnan(spread.std) else 100 * spread.std for spread in spreads]
        apart = _APART ** (i - (len(summary.cells) - 1) / 2)
        axes.errorbar(
            [lr * apart for lr in cells],
            mean,
            margin,
            label=styles.label(variant),
            marker="o",
            capsize=3,
            **styles.of(variant),
        )
    if min(summary.lrs) > 0:
        axes.set_xscale("log")
    axes.set_xticks(summary.lrs, [f"{lr:g}" for lr in summary.lrs])
    axes.minorticks_off()
    split = summary.experiment.selection
    axes.set(
        title=f"{split.capitalize()} {summary.headline} after the last epoch",
        xlabel="learning rate",
        ylabel=f"{summary.headline} on the {split} images (%)",
    )
    _leave_out_failures(axes, summary)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_bytes(summary: Summary, path: Path) -> None:
    """PNG: the metric after the last epoch over the bytes that an exchange of gradients sends."""
    figure, axes = plt.subplots(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(_title(summary), fontsize=9)
    styles = _Styles(summary)
    for variant, marker in zip(summary.cells, cycle(_MARKERS), strict=False):
        times, result = summary.fewer_bytes(variant), summary.result(variant)
        if times is None or not math.isfinite(result.mean):
            continue
        margin = 0.0 if math.isnan(result.std) else 100 * result.std
        at = {"x": times.mean, "y": 100 * result.mean, "yerr": margin}
        style = {"marker": marker, "capsize": 3, "linestyle": "none", "color": styles.of(variant)["color"]}
        axes.errorbar(**at, label=styles.label(variant), **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(
        title=f"Test {summary.headline} after the last epoch",
        xlabel="how many times fewer bytes than plain DistributedDataParallel in float32",
        ylabel=f"{summary.headline} on the test images (%)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _leave_out_failures(axes: Axes, summary: Summary) -> None:
    """Where trainings broke down, they would press all the others together: they are counted in a corner instead."""
    means = [100 * cell.last(summary.selected_by).mean for cells in summary.cells.values() for cell in cells.values()]
    means = [mean for mean in means if math.isfinite(mean)]
    shown = [mean for mean in means if mean > max(means) - _SHOWN_POINTS]
    if not means or len(shown) == len(means):
        return
    axes.set_ylim(min(shown) - 0.5, max(shown) + 0.1 * (max(shown) - min(shown)) + 0.5)
    text = f"{len(means) - len(shown)} more below the axis"
    axes.text(0.98, 0.02, text, transform=axes.transAxes, ha="right", fontsize=8)
