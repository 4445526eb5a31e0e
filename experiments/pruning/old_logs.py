# SPDX-License-Identifier: Apache-2.0
"""Reads runs.csv, in which an earlier version of this experiment kept its runs, a row for each."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from experiments.report.logs import RunLog
from tools.program import UserError

from .methods import DENSE

NAME = "runs.csv"
_METHODS = {"threshold, momentum cleared": "threshold-cleared", "threshold, frozen": "threshold-frozen"}
_RESULTS = ("zeros", "weights", "exported", "difference")


def read(path: Path) -> list[RunLog]:
    """As if each run had a log of its own; without settings that the file does not have."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_run(path, row) for row in csv.DictReader(file, strict=True)]
    except (OSError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a log of this program ({error}); delete it and run again.") from None


def _run(path: Path, row: dict[str, Any]) -> RunLog:
    data, _, limit = row["data"].partition(":")
    sparsity = float(row["sparsity"])
    settings = {
        "task": "pruning",
        "data": {"data": data, "limit": int(limit) if limit else None},
        "about": {},
        "model": "chain",
        "recipe": {"epochs": int(row["epochs"]), "batch_size": int(row["batch_size"])},
        "execution": {"device": "cpu", "dtype": "float32"},
        "method": _METHODS.get(row["method"], row["method"]) if sparsity else DENSE,
        "calibration": float(row["calibration"]),
        "structure": row["structure"] if sparsity else DENSE,
        "sparsity": sparsity,
        "lr": float(row["lr"]),
        "seed": int(row["seed"]),
    }
    results = {name: float(row[name]) for name in _RESULTS}
    environment = {"threads": row.get("threads") or "unknown"}
    return RunLog(path, settings, [{"test_accuracy": float(row["accuracy"])}], False, results, environment)
