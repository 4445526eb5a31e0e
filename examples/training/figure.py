# SPDX-License-Identifier: Apache-2.0
"""The learning curves and the density per layer as one PNG."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we want: works without a display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .report import LABEL, Results, describe

# Blue and orange of the Okabe-Ito palette: told apart with any colour vision; the dashes help in print.
_STYLE = {"csgd": {"color": "#0072B2", "linestyle": "-"}, "sgd": {"color": "#D55E00", "linestyle": "--"}}


def draw(results: Results, path: Path) -> None:
    """Write the PNG: test accuracy, training loss (mean and range over the seeds), density per tensor."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5.4), layout="constrained")
    names = [LABEL[name] for name in results.settings.optimizers]
    figure.suptitle(" and ".join(names) + "\n" + "\n".join(describe(results)), fontsize=11)
    _curves(left, results, "test_accuracy", 100)
    seeds = results.settings.seeds
    spread = f", mean and range over {seeds} seeds" if seeds > 1 else ""
    left.set(title=f"Test accuracy{spread}", xlabel="epoch", ylabel="accuracy on the test images (%)")
    if results.epochs > 2:
        left.set_ylim(*_range_after_first_epoch(results))
    left.legend(loc="lower right")
    _curves(middle, results, "train_loss", 1)
    middle.set(title=f"Training loss{spread}", xlabel="epoch", ylabel="cross-entropy (nats per image)")
    losses = [loss for name in results.settings.optimizers for c in results.curve(name, "train_loss") for loss in c]
    if any(math.isfinite(loss) and loss > 0 for loss in losses):  # else it has diverged, and log would raise
        middle.set_yscale("log")
    middle.legend(loc="upper right")
    _density(right, results)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(axes: Axes, results: Results, key: str, factor: float) -> None:
    epochs = range(1, results.epochs + 1)
    marker = "o" if results.epochs == 1 else None  # a single point draws no line
    for name in results.settings.optimizers:
        columns = list(zip(*results.curve(name, key), strict=True))
        mean = [factor * statistics.fmean(column) for column in columns]
        axes.plot(epochs, mean, label=LABEL[name], marker=marker, linewidth=1.8, **_STYLE[name])
        if results.settings.seeds > 1:
            low, high = ([factor * pick(column) for column in columns] for pick in (min, max))
            axes.fill_between(epochs, low, high, alpha=0.18, linewidth=0, color=_STYLE[name]["color"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _range_after_first_epoch(results: Results) -> tuple[float, float]:
    """Ends of the accuracy axis, in per cent: the first epoch would press all the others together."""
    curves = [curve[1:] for name in results.settings.optimizers for curve in results.curve(name, "test_accuracy")]
    low, high = min(map(min, curves)), max(map(max, curves))
    margin = 0.05 * (high - low) + 0.001
    return 100 * (low - margin), 100 * (high + margin)


def _density(axes: Axes, results: Results) -> None:
    """Bars: density of every tensor, mean over epochs and seeds; whiskers: range over the seeds."""
    name = "csgd" if "csgd" in results.settings.optimizers else "sgd"
    # [seed][parameter], in per cent
    shares = [
        [100 * statistics.fmean(c) for c in zip(*(epoch["density"] for epoch in history), strict=True)]
        for history in results.histories(name)
    ]
    per_tensor = list(zip(*shares, strict=True))
    mean = [statistics.fmean(column) for column in per_tensor]
    whiskers = [
        [m - min(column) for m, column in zip(mean, per_tensor, strict=True)],
        [max(column) - m for m, column in zip(mean, per_tensor, strict=True)],
    ]
    rows = range(len(mean))
    axes.barh(rows, mean, xerr=whiskers, color=_STYLE[name]["color"], alpha=0.75, error_kw={"capsize": 2})
    for row, value, up in zip(rows, mean, whiskers[1], strict=True):
        axes.text(value + up + 1.5, row, f"{value:.0f}", va="center", fontsize=9)
    axes.set_yticks(list(rows), [f"{tensor} ({size:,})" for tensor, size in results.sizes.items()], fontsize=9)
    axes.invert_yaxis()  # the first layer on top
    for other in results.settings.optimizers:
        total = 100 * statistics.fmean(map(statistics.fmean, results.curve(other, "density")))
        axes.axvline(total, label=f"{LABEL[other]}, all tensors: {total:.1f} %", linewidth=1.4, **_STYLE[other])
    axes.set(
        title=f"Density per tensor, {LABEL[name]}",
        xlabel="coordinates moved per step (%), mean over the training",
        xlim=(0, 108),
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
