# SPDX-License-Identifier: Apache-2.0
"""Detection of 1 to 4 objects in scenes made of grey images, by small networks after FCOS.

    python -m experiments detection --data fashion-mnist --data-dir DIR --batch-size 16 --epochs 6 --schedule cosine \\
        --holdout 5000 --lrs 0.01 0.02 --out out/scenes

Metrics are COCO's mAP and mAP50. --limit N takes the first N training images, and N training scenes at most.
"""

from __future__ import annotations

import argparse

from experiments import cli
from experiments.run import train_and_report


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    cli.add_comparison(p, "detection", "fcos")


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Trains and reports."""
    train_and_report(cli.comparison(args), args, command)
