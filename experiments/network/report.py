# SPDX-License-Identifier: Apache-2.0
"""The measurements of network side by side, a model checked against them, and what follows from it.

python -m experiments network-model experiments/results --out out/network
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.report.table import aligned
from experiments.run_log import prepare, write_atomically
from tools.program import UserError

from . import measured, model
from .exchanges import ALONE, PLAIN, Exchange
from .measured import Results

WORLD_SIZES = tuple(2**k for k in range(1, 11))
BANDWIDTHS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}


class Check(NamedTuple):
    """One exchange at one rate and number of hosts: seconds of a step, and payload in bytes (None: not counted)."""

    exchange: Exchange
    hosts: int
    mbit: float
    predicted: float
    measured: float
    bytes_predicted: int
    bytes_counted: float | None


@dataclass(frozen=True)
class Measurements:
    """alone: of one host, which tells what is computed; several: of 2 and more, ascending."""

    alone: Results
    several: list[Results]

    @property
    def workload(self) -> model.Workload:
        """The same everywhere."""
        return self.alone.workload

    @property
    def modelled(self) -> list[Exchange]:
        """The exchanges whose bytes do not depend on the gradients."""
        return [exchange for exchange in self.alone.exchanges if exchange.clip is None and not exchange.compact]

    def entries(self) -> Iterator[tuple[Results, dict[str, Any]]]:
        """Each number of hosts with each rate."""
        return ((results, entry) for results in self.several for entry in results.entries)

    def computing(self, name: str) -> float:
        """Seconds that a step of one host takes more with an exchange (with nobody) than without."""
        entry = self.alone.entries[0]
        pairs = zip(self.alone.seconds(entry, name), self.alone.seconds(entry, ALONE), strict=True)
        return max(0.0, statistics.median(exchanged - alone for exchanged, alone in pairs))

    def costs(self, exchange: Exchange) -> model.Costs:
        """Of a host with a processor of its own; latency: the lowest that was measured."""
        step = statistics.median(self.alone.seconds(self.alone.entries[0], ALONE))
        latency = min(results.latency(entry) for results, entry in self.entries())
        return model.Costs(step, self.computing(exchange.name), latency)

    def checks(self) -> list[Check]:
        """Each measurement with its prediction: with the step as measured there without exchange, and processor
        time multiplied by the number of hosts that share a core."""
        found = []
        for results, entry in self.entries():
            share = max(1.0, results.hosts / results.content["cores"])
            step = statistics.median(results.seconds(entry, ALONE))
            for exchange in self.modelled:
                costs = model.Costs(step, share * self.computing(exchange.name), results.latency(entry))
                predicted = model.seconds(exchange, self.workload, results.hosts, entry["mbit"] * 1e6, costs)
                seconds = statistics.median(results.seconds(entry, exchange.name))
                sent = model.payload(exchange, self.workload, results.hosts)
                counted = results.payload(entry, exchange.name)
                found.append(Check(exchange, results.hosts, entry["mbit"], predicted, seconds, sent, counted))
        return found


def read(directory: str) -> Measurements:
    """What run has left in the directory; UserError where it does not suffice, or does not belong together."""
    found = sorted(map(measured.read, Path(directory).glob("network-hosts*.json")), key=lambda results: results.hosts)
    if len(found) < 2 or found[0].hosts != 1:
        raise UserError(f"{directory}: needs network-hosts1.json and others; network --hosts 1 2 writes them.")
    for results in found[1:]:
        if results.content["settings"] | {"rounds": 0} != found[0].content["settings"] | {"rounds": 0}:
            raise UserError(
                f"{directory}: measured with other settings for {results.hosts} hosts than for 1; run both."
            )
    return Measurements(found[0], found[1:])


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    p.add_argument("directory", metavar="DIR", help="where network has left network-hosts*.json")
    p.add_argument("--out", metavar="DIR", required=True, help="for network-model.md and network-model.png")


def run(args: argparse.Namespace, _: list[str]) -> None:
    """Reads and writes."""
    from . import figure  # here, since it needs matplotlib, which the tables do not

    measurements = read(args.directory)
    target = prepare(args.out)
    paths = [target / "network-model.md", target / "network-model.png"]
    write_atomically(paths[0], markdown(measurements))
    figure.draw(measurements, paths[1])
    print(f"Written: {', '.join(map(str, paths))}")


def markdown(measurements: Measurements) -> str:
    """All tables."""
    numel = measurements.workload.numel
    parts = [
        f"# Exchanging gradients of {numel:,} parameters",
        "## Measured",
        "Median step in ms, in brackets how many times as fast as plain DDP in the same round.",
        aligned(_measured(measurements)),
        "Bytes in frames that a host sends in a step, in MB, in brackets how many times less than plain DDP.",
        aligned(_frames(measurements)),
        "## The model against the measurements",
        "Bytes: payload as the hook's state counts it. Step: median.",
        aligned(_checked(measurements.checks())),
        "## What the exchanges compute",
        "One host alone: how much longer its step is than one without exchange.",
        aligned(_computing(measurements)),
        "## Where it stops paying",
        f"Rates in Mbit/s at which `calibrated` is the faster one, if a message takes {_latency(measurements):.0f} µs.",
        aligned(_break_even(measurements)),
        "## Step in ms by the model",
        aligned(_predicted(measurements)),
    ]
    return "\n\n".join(parts) + "\n"


def _measured(measurements: Measurements) -> list[list[str]]:
    table = [
        ["exchange", *(f"W = {results.hosts}, {entry['mbit']:g} Mbit/s" for results, entry in measurements.entries())]
    ]
    for name, label in [*((e.name, e.label) for e in measurements.alone.exchanges), (ALONE, "none (no_sync)")]:
        row = [label]
        for results, entry in measurements.entries():
            milliseconds = 1000 * statistics.median(results.seconds(entry, name))
            row.append(f"{milliseconds:,.0f} ({results.speedup(entry, name).median:.2f})")
        table.append(row)
    return table


def _frames(measurements: Measurements) -> list[list[str]]:
    several = measurements.several
    table = [["exchange", *(f"W = {results.hosts}" for results in several)]]
    for exchange in measurements.alone.exchanges:
        pairs = [[results.wire(results.entries[0], name) for name in (exchange.name, PLAIN)] for results in several]
        table.append([exchange.label, *(f"{wire / 1e6:.3f} ({plain / wire:.1f})" for wire, plain in pairs)])
    return table


def _checked(checks: list[Check]) -> list[list[str]]:
    table = [
        [
            "exchange",
            "W",
            "Mbit/s",
            "bytes predicted",
            "bytes counted",
            "step predicted, ms",
            "measured, ms",
            "measured / predicted",
        ]
    ]
    for check in checks:
        counted = "-" if check.bytes_counted is None else f"{check.bytes_counted:,.0f}"
        table.append(
            [
                check.exchange.label,
                str(check.hosts),
                f"{check.mbit:g}",
                f"{check.bytes_predicted:,}",
                counted,
                f"{1000 * check.predicted:,.0f}",
                f"{1000 * check.measured:,.0f}",
                f"{check.measured / check.predicted:.2f}",
            ]
        )
    return table


def _computing(measurements: Measurements) -> list[list[str]]:
    table = [["exchange", "ms", "ns per coordinate"]]
    for exchange in measurements.alone.exchanges:
        seconds = measurements.computing(exchange.name)
        table.append([exchange.label, f"{1e3 * seconds:.1f}", f"{1e9 * seconds / measurements.workload.numel:.2f}"])
    return table


def faster_between(measurements: Measurements, other: str, hosts: int) -> tuple[float, float]:
    """Bits per second between which the calibrated exchange is faster than another one."""
    ours, theirs = Exchange.of("calibrated"), Exchange.of(other)
    costs = measurements.costs(ours), measurements.costs(theirs)
    return model.faster_between(ours, theirs, measurements.workload, hosts, *costs)


def rivals(measurements: Measurements) -> list[Exchange]:
    """With what the calibrated exchange is compared; none where it was not measured itself."""
    modelled = measurements.modelled
    if not any(exchange.kind == "calibrated" for exchange in modelled):
        return []
    return [exchange for exchange in modelled if exchange.kind != "calibrated"]


def _break_even(measurements: Measurements) -> list[list[str]]:
    others = rivals(measurements)
    table = [["W", *(f"against {other.label}" for other in others)]]
    for hosts in WORLD_SIZES:
        table.append([str(hosts), *(_range(*faster_between(measurements, other.name, hosts)) for other in others)])
    return table


def _predicted(measurements: Measurements) -> list[list[str]]:
    table = [["exchange", "link", *(f"W = {hosts}" for hosts in WORLD_SIZES)]]
    for link, bits in BANDWIDTHS.items():
        for exchange in measurements.modelled:
            costs = measurements.costs(exchange)
            steps = [model.seconds(exchange, measurements.workload, hosts, bits, costs) for hosts in WORLD_SIZES]
            table.append([exchange.label, link, *(f"{1000 * step:,.0f}" for step in steps)])
    return table


def _latency(measurements: Measurements) -> float:
    return 1e6 * measurements.costs(Exchange.of(PLAIN)).latency


def _range(low: float, high: float) -> str:
    if low == high:
        return "nowhere"
    if low > 0:
        return f"above {low / 1e6:,.0f}"
    return "everywhere" if high == math.inf else f"below {high / 1e6:,.0f}"
