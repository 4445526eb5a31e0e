# SPDX-License-Identifier: Apache-2.0
"""Reads the logs of finished trainings."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import run_log
from tools.program import UserError

_NEEDED = ("task", "recipe", "execution", "method", "calibration", "lr", "seed")  # of the settings of a log


@dataclass(frozen=True)
class RunLog:
    """One training. epochs: a dict of figures per epoch; that of a divergence stands for those it did not reach.

    settings: of Run.settings(); results: of Task.final(); environment: what it ran on, and the command.
    """

    path: Path
    settings: dict[str, Any]
    epochs: list[dict[str, float | None]]
    diverged: bool
    results: Any
    environment: dict[str, str]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.settings["method"]

    @property
    def calibration(self) -> float | None:
        """Its strength."""
        return self.settings["calibration"]

    @property
    def lr(self) -> float:
        """Learning rate."""
        return self.settings["lr"]

    @property
    def seed(self) -> int:
        """Seed."""
        return self.settings["seed"]

    @property
    def dtype(self) -> str:
        """Of parameters and momentum."""
        return self.settings["execution"]["dtype"]


@dataclass(frozen=True)
class Experiment:
    """runs: all trainings. common: the settings that they have in common."""

    runs: list[RunLog]
    common: dict[str, Any]

    @classmethod
    def of(cls, runs: list[RunLog], varied: tuple[str, ...]) -> Experiment:
        """UserError where a run is there twice, or they differ in more than the settings ``varied``."""
        shared = common(runs[0].settings, varied)
        seen: dict[tuple, RunLog] = {}
        for run in runs:
            if different := run_log.differences(shared, common(run.settings, varied)):
                raise UserError(
                    f"{run.path}: another experiment than {runs[0].path} ({', '.join(different)}); report them apart."
                )
            key = tuple(run.dtype if name == "dtype" else run.settings.get(name) for name in varied)
            if key in seen:
                raise UserError(f"{run.path}: the same run as {seen[key].path}; give only one of the two directories.")
            seen[key] = run
        return cls(runs, shared)

    @property
    def headline(self) -> str:
        """Name of the metric that decides, without the split: a share, higher is better."""
        columns = self.runs[0].epochs[0]
        names = [name for name in columns if name.startswith("test_")]
        if not names:
            raise UserError(f"{self.runs[0].path.with_suffix('.csv')}: has no test metric; delete it and run again.")
        return names[0].removeprefix("test_")

    @property
    def selection(self) -> str:
        """The split by which learning rates are chosen: held-out training images where there are any."""
        return "validation" if f"validation_{self.headline}" in self.runs[0].epochs[0] else "test"

    def environment(self) -> str:
        """The commands and what they ran on, each once, as Markdown."""
        # When it ran and how busy the machine was differs from run to run; what it ran on does not.
        varying = "command", "date", "load average at the start"
        commands = dict.fromkeys(run.environment.get("command", "") for run in self.runs)
        parts = ["\n".join(["```sh", *commands, "```"])]
        for run in self.runs:
            about = "\n".join(f"- {name}: {value}" for name, value in run.environment.items() if name not in varying)
            if about not in parts:
                parts.append(about)
        return "\n\n".join(parts)


def common(settings: dict[str, Any], varied: tuple[str, ...]) -> dict[str, Any]:
    """The settings in which the runs of a report agree: all but ``varied``, among which "dtype" is execution's."""
    shared = {name: value for name, value in settings.items() if name not in varied}
    return shared | {"execution": {k: v for k, v in settings.get("execution", {}).items() if k not in varied}}


def read(directories: list[str]) -> list[RunLog]:
    """The logs in the directories, at least one; unfinished runs are left out with a note on stderr."""
    from experiments.pruning import old_logs  # here, since it imports this module

    runs = []
    for directory in map(Path, directories):
        if (directory / old_logs.NAME).exists():
            runs += old_logs.read(directory / old_logs.NAME)
        else:
            runs += [_read_run(path) for path in finished(directory, note=True)]
    if not runs:
        raise UserError(f"{', '.join(directories)}: no finished run there; name directories of logs.")
    return runs


def finished(directory: Path, note: bool = False) -> list[Path]:
    """The JSON files of finished runs, in the order of their names; with ``note`` others are counted on stderr."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name one of logs.")
    found = [path for path in sorted(directory.glob("*.json")) if path.with_suffix(".csv").exists()]
    unfinished = len({path.stem for path in directory.glob("*.csv")} - {path.stem for path in found})
    if unfinished and note:
        print(f"{directory}: {unfinished} runs are not finished and left out.", file=sys.stderr)
    return found


def _read_run(path: Path) -> RunLog:
    content = run_log.read_json(path)
    settings = content["settings"]
    try:
        wanted, _ = settings["recipe"]["epochs"], settings["execution"]["dtype"]
        missing = [name for name in _NEEDED if name not in settings]
    except (KeyError, TypeError):
        missing = list(_NEEDED)
    if missing:
        raise UserError(f"{path}: not a log of an experiment; leave it out.")
    epochs = _read_epochs(path.with_suffix(".csv"))
    diverged = bool(content.get("diverged"))
    if len(epochs) > wanted or (len(epochs) < wanted and not diverged):
        raise UserError(
            f"{path.with_suffix('.csv')}: {len(epochs)} epochs instead of {wanted}; delete it and run again."
        )
    epochs += [epochs[-1]] * (wanted - len(epochs))
    return RunLog(path, settings, epochs, diverged, content.get("results"), content.get("environment", {}))


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
    return epochs
