# SPDX-License-Identifier: Apache-2.0
"""The figures of a run as a Markdown table, a CSV file of the curves and a JSON file with everything."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .data import Dataset
from .errors import UserError
from .loop import Settings, run_key

CURVES = ("lr", "train_loss", "test_loss", "test_accuracy", "density", "ms_per_step")
LABEL = {"csgd": "CSGD", "sgd": "torch.optim.SGD"}


@dataclass(frozen=True)
class Results:
    """A finished run: settings, data, elements per parameter by name, run_key -> Trainer.state_dict()."""

    settings: Settings
    data: Dataset
    sizes: dict[str, int]
    runs: dict[str, dict]

    def histories(self, name: str) -> list[list[dict]]:
        """One history per seed for an optimizer."""
        return [self.runs[run_key(name, seed)]["history"] for seed in range(self.settings.seeds)]

    def density(self, epoch: dict) -> float:
        """Share of all coordinates that moved per step in an epoch of a history."""
        sizes = self.sizes.values()
        return sum(share * size for share, size in zip(epoch["density"], sizes, strict=True)) / sum(sizes)

    def curve(self, name: str, key: str) -> list[list[float]]:
        """One list over the epochs per seed; the key is one of CURVES."""
        pick = self.density if key == "density" else lambda epoch: epoch[key]
        return [[pick(epoch) for epoch in history] for history in self.histories(name)]

    @property
    def epochs(self) -> int:
        """Number of epochs, the same in every training."""
        return len(next(iter(self.runs.values()))["history"])


def describe(results: Results) -> list[str]:
    """What was run, in two lines."""
    s, d = results.settings, results.data
    height, width = d.train_images.shape[1:]
    schedule = f", lr / 10 after every {count(s.lr_step, 'epoch')}" if s.lr_step else ""
    what = (
        f"{d.name}, {len(d.train_labels)} training and {len(d.test_labels)} test images of "
        f"{height} x {width} pixels; "
        f"CNN with {sum(results.sizes.values()):,} parameters in {s.dtype} on {s.device} "
        f"with {count(s.threads, 'thread')}"
    )
    how = (
        f"{count(results.epochs, 'epoch')}, {count(s.seeds, 'seed')}, batch size {s.batch_size}, "
        f"lr {s.lr:g}{schedule}, momentum {s.momentum:g}, weight decay {s.weight_decay:g}, "
        f"calibration c = {s.calibration:g}"
    )
    return [what, how]


def table(results: Results) -> str:
    """Markdown: accuracy and losses after the last epoch, density and step time over the whole training."""
    head = [
        "optimizer",
        "test accuracy, %",
        "test loss",
        "training loss",
        "density, %",
        "ms per step",
        "backend",
    ]
    rows = [head]
    for name in results.settings.optimizers:
        last = {key: [curve[-1] for curve in results.curve(name, key)] for key in CURVES}
        density = [statistics.fmean(curve) for curve in results.curve(name, "density")]
        ms = [statistics.median(curve) for curve in results.curve(name, "ms_per_step")]
        rows.append(
            [
                LABEL[name],
                _spread([100 * x for x in last["test_accuracy"]], 2),
                _spread(last["test_loss"], 4),
                _spread(last["train_loss"], 4),
                _spread([100 * x for x in density], 1),
                _spread(ms, 3),
                results.runs[run_key(name, 0)]["backend"],
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def verdict(results: Results) -> str | None:
    """One sentence that compares CSGD with SGD; None unless both ran."""
    if not {"csgd", "sgd"} <= set(results.settings.optimizers):
        return None
    csgd, sgd = (
        statistics.fmean(curve[-1] for curve in results.curve(name, "test_accuracy")) for name in ("csgd", "sgd")
    )
    density = statistics.fmean(statistics.fmean(curve) for curve in results.curve("csgd", "density"))
    return (
        f"CSGD moves {density:.1%} of the coordinates per step; its mean test accuracy differs by "
        f"{100 * (csgd - sgd):+.2f} points from that of SGD."
    )


def prepare(directory: str) -> Path:
    """The output directory, created if need be; UserError if that fails."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {directory}: cannot be created ({error.strerror}); choose another place.") from None
    return path


def markdown(results: Results) -> str:
    """The table with what was run above it and how to read it below it."""
    seeds = results.settings.seeds
    note = (
        "Density: share of coordinates that moved per step (for torch.optim.SGD: whose bits changed), mean over the "
        "training. Time: median of optimizer.step() alone."
    )
    if seeds > 1:
        note = f"Mean ± standard deviation over {seeds} seeds. {note}"
    parts = ["  \n".join(describe(results)), table(results), verdict(results), note]
    return "\n\n".join(part for part in parts if part) + "\n"


def curves_csv(results: Results) -> str:
    """One line per optimizer, seed and epoch."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["optimizer", "seed", "epoch", *CURVES])
    for name in results.settings.optimizers:
        curves = [results.curve(name, key) for key in CURVES]
        for seed in range(results.settings.seeds):
            for epoch in range(results.epochs):
                writer.writerow([name, seed, epoch + 1, *(curve[seed][epoch] for curve in curves)])
    return stream.getvalue()


def full_json(results: Results) -> str:
    """Settings, versions, parameters and every epoch with its density per parameter."""
    content = {
        "settings": asdict(results.settings),
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "parameters": results.sizes,
        "runs": [
            {"optimizer": name, "seed": seed, "backend": run["backend"], "epochs": run["history"]}
            for name in results.settings.optimizers
            for seed in range(results.settings.seeds)
            for run in [results.runs[run_key(name, seed)]]
        ],
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """The same value with None for NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(number: int, noun: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean
