# SPDX-License-Identifier: Apache-2.0
"""The file of a finished trial: one JSON with settings, figures and environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.train.run_log import differences, read_json, write_atomically
from examples.training.errors import UserError

from .trial import REGIMES

_SUFFIX = ".trial.json"


@dataclass(frozen=True)
class Log:
    """settings: what all trials of a report share, and optimizer, injection, seed.

    parameters: of each network; epochs: Trial.epochs; results: of Trial.evaluate(); environment: of machine.describe().
    """

    settings: dict[str, Any]
    parameters: dict[str, int]
    epochs: list[dict[str, float]]
    results: list[dict[str, Any]]
    environment: dict[str, str]

    @property
    def variant(self) -> tuple[str, str]:
        """(optimizer, injection)."""
        return self.settings["optimizer"], self.settings["injection"]

    @property
    def common(self) -> dict[str, Any]:
        """The settings that all trials of a report share."""
        return {key: value for key, value in self.settings.items() if key not in ("optimizer", "injection", "seed")}


def path(out: Path, settings: dict[str, Any]) -> Path:
    """Where the trial with these settings is logged."""
    return out / f"{settings['optimizer']}-{settings['injection']}-seed{settings['seed']}{_SUFFIX}"


def write(out: Path, log: Log) -> None:
    """To path(); UserError where that cannot be done."""
    write_atomically(path(out, log.settings), json.dumps(vars(log), indent=1) + "\n")


def read_all(out: Path, common: dict[str, Any]) -> list[Log]:
    """All finished trials in ``out``, by name; UserError for one whose common settings are other than these."""
    logs = []
    for file in sorted(out.glob(f"*{_SUFFIX}")):
        content = read_json(file)
        try:
            log = Log(**content)
            whole = path(out, log.settings) == file and all(set(REGIMES) <= set(r["accuracy"]) for r in log.results)
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{file}: not a log of this program; remove it, and train again what it stands for.")
        if different := differences(log.common, common):
            raise UserError(
                f"--out {out}: {file.name} was made with other settings ({', '.join(different)}); "
                "choose another directory."
            )
        logs.append(log)
    return logs
