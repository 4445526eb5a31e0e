# SPDX-License-Identifier: Apache-2.0
"""Reads the logs of ``run``: the finished trainings of one experiment."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.training.errors import UserError

from .. import run_log

# What a grid varies; in everything else the runs of one report must agree.
_VARIED = ("method", "calibration", "lr", "seed")


@dataclass(frozen=True)
class RunLog:
    """One training. epochs: a dict of figures per epoch; that of a divergence stands for those it did not reach."""

    path: Path
    method: str
    calibration: float | None
    dtype: str
    lr: float
    seed: int
    epochs: list[dict[str, float | None]]
    diverged: bool

    @property
    def key(self) -> tuple:
        """Two runs with the same one are the same training."""
        return self.method, self.calibration, self.dtype, self.lr, self.seed


@dataclass(frozen=True)
class Experiment:
    """runs: all trainings. common: the settings that they share.

    commands: by which they were run; environments: what they ran on; each once.
    """

    runs: list[RunLog]
    common: dict[str, Any]
    commands: list[str]
    environments: list[dict[str, str]]

    @property
    def headline(self) -> str:
        """Name of the metric that decides, without the split: a share, higher is better."""
        columns = self.runs[0].epochs[0]
        return next(name for name in columns if name.startswith("test_")).removeprefix("test_")

    @property
    def selection(self) -> str:
        """The split by which learning rates are chosen: held-out training images where there are any."""
        return "validation" if f"validation_{self.headline}" in self.runs[0].epochs[0] else "test"


def read(directories: list[str]) -> Experiment:
    """The experiment whose logs lie in the directories; unfinished runs are left out with a note on stderr."""
    runs, common, commands, environments = [], None, {}, []
    seen: dict[tuple, Path] = {}
    for directory in map(Path, directories):
        for path in _finished(directory):
            run, shared, environment = _read_run(path)
            if run.key in seen:
                raise UserError(f"{path}: the same run as {seen[run.key]}; give only one of the two directories.")
            seen[run.key] = path
            if common is not None and (different := run_log.differences(common, shared)):
                raise UserError(
                    f"{path}: another experiment than {runs[0].path} ({', '.join(different)}); report them apart."
                )
            common = shared
            runs.append(run)
            commands[environment.pop("command", "")] = None
            if environment not in environments:
                environments.append(environment)
    if not runs:
        raise UserError(f"{', '.join(directories)}: no finished run there; name directories that run wrote.")
    return Experiment(runs, common, list(commands), environments)


def _finished(directory: Path) -> list[Path]:
    """The JSON files of finished runs, in the order of their names."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name one that run wrote.")
    finished = [path for path in sorted(directory.glob("*.json")) if path.with_suffix(".csv").exists()]
    unfinished = len({path.stem for path in directory.glob("*.csv")} - {path.stem for path in finished})
    if unfinished:
        print(f"{directory}: {unfinished} runs are not finished and left out.", file=sys.stderr)
    return finished


def _read_run(path: Path) -> tuple[RunLog, dict[str, Any], dict[str, str]]:
    content = run_log.read_json(path)
    settings = content["settings"]
    try:
        varied = {name: settings.pop(name) for name in _VARIED}
        dtype = settings["execution"].pop("dtype")
        wanted = settings["recipe"]["epochs"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a file that run wrote; leave it out.") from None
    epochs = _read_epochs(path.with_suffix(".csv"))
    diverged = bool(content.get("diverged"))
    if len(epochs) > wanted or (len(epochs) < wanted and not diverged):
        raise UserError(
            f"{path.with_suffix('.csv')}: {len(epochs)} epochs instead of {wanted}; delete it and run again."
        )
    epochs += [epochs[-1]] * (wanted - len(epochs))
    # When it ran and how busy the machine was differs from run to run; what it ran on does not.
    environment = {
        name: value
        for name, value in content.get("environment", {}).items()
        if name not in ("date", "load average at the start")
    }
    return RunLog(path, **varied, dtype=dtype, epochs=epochs, diverged=diverged), settings, environment


_TEXT_COLUMNS = {"method", "calibration", "lr", "seed", "dtype", "data", "model"}


def _read_epochs(path: Path) -> list[dict[str, float | None]]:
    """The figures of each epoch; None where the field is empty."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        epochs = [
            {name: float(value) if value else None for name, value in row.items() if name not in _TEXT_COLUMNS}
            for row in rows
        ]
    except (OSError, csv.Error, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a log of this program ({error}); delete it and run again.") from None
    numbered = [row.get("epoch") for row in epochs] == list(range(1, len(epochs) + 1))
    if not epochs or not numbered or not {"train_loss", "density"} <= epochs[0].keys():
        raise UserError(f"{path}: not a log of this program, or epochs are missing; delete it and run again.")
    if not any(name.startswith("test_") for name in epochs[0]):
        raise UserError(f"{path}: has no test metric; delete it and run again.")
    return epochs
