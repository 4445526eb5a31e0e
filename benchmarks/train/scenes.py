# SPDX-License-Identifier: Apache-2.0
"""The command ``scenes``: test scenes of the detection task with their boxes, and what a detector finds in them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from examples.training.errors import UserError

from .loop import Training, train
from .methods import Method
from .options import number
from .schedule import Schedule
from .settings import Execution, Recipe, Run
from .tasks import DataOptions
from .tasks.detection import Detection


def add_options(p: argparse.ArgumentParser) -> None:
    """What ``scenes`` understands."""
    p.add_argument("--data", metavar="NAME", default="digits", help="data set of grey images (%(default)s)")
    p.add_argument("--data-dir", metavar="DIR", help="where its files lie")
    p.add_argument("--out", metavar="FILE", required=True, help="picture to write (png, pdf or svg)")
    p.add_argument(
        "--epochs", type=number(int, 0), default=0, help="train a detector first and draw its boxes, too (0)"
    )
    p.add_argument("--model", metavar="NAME", default="fcos", help="detector (%(default)s)")
    p.add_argument("--method", choices=("sgd", "csgd"), default="csgd", help="(%(default)s)")
    p.add_argument("--lr", type=number(float, 0), default=0.02, help="falls along a cosine (%(default)s)")
    p.add_argument("--batch-size", type=number(int, 1), default=16, help="(%(default)s)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Train if asked to, and write the picture."""
    options = DataOptions(args.data, args.data_dir)
    task = Detection.create(options)
    task.build_model(args.model, args.seed)  # says now if there is no such network
    check_target(args.out)
    training = _train(args, options, task) if args.epochs else None
    from . import scenes_figure  # here, since it needs matplotlib, which nothing else does

    scenes_figure.draw(task, args.data, training, args.out)


def check_target(out: str) -> None:
    """UserError before a training, not after it, where the picture cannot be written."""
    if not Path(out).parent.is_dir():
        raise UserError(f"--out {out}: the directory {Path(out).parent} does not exist; create it first.")
    if Path(out).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out}: not a picture; give a name that ends in .png, .pdf or .svg.")


def _train(args: argparse.Namespace, options: DataOptions, task: Detection) -> Training:
    recipe = Recipe(args.epochs, args.batch_size, Schedule("cosine", args.epochs), 0.9, 0.0, False)
    execution = Execution("cpu", "float32", amp=False, channels_last=False, compile=False, deterministic=True)
    method = Method(args.method, None if args.method == "sgd" else 1.0)
    settings = Run("detection", options, args.model, recipe, execution, method, args.lr, args.seed, task.about())
    steps = args.epochs * len(task.batches(args.seed, 0, args.batch_size))
    with tqdm(total=steps, unit="step", mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        return train(settings, task, bar.update, lambda _: None)
