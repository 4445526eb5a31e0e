# SPDX-License-Identifier: Apache-2.0
"""The files of a training: NAME.csv with a row per epoch, and NAME.json, which is written when it is finished."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from tools import machine
from tools.program import UserError

from .loop import Row, Training
from .settings import Run


def prepare(directory: str) -> Path:
    """The output directory, created if need be; UserError if that fails."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {directory}: cannot be created ({error.strerror}); choose another place.") from None
    return path


def write_epochs(out: Path, run: Run, rows: list[Row]) -> None:
    """The CSV of the epochs so far."""
    stream = io.StringIO()
    what = {
        "method": run.method.name,
        "calibration": run.method.calibration,
        "lr": run.lr,
        "seed": run.seed,
        "dtype": run.execution.dtype,
        "data": run.data.data,
        "model": run.model,
    }
    writer = csv.DictWriter(stream, [*what, *rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**what, **row} for row in rows)
    write_atomically(out / f"{run.name}.csv", stream.getvalue())


def write_finished(out: Path, training: Training, command: list[str]) -> None:
    """The JSON with settings, results and environment; its being there says that the CSV is whole."""
    run = training.run
    content = {
        "settings": run.settings(),
        "diverged": training.diverged,
        **({} if training.results is None else {"results": training.results}),
        "environment": machine.describe(torch.device(run.execution.device), without_places(command)),
    }
    write_atomically(out / f"{run.name}.json", json.dumps(content, indent=1) + "\n")


def without_places(command: list[str]) -> list[str]:
    """The command without --out and with DIR for --data-dir: private paths say nothing about the figures."""
    shown = machine.without_out(command)
    for i, argument in enumerate(shown):
        if argument.startswith("--data-dir="):
            shown[i] = "--data-dir=DIR"
        elif i and shown[i - 1] == "--data-dir":
            shown[i] = "DIR"
    return shown


def is_finished(out: Path, run: Run) -> bool:
    """Whether the run is in the directory; UserError where one of that name has other settings."""
    path = out / f"{run.name}.json"
    if not path.exists() or not path.with_suffix(".csv").exists():
        return False
    refuse_differences(out, path, read_json(path)["settings"], run.settings())
    return True


def refuse_differences(out: Path, path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """UserError where a log in --out has other settings."""
    if different := differences(there, here):
        raise UserError(
            f"--out {out}: {path.name} was made with other settings ({', '.join(different)}); choose another directory."
        )


def read_json(path: Path) -> dict[str, Any]:
    """What write_finished() wrote; UserError where it is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file.") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise UserError(f"{path}: not a log of an experiment; delete it, and run again what it stands for.")
    return content


def differences(there: dict, here: dict, prefix: str = "") -> list[str]:
    """ "name: value there, value here" for each leaf that differs; ``here`` as JSON would bring it back."""
    found = []
    here = json.loads(json.dumps(here))
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} here")
    return found


def write_atomically(path: Path, text: str) -> None:
    """At any moment the file is the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot be written ({error.strerror or error}).") from None
    finally:
        temporary.unlink(missing_ok=True)
