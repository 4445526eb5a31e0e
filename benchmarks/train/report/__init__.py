# SPDX-License-Identifier: Apache-2.0
"""From the logs of ``run`` to tables and plots."""

from __future__ import annotations

from pathlib import Path

from examples.training.errors import UserError

from .. import run_log
from . import logs, table
from .summary import Summary


def write(directories: list[str], out: str) -> str:
    """Reads the logs in the directories, writes table.md, summary.csv, curves.png and lr.png; the table's text."""
    if Path(out).resolve() in (Path(directory).resolve() for directory in directories):
        raise UserError(f"--out {out}: holds the logs; choose a directory of its own for the report.")
    summary = Summary(logs.read(directories))
    target = run_log.prepare(out)
    text = table.markdown(summary)
    run_log.write_atomically(target / "table.md", text)
    run_log.write_atomically(target / "summary.csv", table.summary_csv(summary))
    from . import figures  # here, since it needs matplotlib, which nothing else does

    figures.draw_curves(summary, target / "curves.png")
    figures.draw_lr(summary, target / "lr.png")
    return text
