# SPDX-License-Identifier: Apache-2.0
"""The command line of ``run``."""

from __future__ import annotations

import argparse

from benchmarks.train.options import number

from .cnn import HIDDEN
from .exchanges import KINDS, PLAIN, Exchange

EXCHANGES = (
    PLAIN,
    "fp16",
    "powersgd-1",
    "powersgd-4",
    "calibrated",
    "calibrated-clip4-block32",
    "calibrated-clip10-block32",
)
RESULTS = "benchmarks/results"


def exchange(text: str) -> str:
    """argparse type: the name of an exchange."""
    try:
        return Exchange.of(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_run_options(p: argparse.ArgumentParser) -> None:
    """What ``run`` understands."""
    p.add_argument(
        "--hosts", nargs="+", type=number(int, 1, 200), default=[1, 2, 3, 4], metavar="W",
        help="numbers of hosts; 1, alone: what an exchange computes, which report needs (1 2 3 4)",
    )  # fmt: skip
    p.add_argument(
        "--rates", nargs="+", type=number(float, 1, 100_000), default=[100.0, 1000.0], metavar="MBIT",
        help="of the links, in Mbit/s (100 1000)",
    )  # fmt: skip
    p.add_argument(
        "--exchanges", nargs="+", type=exchange, default=list(EXCHANGES), metavar="NAME",
        help=f"to be compared with plain: {KINDS} ({' '.join(EXCHANGES)})",
    )  # fmt: skip
    p.add_argument("--rounds", type=number(int, 1), default=10, metavar="N", help="steps of each exchange (10)")
    p.add_argument("--batch-size", type=number(int, 1), default=8, metavar="N", help="of each host (8)")
    p.add_argument(
        "--hidden", type=number(int, 1), default=HIDDEN, metavar="N", help=f"width of the network ({HIDDEN})"
    )
    p.add_argument("--out", metavar="DIR", default=RESULTS, help="for network-hostsW.json and .md (%(default)s)")
