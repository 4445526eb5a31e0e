# SPDX-License-Identifier: Apache-2.0
"""Classify degraded images (JPEG, noise, blur) with a network that gets the degree of degradation as a second input.

After K. Endo, M. Tanaka, M. Okutomi, "CNN-Based Classification of Degraded Images", Electronic Imaging 2020: a
network with two inputs, the degraded image and the degradation parameter, and an estimation network where the
parameter is unknown. The networks and the training here are our own formulation. Trains with CSGD and, for
comparison, with torch.optim.SGD.

    python -m experiments degraded --out out/degraded
    python -m experiments degraded --data fashion-mnist --data-dir DIR --limit 10000 --models film plane --out out/fm
    python -m experiments degraded --degradations jpeg --worst-quality 2 --out out/degraded-jpeg

regimes: known - the classifier gets image and true parameter vector; estimated - the same classifier, with the vector
that an estimator CNN finds in the image; absent - the same network, trained with a constant vector: equal size,
weights at the start, batches and number of steps.
"""

from __future__ import annotations

import argparse
from itertools import product

from experiments import cli, methods
from experiments.grid import create_task
from experiments.run import train_and_report
from experiments.settings import Run
from tools.program import UserError

from . import degrade
from .mixture import KINDS, MIXTURES, Mixture, Worst
from .models import INJECTIONS
from .task import SHOWN, DegradedOptions


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    grid = p.add_argument_group("what is compared: every combination is trained")
    grid.add_argument("--methods", nargs="+", choices=("csgd", "sgd"), default=["csgd", "sgd"], help="(both)")
    grid.add_argument(
        "--models",
        nargs="+",
        choices=INJECTIONS,
        default=["film"],
        help="how the classifier gets the vector: feature modulation, or further input planes, of three convolutions; "
        "film-vgg: feature modulation of six (film)",
    )
    cli.add_seeds(grid)
    source = p.add_argument_group("data and networks")
    cli.add_source(source)
    source.add_argument(
        "--test-limit", type=cli.number(int, SHOWN), metavar="N", help="use the first N test images only"
    )
    source.add_argument(
        "--loaders",
        type=cli.number(int, 0),
        default=0,
        metavar="N",
        help="processes that degrade images (0); same images",
    )
    source.add_argument(
        "--width", type=cli.number(int, 1), default=16, help="first channels of each network (%(default)s)"
    )
    _add_degradations(p.add_argument_group("degradations"))
    recipe = p.add_argument_group("recipe, the same for all networks")
    cli.add_recipe(recipe, epochs=None, schedule="cosine")
    recipe.add_argument("--lr", type=cli.number(float, 0), default=0.05, help="learning rate (%(default)s)")
    recipe.add_argument("--calibration", type=cli.number(float, 0), default=1.0, help="c of CSGD (%(default)s)")
    cli.add_execution(p.add_argument_group("execution"))
    cli.add_out(p)


def _add_degradations(p: argparse._ArgumentGroup) -> None:
    low, high = degrade.QUALITIES
    p.add_argument("--degradations", nargs="+", choices=KINDS, default=list(KINDS), help="(all)")
    p.add_argument(
        "--mixture",
        choices=MIXTURES,
        default="one",
        help="of several degradations an image gets one, or all in a chain: blur, noise, JPEG (%(default)s)",
    )
    p.add_argument(
        "--worst-quality",
        type=cli.number(int, low, high),
        default=Worst.quality,
        metavar="Q",
        help=f"JPEG quality at strength 1, {low} to {high}; Pillow's codec (%(default)s)",
    )
    p.add_argument(
        "--max-noise",
        type=cli.number(float, 0, degrade.MAX_NOISE),
        default=Worst.noise,
        metavar="SIGMA",
        help=f"noise at strength 1, in grey levels, 0 to {degrade.MAX_NOISE:g}; white is 255 (%(default)g)",
    )
    p.add_argument(
        "--max-blur",
        type=cli.number(float, 0, degrade.MAX_BLUR),
        default=Worst.blur,
        metavar="SIGMA",
        help=f"blur at strength 1, in pixels, 0 to {degrade.MAX_BLUR:g} (%(default)g)",
    )
    p.add_argument(
        "--strengths",
        nargs=2,
        type=cli.number(float, 0, 1),
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="drawn in training, uniformly: 0 is clean, 1 as above; 1 1: the strongest only (0 1)",
    )
    p.add_argument(
        "--levels", type=cli.number(int, 1), default=4, metavar="N", help="strengths tested, up to 1 (%(default)s)"
    )


def runs(args: argparse.Namespace) -> list[Run]:
    """The grid; UserError for what cannot work."""
    args.epochs = args.epochs or (15 if args.data == "digits" else 4)
    recipe, execution = cli.recipe(args), cli.execution(args)
    low, high = args.strengths
    if low > high:
        raise UserError(f"--strengths {low:g} {high:g}: the first is the lowest; exchange them.")
    worst = Worst(args.worst_quality, args.max_noise, args.max_blur)
    options = DegradedOptions(
        args.data,
        args.data_dir,
        args.limit,
        loaders=args.loaders,
        mixture=Mixture(tuple(dict.fromkeys(args.degradations)), args.mixture, worst, (low, high)),
        levels=args.levels,
        width=args.width,
        test_limit=args.test_limit,
        calibration=args.calibration,
    )
    about = create_task("degraded", options).about()
    compared = methods.grid(args.methods, [args.calibration])
    combinations = product(dict.fromkeys(args.seeds), compared, dict.fromkeys(args.models))
    return [
        Run("degraded", options, model, recipe, execution, method, args.lr, seed, about)
        for seed, method, model in combinations
    ]


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Trains and reports."""
    train_and_report(runs(args), args, command)
