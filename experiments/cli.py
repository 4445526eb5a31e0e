# SPDX-License-Identifier: Apache-2.0
"""What the command lines of all experiments have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import product

import torch

from tools.program import UserError

from . import methods
from .data import READERS
from .grid import create_task
from .models import NAMES, SMALL
from .schedule import KINDS, Schedule
from .settings import Execution, Recipe, Run
from .task import DataOptions

WORKERS = 2  # trainings at a time on the CPU, with a thread each


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


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


def add_comparison(p: argparse.ArgumentParser, task: str, model: str) -> None:
    """Options of a comparison of methods on a grid of settings. ``model``: the default network."""
    grid = p.add_argument_group("the grid: every combination is trained")
    grid.add_argument("--methods", nargs="+", choices=methods.NAMES, default=["sgd", "csgd"], help="(%(default)s)")
    grid.add_argument(
        "--calibrations", nargs="+", type=number(float, 0), default=[1.0], metavar="C", help="of csgd and layer (1)"
    )
    add_lrs_and_seeds(grid)
    grid.add_argument("--layer-where", choices=("output", "weight"), default="output", help="(%(default)s)")
    add_data(p.add_argument_group("data and network"), task, model)
    add_recipe(p.add_argument_group("recipe"))
    add_execution(p.add_argument_group("execution"))
    add_out(p)


def add_lrs_and_seeds(p: argparse._ArgumentGroup) -> None:
    """The part of a grid that all comparisons have."""
    p.add_argument(
        "--lrs", nargs="+", type=number(float, 0), default=[0.05], metavar="LR", help="learning rates (0.05)"
    )
    add_seeds(p)


def add_seeds(p: argparse._ArgumentGroup) -> None:
    """--seeds."""
    p.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0, 1, 2], metavar="N", help="(0 1 2)")


def add_data(
    p: argparse._ArgumentGroup,
    task: str = "classification",
    model: str = "small",
    models: tuple[str, ...] | None = None,
) -> None:
    """Task, data and network. models: its choices, where not all networks will do."""
    p.set_defaults(task=task)
    add_source(p, " or imagefolder" if task == "classification" else "")
    p.add_argument(
        "--holdout",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="hold out the last N training images: validation (0)",
    )
    p.add_argument(
        "--shrink",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="train on the mean of each N x N pixels, which takes N x N times less time (1)",
    )
    p.add_argument("--augment", action="store_true", help="random crops and flips, or new scenes in each epoch")
    p.add_argument("--loaders", type=number(int, 0), default=0, metavar="N", help="processes that read image files (0)")
    p.add_argument(
        "--skip-unreadable", action="store_true", help="leave out image files that cannot be read, and name them"
    )
    names = ", ".join(models or NAMES) if task != "detection" else "fcos, fcos-wide"
    p.add_argument("--model", metavar="NAME", choices=models, default=model, help=f"{names} (%(default)s)")


def add_source(p: argparse._ArgumentGroup, more: str = "") -> None:
    """Which data set, and how many images of it."""
    p.add_argument("--data", metavar="NAME", default="digits", help=f"{', '.join(READERS)}{more} (%(default)s)")
    p.add_argument("--data-dir", metavar="DIR", help="where its files lie")
    p.add_argument("--limit", type=number(int, 1), metavar="N", help="use the first N training images only")


def add_recipe(
    p: argparse._ArgumentGroup, epochs: int | None = 5, schedule: str = "constant", weight_decay: float = 0.0
) -> None:
    """Everything about the training that all methods have in common; with other defaults where an experiment says so.

    epochs: None where the experiment chooses it.
    """
    p.add_argument(
        "--epochs",
        type=number(int, 1),
        default=epochs,
        help="(%(default)s)" if epochs else "(15, with other --data than digits 4)",
    )
    p.add_argument("--batch-size", type=number(int, 1), default=64, help="(%(default)s)")
    p.add_argument("--schedule", choices=KINDS, default=schedule, help="of the learning rate (%(default)s)")
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
    p.add_argument("--weight-decay", type=number(float, 0), default=weight_decay, help="(%(default)s)")
    p.add_argument("--nesterov", action="store_true")


def add_execution(p: argparse._ArgumentGroup, numbers: bool = True) -> None:
    """Where it is trained, with ``numbers`` also in which, and how many trainings at a time."""
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    if numbers:
        _add_numbers(p)
    p.add_argument("--channels-last", action="store_true")
    p.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="same command, same figures; costs some speed on CUDA (default: yes)",
    )
    p.add_argument(
        "--workers", type=number(int, 1), metavar="N", help=f"trainings at a time ({WORKERS}; on a GPU 1)"
    )  # fmt: skip
    p.add_argument(
        "--threads",
        type=number(int, 1),
        metavar="N",
        help="threads of torch on the CPU, in each training; on a busy machine several mostly wait for each other. "
        "Results depend on the number only as far as torch's own arithmetic does (default: 1 for "
        f"{', '.join(SMALL)} and with several workers, else torch's choice)",
    )


def _add_numbers(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of parameters, gradients and momentum, without a float32 copy (%(default)s)",
    )
    p.add_argument("--amp", action="store_true", help="autocast: float16 with loss scaling on CUDA, else bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")


def add_out(p: argparse.ArgumentParser) -> None:
    """--out."""
    p.add_argument("--out", metavar="DIR", required=True, help="for logs and report; runs finished there are skipped")


def workers(args: argparse.Namespace) -> int:
    """The number of trainings at a time."""
    return args.workers or (WORKERS if args.device == "cpu" else 1)


def threads(args: argparse.Namespace) -> int | None:
    """The number of threads of each training; None leaves it to torch."""
    return args.threads or (1 if workers(args) > 1 or getattr(args, "model", SMALL[0]) in SMALL else None)


def data_options(args: argparse.Namespace) -> DataOptions:
    """Of what add_data() has added."""
    return DataOptions(
        args.data,
        args.data_dir,
        args.limit,
        args.holdout,
        args.augment,
        args.loaders,
        args.skip_unreadable,
        args.shrink,
    )


def comparison(args: argparse.Namespace) -> list[Run]:
    """The runs of add_comparison(); UserError for what cannot work."""
    return grid(args, methods.grid(args.methods, args.calibrations, args.layer_where), execution(args))


def grid(args: argparse.Namespace, compared: list[methods.Method], execution: Execution) -> list[Run]:
    """Every method with the learning rates, seeds, data and recipe; the seeds outermost, so that an interrupted one
    has all methods."""
    training, options = recipe(args), data_options(args)
    task = create_task(args.task, options)
    task.build_model(args.model, seed=0)  # says now if there is no such network
    about = task.about()
    combinations = product(dict.fromkeys(args.seeds), dict.fromkeys(args.lrs), compared)
    return [
        Run(args.task, options, args.model, training, execution, method, lr, seed, about)
        for seed, lr, method in combinations
    ]


def recipe(args: argparse.Namespace) -> Recipe:
    """Of what add_recipe() has added; UserError where options contradict each other."""
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


def execution(args: argparse.Namespace) -> Execution:
    """Of what add_execution() has added."""
    device = str(choose_device(args.device))
    if "dtype" not in args:
        return Execution(device, channels_last=args.channels_last, deterministic=args.deterministic)
    if args.amp and args.dtype != "float32":
        raise UserError(f"--amp: keeps float32 parameters, which --dtype {args.dtype} contradicts; give one of them.")
    return Execution(device, args.dtype, args.amp, args.channels_last, args.compile, args.deterministic)


def choose_device(text: str) -> torch.device:
    """The device of ``--device text``: cpu, cuda or cuda:N; UserError where it is none of these or not there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {text}: not a device of this program; give cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "sees no CUDA GPU" if torch.version.cuda else "is built without CUDA"
            raise UserError(f"--device {text}: this PyTorch ({torch.__version__}) {why}; use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {text}: there are {torch.cuda.device_count()} GPUs here; give a lower number.")
    return device
