# SPDX-License-Identifier: Apache-2.0
"""Bytes and times of a step with each exchange of gradients, between hosts that are namespaces of this machine.

    sudo python -m experiments network                                # all of it: about 8 minutes; needs iproute2
    sudo python -m experiments network --hosts 1 2 --rates 100 --rounds 5 --exchanges fp16 calibrated     # a minute

All exchanges are interleaved at each rate. What the columns mean: experiments/README.md; the results:
docs/exchange-measurements.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments import cli
from experiments.run_log import prepare, write_atomically
from tools import machine

from . import measured
from .cnn import HIDDEN
from .exchanges import KINDS, PLAIN, argument
from .hosts import Processes
from .namespaces import Network, check_possible

EXCHANGES = (
    PLAIN,
    "fp16",
    "powersgd-1",
    "powersgd-4",
    "calibrated",
    "calibrated-clip4-block32",
    "calibrated-clip10-block32",
)
RESULTS = "experiments/results"


@dataclass(frozen=True)
class Plan:
    """rates in Mbit/s; the rest as in worker.Settings."""

    rates: list[float]
    exchanges: list[str]
    rounds: int
    batch_size: int
    hidden: int


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    p.add_argument(
        "--hosts", nargs="+", type=cli.number(int, 1, 200), default=[1, 2, 3, 4], metavar="W",
        help="numbers of hosts; 1, alone: what an exchange computes, which report needs (1 2 3 4)",
    )  # fmt: skip
    p.add_argument(
        "--rates", nargs="+", type=cli.number(float, 1, 100_000), default=[100.0, 1000.0], metavar="MBIT",
        help="of the links, in Mbit/s (100 1000)",
    )  # fmt: skip
    p.add_argument(
        "--exchanges", nargs="+", type=argument, default=list(EXCHANGES), metavar="NAME",
        help=f"to be compared with plain: {KINDS} ({' '.join(EXCHANGES)})",
    )  # fmt: skip
    p.add_argument("--rounds", type=cli.number(int, 1), default=10, metavar="N", help="steps of each exchange (10)")
    p.add_argument("--batch-size", type=cli.number(int, 1), default=8, metavar="N", help="of each host (8)")
    p.add_argument(
        "--hidden", type=cli.number(int, 1), default=HIDDEN, metavar="N", help=f"width of the network ({HIDDEN})"
    )
    p.add_argument("--out", metavar="DIR", default=RESULTS, help="for network-hostsW.json and .md (%(default)s)")


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Measures, and writes two files for each number of hosts."""
    check_possible()
    out = prepare(args.out)
    exchanges = list(dict.fromkeys([PLAIN, *args.exchanges]))
    plan = Plan(list(dict.fromkeys(args.rates)), exchanges, args.rounds, args.batch_size, args.hidden)
    written = []
    print(_announcement(plan, args.hosts, out), flush=True)
    for hosts in dict.fromkeys(args.hosts):
        about = machine.describe(torch.device("cpu"), machine.without_out(command))
        figures = measure(hosts, plan)
        results = {"hosts": hosts, "machine": _about(about), "cores": os.cpu_count(), "settings": vars(plan), **figures}
        paths = [out / f"network-hosts{hosts}.{suffix}" for suffix in ("json", "md")]
        write_atomically(paths[0], json.dumps(results) + "\n")
        write_atomically(paths[1], measured.markdown(measured.Results(results)))
        written += paths
        for entry in figures["rates"] if hosts > 1 else ():
            print(measured.link_text(entry), flush=True)
    print(f"Written: {', '.join(map(str, written))}")


def _announcement(plan: Plan, hosts: list[int], out: Path) -> str:
    """What will be measured, in one line."""
    return (
        f"Measuring {len(plan.exchanges)} exchanges between {', '.join(map(str, dict.fromkeys(hosts)))} hosts at "
        f"{', '.join(f'{rate:g}' for rate in plan.rates)} Mbit/s, {plan.rounds} rounds each, batch size "
        f"{plan.batch_size}, 1 thread in each process. Results go to {out}."
    )


def measure(hosts: int, plan: Plan) -> dict[str, Any]:
    """All that the hosts tell: "rates", a list with link and rounds of each, and "model", its shapes and buckets."""
    rates = plan.rates if hosts > 1 else [0.0]  # one host has no link, but steps all the same
    bar = tqdm(total=len(rates) * plan.rounds, desc=f"{hosts} hosts", unit="round")
    with (
        _terminable(),
        bar,
        Network(hosts) as network,
        Processes(network, **vars(plan) | {"rates": rates}) as processes,
    ):

        def shape(rate: float) -> None:
            if rate:
                network.shape(rate)

        found, model = processes.measure(shape, bar.update)
    return {"rates": [{"mbit": rate, **entry} for rate, entry in zip(rates, found, strict=True)], "model": model}


def _about(about: dict[str, str]) -> dict[str, str]:
    """Of a process of torch's with one thread, and what else matters here."""
    path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return about | {
        "threads": "1 in each process, all on this machine",
        "kernel": " ".join(os.uname()[i] for i in (0, 2)),
        "TCP congestion control": path.read_text(encoding="ascii").strip() if path.exists() else "unknown",
    }


@contextmanager
def _terminable():
    """SIGTERM ends the program as Ctrl-C does: with everything taken down."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
