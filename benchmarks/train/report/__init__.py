# SPDX-License-Identifier: Apache-2.0
"""From the logs of ``run`` to tables and plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from examples.training.errors import UserError
from examples.training.report import prepare

from .. import run_log
from . import logs, table
from .logs import Experiment
from .summary import Summary


def write(directories: list[str], out: str, methods: list[str] | None = None, dtypes: list[str] | None = None) -> str:
    """Reads the logs in the directories, writes table.md, summary.csv, curves.png and lr.png; the table's text.

    methods, dtypes: leave out all others, but for SGD in float32, with which they are compared; None: none.
    """
    if Path(out).resolve() in (Path(directory).resolve() for directory in directories):
        raise UserError(f"--out {out}: holds the logs; choose a directory of its own for the report.")
    summary = Summary(_chosen(logs.read(directories), methods, dtypes))
    target = prepare(out)
    text = table.markdown(summary)
    run_log.write_atomically(target / "table.md", text)
    run_log.write_atomically(target / "summary.csv", table.summary_csv(summary))
    from . import figures  # here, since it needs matplotlib, which nothing else does

    figures.draw_curves(summary, target / "curves.png")
    figures.draw_lr(summary, target / "lr.png")
    return text


def _chosen(experiment: Experiment, methods: list[str] | None, dtypes: list[str] | None) -> Experiment:
    runs = [
        run
        for run in experiment.runs
        if (run.method, run.dtype) == ("sgd", "float32")
        or ((methods is None or run.method in methods) and (dtypes is None or run.dtype in dtypes))
    ]
    if not runs:
        known = sorted({f"{run.method} in {run.dtype}" for run in experiment.runs})
        raise UserError(f"--methods, --dtypes: no run is left; there are {', '.join(known)}.")
    return replace(experiment, runs=runs)
