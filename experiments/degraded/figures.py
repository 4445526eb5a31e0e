# SPDX-License-Identifier: Apache-2.0
"""The plot of the accuracies, and the picture of degraded test images with what they were taken for."""

from __future__ import annotations

import base64
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we want: works without a display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from experiments.data import CLASS_NAMES

from .report import describe, name
from .summary import Summary, Variant
from .task import REGIMES, SHOWN

# The Okabe-Ito palette: distinguishable with any colour vision; the lines help in print.
_STYLES = {
    "known": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "estimated": {"color": "#009E73", "linestyle": "--", "marker": "s"},
    "absent": {"color": "#D55E00", "linestyle": ":", "marker": "^"},
}
_LABELS = {regime: f"parameter {regime}" for regime in REGIMES}
_UNITS = {
    "jpeg": "JPEG quality",
    "noise": "sigma of the noise (grey levels of 255)",
    "blur": "sigma of the blur (pixels)",
    "chain": "strength of each degradation (share of the strongest)",
}
_WRONG = "#D55E00"


def draw_accuracy(summary: Summary, variant: Variant, path: Path) -> None:
    """PNG: above, the accuracy of each regime over the level; below, what is gained over the absent parameter."""
    kinds = summary.kinds
    size = max(4.6 * len(kinds) + 1, 11), 8  # inches; the title needs eleven
    figure, axes = plt.subplots(
        2, len(kinds), figsize=size, layout="constrained", sharey="row", sharex="col", squeeze=False
    )
    seeds = [str(run.seed) for run in summary.runs[variant]]
    figure.suptitle("\n".join([f"{name(variant)}; seeds {', '.join(seeds)}", *describe(summary)]), fontsize=8.5)
    for (upper, lower), kind in zip(axes.T, kinds, strict=True):
        conditions = [c for c in summary.conditions if c["kind"] in ("clean", kind)]
        places = range(len(conditions))
        for regime in REGIMES:
            _draw_regime(upper, lower, summary, variant, regime, conditions)
        upper.set_title({"jpeg": "JPEG", "noise": "Gaussian noise", "blur": "Gaussian blur", "chain": "All"}[kind])
        lower.set_xticks(places, [c["value"] for c in conditions])
        lower.set_xlabel(_UNITS[kind])
        lower.axhline(0, color="black", linewidth=0.8)
        for ax in (upper, lower):
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy on the test images (%)\nmean ± standard deviation")
    axes[1, 0].set_ylabel("difference to the absent parameter\n(points), mean ± standard error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(REGIMES))
    _save(figure, path, 90)


def _draw_regime(
    upper: Axes, lower: Axes, summary: Summary, variant: Variant, regime: str, conditions: list[dict]
) -> None:
    texts = [condition["text"] for condition in conditions]
    chosen = [lambda c, text=text: c["text"] == text for text in texts]
    spreads = [summary.accuracy(variant, regime, choose) for choose in chosen]
    _draw_line(upper, regime, [(spread.mean, spread.std) for spread in spreads])
    if regime != "absent":
        _draw_line(lower, regime, [summary.gain(variant, regime, choose) for choose in chosen])


def _draw_line(axes: Axes, regime: str, values: list[tuple[float, float]]) -> None:
    shift = 0.06 * (REGIMES.index(regime) - 1)  # lest the bars hide each other
    margins = [margin if math.isfinite(margin) else 0.0 for _, margin in values]
    places = [i + shift for i in range(len(values))]
    axes.errorbar(places, [mean for mean, _ in values], margins, label=_LABELS[regime], capsize=2, **_STYLES[regime])


def draw_samples(summary: Summary, variant: Variant, path: Path) -> None:
    """PNG: the first test images, clean and degraded, with the predictions of the first seed's networks."""
    run, data = summary.runs[variant][0], summary.common["data"]["data"]
    rows = [result for result in run.results["conditions"] if "pictures" in result]
    figure, axes = plt.subplots(
        len(rows), SHOWN, figsize=(1.45 * SHOWN + 1.2, 1.95 * len(rows) + 0.9), layout="constrained", squeeze=False
    )
    for row, result in zip(axes, rows, strict=True):
        pictures = result["pictures"]
        images = np.frombuffer(base64.b64decode(pictures["pixels"]), np.uint8).reshape(pictures["shape"])
        for i, ax in enumerate(row):
            _draw_sample(ax, images[i], pictures["labels"][i], {k: v[i] for k, v in result["shown"].items()}, data)
        row[0].set_ylabel(result["text"].replace(", ", "\n"), fontsize=8)
    figure.suptitle(
        f"The first {SHOWN} test images of {data}, degraded, and what they were taken for: {name(variant)}, "
        f"seed {run.seed}.\nBelow each image what it is, then the classes found with the parameter known "
        "(K), estimated (E) and absent (A); wrong ones in orange.",
        fontsize=9,
    )
    _save(figure, path, 80)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    """As a PNG of 256 colours, which is half as large."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    Image.fromarray(pixels).quantize(dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_sample(ax: Axes, image: np.ndarray, label: int, predictions: dict[str, int], data: str) -> None:
    names = CLASS_NAMES.get(data)
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[])
    lines = [("", label, True)] + [(f"{regime[0].upper()}: ", predictions[regime], False) for regime in REGIMES]
    for i, (prefix, number, is_truth) in enumerate(lines):
        wrong = number != label
        ax.annotate(
            prefix + (names[number] if names else str(number)),
            (0, 0),
            xycoords="axes fraction",
            xytext=(0, -3 - 8 * i),
            textcoords="offset points",
            va="top",
            fontsize=7,
            color=_WRONG if wrong else "black",
            fontstyle="italic" if is_truth else "normal",
        )
