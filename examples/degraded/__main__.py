# SPDX-License-Identifier: Apache-2.0
"""Classify degraded images (JPEG, noise, blur) with a network that gets the degree of degradation as a second input.

After K. Endo, M. Tanaka, M. Okutomi, "CNN-Based Classification of Degraded Images", Electronic Imaging 2020: a
network with two inputs, the degraded image and the degradation parameter, and an estimation network where the
parameter is unknown. The networks and the training here are our own formulation. Trains with CSGD and, for
comparison, with torch.optim.SGD; writes tables and pictures of the accuracy by degradation, level and regime.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.step_bench import machine
from benchmarks.train.data import ImageSet, Split, load
from benchmarks.train.run_log import without_places, write_atomically
from benchmarks.train.tasks import DataOptions
from examples.training.device import choose
from examples.training.errors import UserError, exit_status
from examples.training.loop import deterministic
from examples.training.report import prepare

from . import log, options, report
from .data import stretched
from .mixture import Mixture, Worst
from .summary import Summary
from .trial import SHOWN, Choice, Place, Recipe, Trial


def read_images(args: argparse.Namespace) -> ImageSet:
    """The data set, its brightest grey level at 255."""
    images = stretched(load(DataOptions(args.data, args.data_dir, args.limit)))
    test = Split(images.test.images[: args.test_limit], images.test.labels[: args.test_limit])
    if len(test) < SHOWN:
        raise UserError(f"--data {args.data}: {len(test)} test images; at least {SHOWN} are needed.")
    return replace(images, test=test)


def _settings(args: argparse.Namespace, images: ImageSet) -> tuple[Mixture, Recipe, dict[str, Any]]:
    """The mixture, the recipe, and what all trials of the report share, as JSON values."""
    kinds = tuple(dict.fromkeys(args.degradations))
    low, high = args.strengths
    if low > high:
        raise UserError(f"--strengths {low:g} {high:g}: the first is the lowest; exchange them.")
    mixture = Mixture(kinds, args.mixture, Worst(args.worst_quality, args.max_noise, args.max_blur), (low, high))
    recipe = Recipe(**{field: getattr(args, field) for field in Recipe.__dataclass_fields__})
    about = {
        "name": args.data,
        "train": len(images.train),
        "test": len(images.test),
        "image_size": list(images.train.images.shape[1:]),
        "checksum": images.checksum(),
    }
    device = args.device.partition(":")[0]
    return mixture, recipe, {"data": about, "mixture": asdict(mixture), "recipe": asdict(recipe), "device": device}


def run(args: argparse.Namespace, arguments: list[str]) -> None:
    """Check everything that can be wrong, train what is not finished, report on all that is."""
    device = choose(args.device)
    args.epochs = args.epochs or (15 if args.data == "digits" else 4)
    torch.set_num_threads(args.threads)
    images = read_images(args)
    mixture, recipe, common = _settings(args, images)
    out = prepare(args.out)
    finished = {log.path(out, found.settings) for found in log.read_all(out, common)}
    choices = [Choice(o, i, seed) for seed, o, i in product(args.seeds, args.optimizers, args.injections)]
    missing = [choice for choice in dict.fromkeys(choices) if log.path(out, asdict(choice)) not in finished]
    if missing:
        print(_announcement(args, images, choices, missing, out), flush=True)
    environment = machine.describe(device, without_places(["python", "-m", "examples.degraded", *arguments]))
    with _algorithms(device):
        for i, choice in enumerate(missing):
            trial = Trial(images, mixture, recipe, choice, Place(device, args.loaders))
            results = _train_and_test(trial, f"{i + 1} of {len(missing)}")
            settings = common | asdict(choice)
            log.write(out, log.Log(settings, trial.parameters, trial.epochs, results, environment))
    write_report(log.read_all(out, common), out, images.test, mixture)


def _announcement(
    args: argparse.Namespace, images: ImageSet, choices: list[Choice], missing: list[Choice], out: Path
) -> str:
    """What will be run, in one line."""
    compared = f"{', '.join(dict.fromkeys(choice.optimizer for choice in choices))} by "
    compared += f"{', '.join(dict.fromkeys(choice.injection for choice in choices))}, seeds "
    compared += ", ".join(str(seed) for seed in dict.fromkeys(args.seeds))
    return (
        f"Training {len(missing)} of {len(dict.fromkeys(choices))} trials ({compared}): in each three CNNs of width "
        f"{args.width}, {args.epochs} epochs of {len(images.train):,} images, on {args.device}, "
        f"threads: {args.threads}. Results go to {out}."
    )


@contextmanager
def _algorithms(device: torch.device) -> Iterator[None]:
    """Same command, same figures."""
    if device.type == "cuda":
        # cuBLAS is deterministic only with a workspace of its own; read when its handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with deterministic():
        yield


def _train_and_test(trial: Trial, number: str) -> list[dict[str, Any]]:
    """Trial.evaluate() after all epochs, with a progress bar of training steps and then of conditions."""
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs a line now and then
    what = f"{', '.join(map(str, asdict(trial.choice).values()))} ({number})"
    with tqdm(total=trial.steps, unit="step", mininterval=interval, desc=f"{what}, training") as bar:
        for _ in range(trial.recipe.epochs):
            trial.train_epoch(bar.update)
    conditions = trial.mixture.conditions(trial.recipe.levels)
    with tqdm(total=len(conditions), unit="condition", mininterval=interval, desc=f"{what}, testing") as bar:
        return trial.evaluate(bar.update)


def write_report(logs: list[log.Log], out: Path, test: Split, mixture: Mixture) -> None:
    """Write tables, figures and pictures into ``out``, and print the tables, even where a file cannot be written."""
    from . import figures  # here, since it needs matplotlib, which nothing else does

    summary = Summary(logs)
    text = report.markdown(summary)
    written = ["table.md", "results.json"]
    try:
        write_atomically(out / "table.md", text)
        write_atomically(out / "results.json", report.full_json(logs))
        for variant in summary.trials:
            plot, picture = (f"{kind}-{'-'.join(variant)}.png" for kind in ("accuracy", "samples"))
            figures.draw_accuracy(summary, variant, out / plot)
            figures.draw_samples(summary, variant, test, mixture, summary.common["data"]["name"], out / picture)
            written += [plot, picture]
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}).") from None
    finally:
        print(text)
    print(f"Written to {out}: {', '.join(written)}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return exit_status(
        "examples.degraded", "the same command goes on after the last finished run.",
        lambda: run(options.parser(__doc__).parse_args(arguments), arguments),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
