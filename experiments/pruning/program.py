# SPDX-License-Identifier: Apache-2.0
"""Accuracy against sparsity of hard thresholding while training, and of one-shot magnitude pruning with fine-tuning.

    python -m experiments pruning --out out/pruning
    python -m experiments pruning --data fashion-mnist --data-dir DIR --limit 10000 --epochs 8 --out out/pruning-fashion
    python -m experiments pruning --data cifar10 --data-dir DIR --model resnet20 --augment --structures cuttable \\
        --sparsities 0 0.2 0.4 0.6 --out out/pruning-resnet20

A network is trained by CSGD. When half of the steps are made it is as sparse as it gets, and the other half is for
fine-tuning: hard thresholding takes the sparsity there along a cubic ramp, from a quarter of the steps on; one-shot
pruning (torch.nn.utils.prune) trains a dense network until then and drops its weights at once; so does torch-pruning,
where it is installed, with the channels of whole groups of layers. In the end dead filters are cut out.

structures: element - single weights; filter - filters of all convolutions; cuttable - filters of those convolutions
alone where export_pruned can cut them out: in a ResNet not of those that a sum ties to others.
"""

from __future__ import annotations

import argparse
from itertools import product

from experiments import cli
from experiments.grid import create_task
from experiments.run import train_and_report
from experiments.settings import Run
from tools.program import UserError

from .methods import DENSE, ELEMENT, FILTER, METHODS, STRUCTURES, TORCH_PRUNING, Pruned, check_installed

_LARGEST = 0.9999
_NETWORKS = ("chain", "vgg-small", "resnet20")


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    grid = p.add_argument_group("the grid: every combination is trained, a dense network once for each seed")
    usual = [name for name in METHODS if name != TORCH_PRUNING]
    grid.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=usual,
        help=f"(all but {TORCH_PRUNING}, which need not be installed)",
    )
    grid.add_argument("--structures", nargs="+", choices=STRUCTURES, default=[ELEMENT, FILTER], help="(%(default)s)")
    grid.add_argument(
        "--sparsities",
        nargs="+",
        type=cli.number(float, 0, _LARGEST),
        default=[0, 0.5, 0.8, 0.9, 0.95],
        metavar="SHARE",
        help="(%(default)s)",
    )
    cli.add_seeds(grid)
    cli.add_data(p.add_argument_group("data and network"), "pruning", _NETWORKS[0], _NETWORKS)
    recipe = p.add_argument_group("recipe")
    cli.add_recipe(recipe, epochs=20, schedule="cosine", weight_decay=5e-4)
    recipe.add_argument("--lr", type=cli.number(float, 0), default=0.05, help="learning rate (%(default)s)")
    recipe.add_argument("--calibration", type=cli.number(float, 0), default=1.0, help="c, 0: plain SGD (%(default)s)")
    cli.add_execution(p.add_argument_group("execution"), numbers=False)
    cli.add_out(p)


def runs(args: argparse.Namespace) -> list[Run]:
    """The grid."""
    recipe, execution = cli.recipe(args), cli.execution(args)
    options = cli.data_options(args)
    task = create_task("pruning", options)
    task.build_model(args.model, seed=0)  # says now if the images are too small for it
    methods = [
        Pruned(name, args.calibration, structure, sparsity) if sparsity else Pruned(DENSE, args.calibration)
        for name, structure, sparsity in product(args.methods, args.structures, args.sparsities)
        if not sparsity or name != TORCH_PRUNING or structure != ELEMENT
    ]
    if not methods:
        raise UserError(f"--methods {TORCH_PRUNING}: prunes filters only; add filter or cuttable to --structures.")
    check_installed(args.methods)
    about = task.about()
    combinations = product(dict.fromkeys(args.seeds), dict.fromkeys(methods))
    return [
        Run("pruning", options, args.model, recipe, execution, method, args.lr, seed, about)
        for seed, method in combinations
    ]


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Trains and reports."""
    train_and_report(runs(args), args, command)
