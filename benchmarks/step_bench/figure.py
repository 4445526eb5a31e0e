# SPDX-License-Identifier: Apache-2.0
"""Bars: the time of a step relative to the baseline's, for every list and peer, as one PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we want: works without a display

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .peers import BASELINES, PEERS

# Okabe-Ito: told apart with any colour vision. CSGD's regimes are one hue in three strengths.
_COLOURS = {
    "sgd_fused": "#000000", "sgd_foreach": "#777777", "sgd_forloop": "#BBBBBB", "csgd": "#0072B2", "csgd_5": "#56B4E9",
    "csgd_dense": "#003A5D", "csgd_off": "#009E73", "reference": "#E69F00", "compiled": "#D55E00", "apex": "#CC79A7",
    "optimi": "#F0E442", "flashoptim": "#8C5A2B", "adamw_fused": "#000000", "adamw_foreach": "#777777",
    "adamw_25": "#0072B2", "adamw_5": "#56B4E9", "adamw_dense": "#003A5D", "adamw_off": "#009E73",
    "adamw_reference": "#E69F00", "adamw_compiled": "#D55E00", "adamw_float32": "#444444", "adamw_optimi": "#F0E442",
    "adamw_kahan": "#B8AE20", "adamw_torchao": "#CC79A7", "adamw_flash": "#8C5A2B",
}  # fmt: skip
FAMILIES = {"sgd": "momentum 0.9", "adamw": "AdamW"}
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def draw(results: dict, path: Path) -> bool:
    """Writes the PNG; False where there is no ratio to draw."""
    groups = [
        (entry, {name: row for name, row in entry["rows"].items() if row.get("ratio") is not None})
        for entry in results["lists"].values()
    ]
    groups = [(entry, rows) for entry, rows in groups if rows]
    if not groups:
        return False
    drawn = [name for name in PEERS if any(name in rows for _, rows in groups)]
    figure, axes = plt.subplots(figsize=(max(9, 1.5 + 0.42 * len(drawn) * len(groups)), 5.6), layout="constrained")
    width = 0.86 / len(drawn)
    for k, name in enumerate(drawn):
        places = [i + (k - (len(drawn) - 1) / 2) * width for i, (_, rows) in enumerate(groups) if name in rows]
        rows = [rows[name] for _, rows in groups if name in rows]
        _bars(axes, places, rows, 0.92 * width, name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(groups)), [f"{entry['label']}\n{entry['elements']:,} elements" for entry, _ in groups])
    axes.set_ylabel(f"time per step / {PEERS[BASELINES[results['optimizer']]].label} (1 = equal; log scale)")
    axes.set_xlabel("list of tensors")
    _limits(axes, [row["ratio"] for _, rows in groups for row in rows.values()])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    machine, what = results["machine"], FAMILIES[results["optimizer"]]
    axes.set_title(
        f"One optimizer step, {results['dtype']}, {what}: {machine.get('GPU', machine['CPU'])}\n"
        f"torch {machine['torch']}, {machine['threads']} threads, {machine['date']}; "
        "median of ratios in a round, whiskers: quartiles; lower is faster",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _bars(axes, places: list[float], rows: list[dict], width: float, name: str) -> None:
    ratios = [row["ratio"] for row in rows]
    ends = [row["ratio_quartiles"] or [row["ratio"]] * 2 for row in rows]
    pairs = list(zip(ratios, ends, strict=True))
    whiskers = [[max(0, r - low) for r, (low, _) in pairs], [max(0, high - r) for r, (_, high) in pairs]]
    axes.bar(places, ratios, width, yerr=whiskers, label=PEERS[name].label, color=_COLOURS[name], ecolor="#999999")
    for place, ratio, (_, high) in zip(places, ratios, ends, strict=True):
        axes.text(place, 1.04 * high, f"{ratio:.2f}", ha="center", va="bottom", fontsize=7, rotation=90)


def _limits(axes, ratios: list[float]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0.6 * min(*ratios, 1), 2.2 * max(*ratios, 1))
