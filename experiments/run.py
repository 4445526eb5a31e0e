# SPDX-License-Identifier: Apache-2.0
"""What every experiment does: train what is not finished, then report on all that is."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import cli, grid, report, run_log
from .settings import Run


def train_and_report(runs: list[Run], args: argparse.Namespace, command: list[str]) -> None:
    """Trains the runs that are not finished in --out, ``workers`` at a time, and reports."""
    out = run_log.prepare(args.out)
    report.check_alike(out, runs)
    plan = grid.Plan(out, cli.threads(args), command)
    finish(grid.run_all(runs, plan, cli.workers(args)), len(runs), out)


def finish(trained: int, total: int, out: Path) -> None:
    """Says how many runs were trained, and reports on all logs in ``out``."""
    print(f"{trained} runs trained, {total - trained} were finished before; logs in {out}")
    report.write([str(out)], str(out / "report"))
