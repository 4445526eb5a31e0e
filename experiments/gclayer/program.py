# SPDX-License-Identifier: Apache-2.0
"""Does the paper's layer help? A network of plain convolutions beside the same network of calibrated ones.

    python -m experiments gclayer --data fashion-mnist --data-dir DIR --holdout 5000 --lrs 0.02 0.05 0.1 --out out/gc
    python -m experiments gclayer --data cifar10 --data-dir DIR --shrink 2 --limit 10000 --holdout 5000 --out out/gc16

filters: plain - nn.Conv2d; half - the same with half as many channels, about a quarter of the weights; gc - GCConv2d
with K = 4 branches, as many channels as plain and about as many weights as half; drawn - calibrate_filters, the plain
network that is trained with a branch drawn for each filter. The others are further readings of the published figure:
other K; factors that are not trained (fixed), of each base filter or of each input channel; a smaller spread.
"""

from __future__ import annotations

import argparse
from itertools import product

from experiments import cli
from experiments.run import train_and_report
from experiments.settings import Run

from .filters import FILTERS, Filtered

_NETWORKS = ("vgg-small", "resnet20")


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    grid = p.add_argument_group("the grid: every combination is trained")
    grid.add_argument(
        "--filters", nargs="+", choices=FILTERS, default=["plain", "half", "gc", "drawn"], help="(%(default)s)"
    )
    grid.add_argument("--methods", nargs="+", choices=("sgd", "csgd"), default=["sgd", "csgd"], help="(both)")
    grid.add_argument("--calibration", type=cli.number(float, 0), default=0.25, help="c of csgd (%(default)s)")
    cli.add_lrs_and_seeds(grid)
    source = p.add_argument_group("data and network")
    cli.add_data(source, "gclayer", _NETWORKS[0], _NETWORKS)
    cli.add_recipe(p.add_argument_group("recipe"), epochs=8, schedule="cosine", weight_decay=5e-4)
    cli.add_execution(p.add_argument_group("execution"))
    cli.add_out(p)


def runs(args: argparse.Namespace) -> list[Run]:
    """The grid."""
    compared = [
        Filtered(name, args.calibration if name == "csgd" else None, filters)
        for filters, name in product(dict.fromkeys(args.filters), dict.fromkeys(args.methods))
    ]
    return cli.grid(args, compared, cli.execution(args))


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Trains and reports."""
    train_and_report(runs(args), args, command)
