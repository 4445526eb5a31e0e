# SPDX-License-Identifier: Apache-2.0
"""From the logs of an experiment to tables and plots, which differ from task to task."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from experiments import run_log
from experiments.settings import Run
from tools.program import UserError

from . import logs
from .logs import Experiment

# Task: the module that writes its report, with VARIED, the settings in which the runs of a report may differ,
# table(experiment), as Markdown, and write(experiment, directory), which writes the rest and names the files.
_REPORTS = {
    "classification": "experiments.report.comparison",
    "detection": "experiments.report.comparison",
    "degraded": "experiments.degraded.report",
    "pruning": "experiments.pruning.report",
    "gclayer": "experiments.gclayer.report",
}


def write(directories: list[str], out: str, methods: list[str] | None = None, dtypes: list[str] | None = None) -> None:
    """Reads the logs in the directories, writes the report, and prints its table, even where a plot fails.

    methods, dtypes: leave out all others, but for SGD in float32, with which they are compared; None: none.
    """
    if Path(out).resolve() in (Path(directory).resolve() for directory in directories):
        raise UserError(f"--out {out}: holds the logs; choose a directory of its own for the report.")
    runs = logs.read(directories)
    report = _report(runs[0].settings["task"])
    experiment = Experiment.of(_chosen(runs, methods, dtypes), report.VARIED)
    target = run_log.prepare(out)
    text = report.table(experiment)
    try:
        run_log.write_atomically(target / "table.md", text)
        written = report.write(experiment, target)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}).") from None
    finally:
        print(text)
    print(f"Written to {out}: {', '.join(['table.md', *written])}")


def check_alike(out: Path, runs: list[Run]) -> None:
    """UserError where --out has logs of another experiment than these runs, which no report could have together."""
    varied = _report(runs[0].task).VARIED
    here = logs.common(runs[0].settings(), varied)
    for path in logs.finished(out):
        run_log.refuse_differences(out, path, logs.common(run_log.read_json(path)["settings"], varied), here)


def _report(task: str):
    if task not in _REPORTS:
        raise UserError(f"the logs are of a task {task!r}, of which this program has no report.")
    return import_module(_REPORTS[task])


def _chosen(runs: list[logs.RunLog], methods: list[str] | None, dtypes: list[str] | None) -> list[logs.RunLog]:
    for option, wanted, there in (
        ("--methods", methods, {run.method for run in runs}), ("--dtypes", dtypes, {run.dtype for run in runs}),
    ):  # fmt: skip
        if unknown := set(wanted or []) - there:
            raise UserError(f"{option} {min(unknown)}: no run has it; there are {', '.join(sorted(there))}.")
    chosen = [
        run
        for run in runs
        if (run.method, run.dtype) == ("sgd", "float32")
        or ((methods is None or run.method in methods) and (dtypes is None or run.dtype in dtypes))
    ]
    if not chosen:
        known = sorted({f"{run.method} in {run.dtype}" for run in runs})
        raise UserError(f"--methods, --dtypes: no run is left; there are {', '.join(known)}.")
    return chosen


__all__ = ["Experiment", "check_alike", "write"]
