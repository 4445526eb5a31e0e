# SPDX-License-Identifier: Apache-2.0
"""One PNG: the model for four rates of the links, where the calibrated exchange stops paying, and the check."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we want: works without a display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import model, report
from .exchanges import Exchange

# Okabe-Ito: told apart with any colour vision.
_COLOURS = {"plain": "#000000", "fp16": "#E69F00", "bf16": "#F0E442", "calibrated": "#0072B2"}
_POWERSGD = ("#D55E00", "#CC79A7", "#8C5A2B", "#999999")  # by rank, in the order of the command line
_MARKERS = "osD^v<>p"  # by number of hosts


def draw(measurements: report.Measurements, path: Path) -> None:
    """Writes the PNG."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    of_rates, break_even, check = [*axes[0], axes[1, 0]], axes[1, 1], axes[1, 2]
    colours = _colours(measurements.modelled)
    for panel, (link, bits) in zip(of_rates, report.BANDWIDTHS.items(), strict=True):
        _draw_steps(panel, measurements, bits, colours)
        panel.set_title(f"Model: links of {link}")
    low = min(panel.get_ylim()[0] for panel in of_rates)
    high = max(panel.get_ylim()[1] for panel in of_rates)
    for panel in of_rates:
        panel.set_ylim(low, high)
    of_rates[-1].legend(fontsize=9, loc="upper left")
    _draw_break_even(break_even, measurements, colours)
    _draw_check(check, measurements, colours)
    about, costs = measurements.alone.content["machine"], measurements.costs(Exchange.of("plain"))
    figure.suptitle(
        f"One step of DistributedDataParallel, {measurements.workload.numel:,} parameters, "
        f"batch size {measurements.alone.content['settings']['batch_size']} on each host\n"
        f"{about['CPU']}, one thread a process; gloo; torch {about['torch']}; {about['date']}; "
        f"{1e6 * costs.latency:.0f} µs a message",
        fontsize=11,
    )
    figure.savefig(path, dpi=70)
    plt.close(figure)


def _colours(exchanges: list[Exchange]) -> dict[str, str]:
    ranks = [exchange.name for exchange in exchanges if exchange.kind == "powersgd"]
    return _COLOURS | {name: _POWERSGD[i % len(_POWERSGD)] for i, name in enumerate(ranks)}


def _draw_steps(axes: Axes, measurements: report.Measurements, bits: float, colours: dict[str, str]) -> None:
    for exchange in measurements.modelled:
        costs = measurements.costs(exchange)
        steps = [model.seconds(exchange, measurements.workload, W, bits, costs) for W in report.WORLD_SIZES]
        axes.plot(report.WORLD_SIZES, steps, marker=".", color=colours[exchange.name], label=exchange.label)
    axes.set(xscale="log", yscale="log", xlabel="hosts W", ylabel="step (s)")
    _world_sizes(axes)


def _draw_break_even(axes: Axes, measurements: report.Measurements, colours: dict[str, str]) -> None:
    for other in report.rivals(measurements):
        ranges = [report.faster_between(measurements, other.name, hosts) for hosts in report.WORLD_SIZES]
        below = [high / 1e6 if low == 0 < high < math.inf else math.nan for low, high in ranges]
        above = [low / 1e6 if low > 0 else math.nan for low, _ in ranges]
        for side, rates, style in (("below", below, "-"), ("above", above, ":")):
            if not all(map(math.isnan, rates)):
                how = {"marker": ".", "linestyle": style, "color": colours[other.name]}
                axes.plot(report.WORLD_SIZES, rates, label=f"{side} it: faster than {other.label}", **how)
    axes.set(xscale="log", yscale="log", xlabel="hosts W", ylabel="rate of the links (Mbit/s)")
    axes.set_title("Model: where the calibrated exchange pays")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if axes.get_lines():
        axes.legend(fontsize=8)
    _world_sizes(axes)


def _draw_check(axes: Axes, measurements: report.Measurements, colours: dict[str, str]) -> None:
    checks = measurements.checks()
    markers = {results.hosts: _MARKERS[i % len(_MARKERS)] for i, results in enumerate(measurements.several)}
    for check in checks:
        filled = colours[check.exchange.name] if check.mbit == min(c.mbit for c in checks) else "white"
        axes.plot(
            check.predicted,
            check.measured,
            markers[check.hosts],
            markeredgecolor=colours[check.exchange.name],
            markerfacecolor=filled,
        )
    ends = [
        min(min(c.predicted, c.measured) for c in checks) / 1.5,
        1.5 * max(max(c.predicted, c.measured) for c in checks),
    ]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    for hosts, marker in markers.items():
        axes.plot([], [], marker, color="grey", label=f"W = {hosts}")
    rates = sorted({check.mbit for check in checks})
    axes.set(xscale="log", yscale="log", xlabel="predicted step (s)", ylabel="measured step (s)")
    axes.set_title(f"The check: filled {rates[0]:g} Mbit/s" + (f", hollow {rates[-1]:g}" if len(rates) > 1 else ""))
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def _world_sizes(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(report.WORLD_SIZES, [str(hosts) for hosts in report.WORLD_SIZES], fontsize=8)
    axes.grid(alpha=0.3)
