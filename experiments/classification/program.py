# SPDX-License-Identifier: Apache-2.0
"""Classification of images by networks trained with SGD, CSGD and the calibration layer.

    python -m experiments classification --holdout 200 --lrs 0.02 0.05 0.1 --out out/digits
    python -m experiments classification --data fashion-mnist --data-dir DIR --model lenet --holdout 5000 \\
        --methods sgd csgd --calibrations 0 0.05 0.25 1 --lrs 0.01 0.02 0.05 --out out/fashion

What the columns of the report mean: experiments/README.md.
"""

from __future__ import annotations

import argparse

from experiments import cli
from experiments.run import train_and_report


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    cli.add_comparison(p, "classification", "small")


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Trains and reports."""
    train_and_report(cli.comparison(args), args, command)
