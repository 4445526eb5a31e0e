# SPDX-License-Identifier: Apache-2.0
"""The command line."""

from __future__ import annotations

import argparse

from benchmarks.train.data import READERS
from benchmarks.train.options import number
from examples.training.errors import UserError

from . import degrade
from .mixture import KINDS, MIXTURES, Worst
from .models import INJECTIONS
from .trial import SHOWN

EPILOG = """\
regimes: known - the classifier gets image and true parameter vector; estimated - the same classifier, with the vector
that an estimator CNN finds in the image; absent - the same network, trained with a constant vector: equal size,
weights at the start, batches and number of steps.

Runs that are finished in --out are not trained again, so that a comparison can be made in pieces, for example seed by
seed; the report is made of all that is there. It consists of table.md, results.json, accuracy-*.png, samples-*.png.

examples:
    python -m examples.degraded
    python -m examples.degraded --data fashion-mnist --data-dir DIR --limit 10000 --injections film plane
    python -m examples.degraded --degradations jpeg --worst-quality 2 --out out/degraded-jpeg
"""


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


def parser(description: str) -> Parser:
    """All options. Each is checked on its own here, together they are checked later."""
    p = Parser(
        prog="examples.degraded",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data(p.add_argument_group("data"))
    _add_degradations(p.add_argument_group("degradations"))
    _add_compared(p.add_argument_group("what is compared: every combination is trained"))
    _add_recipe(p.add_argument_group("recipe, the same for all networks; the learning rate falls along a cosine"))
    place = p.add_argument_group("execution")
    place.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    place.add_argument(
        "--loaders", type=number(int, 0), default=0, metavar="N", help="processes that degrade images (0); same images"
    )
    place.add_argument(
        "--threads",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="threads of torch on the CPU; on a busy machine several mostly wait for each other. Results depend on the "
        "number only as far as torch's own arithmetic does (%(default)s)",
    )
    p.add_argument("--out", metavar="DIR", default="out/degraded", help="for logs and report (%(default)s)")
    return p


def _add_data(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--data", metavar="NAME", default="digits", help=f"{', '.join(READERS)} (%(default)s)")
    p.add_argument("--data-dir", metavar="DIR", help="where its files lie")
    p.add_argument("--limit", type=number(int, 1), metavar="N", help="use the first N training images only")
    p.add_argument("--test-limit", type=number(int, SHOWN), metavar="N", help="use the first N test images only")


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
        type=number(int, low, high),
        default=Worst.quality,
        metavar="Q",
        help=f"JPEG quality at strength 1, {low} to {high}; Pillow's codec (%(default)s)",
    )
    p.add_argument(
        "--max-noise",
        type=number(float, 0, degrade.MAX_NOISE),
        default=Worst.noise,
        metavar="SIGMA",
        help=f"noise at strength 1, in grey levels, 0 to {degrade.MAX_NOISE:g}; white is 255 (%(default)g)",
    )
    p.add_argument(
        "--max-blur",
        type=number(float, 0, degrade.MAX_BLUR),
        default=Worst.blur,
        metavar="SIGMA",
        help=f"blur at strength 1, in pixels, 0 to {degrade.MAX_BLUR:g} (%(default)g)",
    )
    p.add_argument(
        "--strengths",
        nargs=2,
        type=number(float, 0, 1),
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="drawn in training, uniformly: 0 is clean, 1 as above; 1 1: the strongest only (0 1)",
    )
    p.add_argument(
        "--levels", type=number(int, 1), default=4, metavar="N", help="strengths tested, up to 1 (%(default)s)"
    )


def _add_compared(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--injections",
        nargs="+",
        choices=INJECTIONS,
        default=["film"],
        help="how the classifier gets the vector: feature modulation or further input planes (film)",
    )
    p.add_argument(
        "--optimizers", "--optimizer", nargs="+", choices=("csgd", "sgd"), default=["csgd", "sgd"], help="(both)"
    )
    p.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0, 1, 2], metavar="N", help="(0 1 2)")


def _add_recipe(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--epochs", type=number(int, 1), help="(15, with other --data than digits 4)")
    p.add_argument("--batch-size", type=number(int, 2), default=64, help="(%(default)s)")
    p.add_argument("--lr", type=number(float, 0), default=0.05, help="learning rate (%(default)s)")
    p.add_argument("--momentum", type=number(float, 0), default=0.9, help="(%(default)s)")
    p.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="(%(default)s)")
    p.add_argument("--calibration", type=number(float, 0), default=1.0, help="strength c of CSGD (%(default)s)")
    p.add_argument("--width", type=number(int, 1), default=16, help="first channels of each network (%(default)s)")
