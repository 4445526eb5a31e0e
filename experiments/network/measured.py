# SPDX-License-Identifier: Apache-2.0
"""What ``run`` has found: medians and ratios of its rounds, and the table of them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.report.table import aligned
from tools.program import UserError

from . import model, stream
from .exchanges import ALONE, PLAIN, Exchange


class Quartiles(NamedTuple):
    """Of the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """At least one value."""
        return cls(*(float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))))


class Results:
    """The JSON file of one number of hosts. A step takes as long as it takes the slowest host."""

    def __init__(self, content: dict[str, Any]):
        self.content = content
        self.hosts: int = content["hosts"]
        self.workload = model.Workload(**content["model"])
        self.entries: list[dict[str, Any]] = content["rates"]
        self.names = list(self.entries[0]["rounds"][0][0])

    @property
    def exchanges(self) -> list[Exchange]:
        """In the order of the command line."""
        return [Exchange.of(name) for name in self.content["settings"]["exchanges"]]

    def seconds(self, entry: dict[str, Any], name: str) -> list[float]:
        """Of each round's step."""
        return [max(host[name]["seconds"] for host in hosts) for hosts in entry["rounds"]]

    def speedup(self, entry: dict[str, Any], name: str) -> Quartiles:
        """Of a step against plain DDP's in the same round."""
        pairs = zip(self.seconds(entry, PLAIN), self.seconds(entry, name), strict=True)
        return Quartiles.of([plain / other for plain, other in pairs])

    def wire(self, entry: dict[str, Any], name: str) -> float:
        """Bytes in frames that a host sends in a step: mean over the hosts, median over the rounds."""
        return statistics.median(statistics.fmean(host[name]["wire"] for host in hosts) for hosts in entry["rounds"])

    def payload(self, entry: dict[str, Any], name: str) -> float | None:
        """As the hook's state counts it, in the same mean; None where it has none."""
        counts = [[host[name]["payload"] for host in hosts] for hosts in entry["rounds"]]
        if counts[0][0] is None:
            return None
        return statistics.median(map(statistics.fmean, counts))

    def latency(self, entry: dict[str, Any]) -> float:
        """Seconds of one message in a ring, from an all-reduce of one number: it has 2 (W - 1) of them in turn."""
        return max(host["latency_s"] for host in entry["link"]) / max(1, 2 * (self.hosts - 1))


def read(path: Path) -> Results:
    """UserError where it is not a file that run wrote."""
    try:
        return Results(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file.") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{path}: not a file that run wrote; delete it, and run again.") from None


def markdown(results: Results) -> str:
    """What it was measured on, then a table for each rate."""
    settings, hosts = results.content["settings"], results.hosts
    title = f"{hosts} hosts" if hosts > 1 else "one host, alone: what an exchange computes"
    parts = [f"# Gradients of {results.workload.numel:,} parameters exchanged by {title}"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in results.content["machine"].items()))
    parts.append(
        f"Batch size {settings['batch_size']} on each host, {settings['rounds']} rounds. Times: median and quartiles; "
        "the ratio to plain DDP is formed within a round. The columns: experiments/README.md."
    )
    for entry in results.entries:
        if hosts > 1:
            parts += [f"## {entry['mbit']:g} Mbit/s", link_text(entry) + "."]
        parts.append(aligned(rows(results, entry)))
    return "\n\n".join(parts) + "\n"


def rows(results: Results, entry: dict[str, Any]) -> list[list[str]]:
    """The table of one rate, with its heading."""
    head = [
        "exchange",
        "frames, kB",
        "payload, kB",
        "plain / frames",
        "step, ms",
        "quartiles, ms",
        "times as fast",
        "quartiles",
    ]
    table = [head]
    plain_wire = results.wire(entry, PLAIN)
    for exchange in results.exchanges:
        name, wire = exchange.name, results.wire(entry, exchange.name)
        counted = results.payload(entry, name)
        payload = model.payload(exchange, results.workload, results.hosts) if counted is None else counted
        cells = [exchange.label, _kb(wire), _kb(payload), f"{plain_wire / wire:.1f}" if wire else "-"]
        table.append(cells + _times(results, entry, name))
    return [*table, ["none (no_sync)", "-", "-", "-", *_times(results, entry, ALONE)]]


def link_text(entry: dict[str, Any]) -> str:
    """Nominal and achieved rate of the links, in words."""
    nominal = entry["mbit"]
    streams = [host["stream"] for host in entry["link"]]
    one = next(rates["one stream"] for rates in streams if rates["one stream"] is not None)
    every = [rates["all links"] for rates in streams]
    return (
        f"{nominal:g} Mbit/s, of which {nominal * stream.PAYLOAD_SHARE:.1f} are left for data: one TCP stream "
        f"achieved {one:.1f}, all links at a time {min(every):.1f} to {max(every):.1f}"
    )


def _times(results: Results, entry: dict[str, Any], name: str) -> list[str]:
    times = Quartiles.of([1000 * value for value in results.seconds(entry, name)])
    ratio = results.speedup(entry, name)
    return [
        f"{times.median:,.0f}",
        f"{times.low:,.0f} ... {times.high:,.0f}",
        f"{ratio.median:.2f}",
        f"{ratio.low:.2f} ... {ratio.high:.2f}",
    ]


def _kb(count: float | None) -> str:
    return "-" if not count else f"{count / 1000:,.1f}"
