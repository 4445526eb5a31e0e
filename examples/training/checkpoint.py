# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one file with every training (optimizer x seed) of a run, written atomically."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from .errors import UserError
from .loop import Settings, run_key

FORMAT = 1
# What zipfile and torch.load have been seen to raise on bytes that make no sense.
_DAMAGE = (
    AttributeError, EOFError, KeyError, NotImplementedError, RuntimeError, ValueError,
    pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_RUN_FIELDS = {"model": dict, "optimizer": dict, "history": list, "backend": str}


def check_target(path: str) -> None:
    """Say before hours of training, not after them, that ``--save`` cannot be written."""
    target = Path(path)
    if target.is_dir():
        raise UserError(f"--save {path}: is a directory; name a file.")
    if not target.parent.is_dir():
        raise UserError(f"--save {path}: the directory {target.parent} does not exist; create it first.")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--save {path}: the directory {target.parent} is not writable; choose another one.")


def save(path: str, settings: Settings, runs: dict[str, dict]) -> None:
    """Write the checkpoint; at any moment ``path`` holds the old one or the new one, never a part."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    content = io.BytesIO()  # torch.save to a file that cannot grow says nothing of a full disk
    torch.save({"format": FORMAT, "settings": asdict(settings), "runs": runs}, content)
    try:
        with temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"--save {path}: cannot be written ({error.strerror or error}); free some space or choose another place."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str, settings: Settings, epochs: int) -> dict[str, dict]:
    """The trainings in a checkpoint (run_key -> Trainer.state_dict()), tensors on the CPU.

    Raises UserError when the file is missing, damaged, of another format, made with other settings, or
    already beyond ``epochs``.
    """
    content = _read(path)
    if not (isinstance(content, dict) and "format" in content and isinstance(content.get("settings"), dict)):
        raise UserError(f"--resume {path}: not a checkpoint of this program; name a file that --save wrote.")
    if content["format"] != FORMAT:
        raise UserError(
            f"--resume {path}: checkpoint format {content['format']}, this program reads {FORMAT}; "
            "start afresh without --resume."
        )
    # Earlier versions did not record the number of threads.
    _compare(path, {"threads": settings.threads} | content["settings"], asdict(settings))
    runs = content.get("runs")
    _check_runs(path, runs, settings)
    done = max((len(run["history"]) for run in runs.values()), default=0)
    if done > epochs:
        raise UserError(
            f"--resume {path}: already has {done} epochs, --epochs asks for {epochs} in all; "
            f"give --epochs {done} or more."
        )
    return runs


def _read(path: str) -> object:
    damaged = f"--resume {path}: damaged, cut short or no checkpoint at all"
    advice = "name a file that --save wrote, or start afresh without --resume."
    try:
        with zipfile.ZipFile(path) as archive:  # a torch checkpoint is a zip file; torch.load checks no CRC
            broken = archive.testzip()
        if broken is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--resume {path}: no such file; {advice}") from None
    except OSError as error:
        raise UserError(f"--resume {path}: cannot be read ({error.strerror or error}); check the file.") from None
    except _DAMAGE as error:
        raise UserError(f"{damaged} ({type(error).__name__}); {advice}") from None
    raise UserError(f"{damaged} (checksum of {broken}); {advice}")


def _compare(path: str, saved: dict, wanted: dict) -> None:
    # As lists, so that it does not matter whether a tuple comes back from the file as a tuple.
    differences = [
        f"--{name.replace('_', '-')} {_show(saved.get(name))} there and {_show(value)} here"
        for name, value in wanted.items()
        if _show(saved.get(name)) != _show(value)
    ]
    if differences:
        raise UserError(
            f"--resume {path}: contradicts this run: {', '.join(differences)}; "
            "give the settings of the checkpoint, or start afresh without --resume."
        )


def _show(value: object) -> str:
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)


def _check_runs(path: str, runs: object, settings: Settings) -> None:
    expected = {run_key(name, seed) for name in settings.optimizers for seed in range(settings.seeds)}
    whole = (
        isinstance(runs, dict)
        and runs.keys() <= expected
        and all(
            isinstance(run, dict) and all(isinstance(run.get(field), kind) for field, kind in _RUN_FIELDS.items())
            for run in runs.values()
        )
    )
    if not whole:
        raise UserError(f"--resume {path}: its trainings are incomplete; name a file that --save wrote.")
