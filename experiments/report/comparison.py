# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison of methods: table, summary.csv, learning curves, and the metric over the learning rate.

Where exchanges of gradients are compared, the metric over their bytes, too.
"""

from __future__ import annotations

from pathlib import Path

from experiments import run_log

from . import table as tables
from .logs import Experiment
from .summary import Summary

VARIED = ("method", "calibration", "dtype", "lr", "seed")


def table(experiment: Experiment) -> str:
    """As Markdown."""
    return tables.markdown(Summary(experiment))


def write(experiment: Experiment, out: Path) -> list[str]:
    """All but the table; the names of the files."""
    from . import figures  # here, since it needs matplotlib, which the table does not

    summary = Summary(experiment)
    run_log.write_atomically(out / "summary.csv", tables.summary_csv(summary))
    figures.draw_curves(summary, out / "curves.png")
    figures.draw_lr(summary, out / "lr.png")
    if not summary.exchanged:
        return ["summary.csv", "curves.png", "lr.png"]
    figures.draw_bytes(summary, out / "bytes.png")
    return ["summary.csv", "curves.png", "lr.png", "bytes.png"]
