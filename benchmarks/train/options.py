# SPDX-License-Identifier: Apache-2.0
"""The command line of ``run``, and the runs that follow from it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import product

from examples.training.device import choose
from examples.training.errors import UserError

from . import methods
from .data import READERS
from .grid import create_task
from .models import NAMES, SMALL
from .schedule import KINDS, Schedule
from .settings import Execution, Recipe, Run
from .tasks import TASKS, DataOptions


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """argparse type: a finite number of the kind, at least ``low`` and at most ``high``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            whole = "a whole number" if kind is int else "a number"
            limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} {limits}")
        return value

    return parse


def add_run_options(p: argparse.ArgumentParser) -> None:
    """What ``run`` understands."""
    grid = p.add_argument_group("the grid: every combination is trained")
    grid.add_argument("--methods", nargs="+", choices=methods.NAMES, default=["sgd", "csgd"], help="(%(default)s)")
    grid.add_argument(
        "--calibrations", nargs="+", type=number(float, 0), default=[1.0], metavar="C", help="of csgd and layer (1)"
    )
    grid.add_argument(
        "--lrs", nargs="+", type=number(float, 0), default=[0.05], metavar="LR", help="learning rates (0.05)"
    )
    grid.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0, 1, 2], metavar="N", help="(0 1 2)")
    grid.add_argument("--layer-where", choices=("output", "weight"), default="output", help="(%(default)s)")
    add_data(p.add_argument_group("data and network"))
    add_recipe(p.add_argument_group("recipe"))
    _add_execution(p.add_argument_group("execution"))
    p.add_argument("--out", metavar="DIR", required=True, help="for the logs; runs that are finished there are skipped")


def add_data(p: argparse._ArgumentGroup) -> None:
    """Task, data and network."""
    p.add_argument("--task", choices=tuple(TASKS), default="classification", help="(%(default)s)")
    p.add_argument(
        "--data", metavar="NAME", default="digits", help=f"{', '.join(READERS)} or imagefolder (%(default)s)"
    )
    p.add_argument("--data-dir", metavar="DIR", help="where its files lie")
    p.add_argument("--limit", type=number(int, 1), metavar="N", help="use the first N training images only")
    p.add_argument(
        "--holdout",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="hold out the last N training images: validation (0)",
    )
    p.add_argument("--augment", action="store_true", help="random crops and, where the class allows it, flips")
    p.add_argument("--loaders", type=number(int, 0), default=0, metavar="N", help="processes that read image files (0)")
    p.add_argument(
        "--skip-unreadable", action="store_true", help="leave out image files that cannot be read, and name them"
    )
    p.add_argument("--model", metavar="NAME", default="small", help=f"{', '.join(NAMES)} (%(default)s)")


def add_recipe(p: argparse._ArgumentGroup) -> None:
    """Everything about the training that all methods share."""
    p.add_argument("--epochs", type=number(int, 1), default=5, help="(%(default)s)")
    p.add_argument("--batch-size", type=number(int, 1), default=64, help="(%(default)s)")
    p.add_argument("--schedule", choices=KINDS, default="constant", help="of the learning rate (%(default)s)")
    p.add_argument(
        "--milestones",
        nargs="+",
        type=number(int, 1),
        default=[],
        metavar="EPOCH",
        help="step: a tenth of the rate after each",
    )
    p.add_argument("--warmup", type=number(int, 0), default=0, metavar="EPOCHS", help="of rising learning rate (0)")
    p.add_argument("--momentum", type=number(float, 0), default=0.9, help="(%(default)s)")
    p.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="(%(default)s)")
    p.add_argument("--nesterov", action="store_true")


def _add_execution(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of parameters, gradients and momentum, without a float32 copy (%(default)s)",
    )
    p.add_argument("--amp", action="store_true", help="autocast: float16 with loss scaling on CUDA, else bfloat16")
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="same command, same figures; costs some speed on CUDA (default: yes)",
    )
    p.add_argument("--workers", type=number(int, 1), default=1, metavar="N", help="trainings at a time (1)")
    p.add_argument(
        "--threads",
        type=number(int, 1),
        metavar="N",
        help="threads of torch on the CPU, in each training; on a busy machine several mostly wait for each other. "
        "Results depend on the number only as far as torch's own arithmetic does (default: 1 for "
        f"{' and '.join(SMALL)} and with several workers, else torch's choice)",
    )


def threads(args: argparse.Namespace) -> int | None:
    """The number of threads of each training; None leaves it to torch."""
    return args.threads or (1 if args.workers > 1 or args.model in SMALL else None)


def runs(args: argparse.Namespace) -> list[Run]:
    """The grid, the seeds outermost, so that an interrupted one has all methods; UserError for what cannot work."""
    return grid(args, methods.grid(args.methods, args.calibrations, args.layer_where), _execution(args))


def grid(args: argparse.Namespace, compared: list[methods.Method], execution: Execution) -> list[Run]:
    """Every method with the learning rates, seeds, data and recipe of the command line."""
    recipe = _recipe(args)
    options = DataOptions(
        args.data, args.data_dir, args.limit, args.holdout, args.augment, args.loaders, args.skip_unreadable
    )
    task = create_task(args.task, options)
    task.build_model(args.model, seed=0)  # says now if there is no such network
    about = task.about()
    combinations = product(dict.fromkeys(args.seeds), dict.fromkeys(args.lrs), compared)
    return [
        Run(args.task, options, args.model, recipe, execution, method, lr, seed, about)
        for seed, lr, method in combinations
    ]


def _recipe(args: argparse.Namespace) -> Recipe:
    if bool(args.milestones) != (args.schedule == "step"):
        raise UserError("--milestones: needed by --schedule step, and by no other; give both or neither.")
    if max(args.milestones, default=0) >= args.epochs:
        raise UserError(f"--milestones {max(args.milestones)}: must come before the end, --epochs {args.epochs}.")
    if args.warmup >= args.epochs and args.warmup:
        raise UserError(f"--warmup {args.warmup}: must be shorter than --epochs {args.epochs}.")
    if args.nesterov and not args.momentum:
        raise UserError("--nesterov: needs a --momentum above 0.")
    schedule = Schedule(args.schedule, args.epochs, tuple(sorted(set(args.milestones))), args.warmup)
    return Recipe(args.epochs, args.batch_size, schedule, args.momentum, args.weight_decay, args.nesterov)


def _execution(args: argparse.Namespace) -> Execution:
    if args.amp and args.dtype != "float32":
        raise UserError(f"--amp: keeps float32 parameters, which --dtype {args.dtype} contradicts; give one of them.")
    device = choose(args.device)
    return Execution(
        str(device), args.dtype, args.amp, args.channels_last, args.compile, deterministic=args.deterministic
    )
