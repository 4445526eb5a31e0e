# SPDX-License-Identifier: Apache-2.0
"""Many trainings: those not finished yet, one after the other or several processes at a time."""

from __future__ import annotations

import multiprocessing
import queue
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from . import run_log
from .loop import Training, train
from .settings import Run
from .task import create

_POLL = 0.5  # seconds between two looks at what the processes report

# The data are read once per process.
create_task = lru_cache(maxsize=1)(create)


@dataclass(frozen=True)
class Plan:
    """out: where the logs go; threads: of each process, None leaves that to torch; command: for the log."""

    out: Path
    threads: int | None
    command: list[str]


def run_all(runs: list[Run], plan: Plan, workers: int) -> int:
    """Train all runs that are not finished, ``workers`` at a time; how many there were to train."""
    missing = [run for run in runs if not run_log.is_finished(plan.out, run)]
    if not missing:
        return 0
    workers = min(workers, len(missing))
    how = f"{workers} at a time, threads of each: {plan.threads or torch.get_num_threads()}"
    print(announcement(missing, len(runs), how, plan.out), flush=True)
    with progress_bar(missing, len(runs)) as bar:
        if workers == 1:
            for run in missing:
                train_one(run, plan, Progress(lambda report: show(bar, report)))
        else:
            _in_processes(missing, plan, workers, bar)
    return len(missing)


def steps(run: Run) -> int:
    """Number of steps of a training."""
    return run.recipe.epochs * len(create_task(run.task, run.data).batches(run.seed, 0, run.recipe.batch_size))


def announcement(missing: list[Run], total: int, how: str, out: Path) -> str:
    """What will be trained, in one line. ``how``: how many at a time, on how many threads."""
    first = missing[0]
    parameters = sum(p.numel() for p in create_task(first.task, first.data).build_model(first.model, 0).parameters())

    def each(values: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    return (
        f"Training {len(missing)} of {total} runs: {each(run.model for run in missing)} with {parameters:,} parameters "
        f"on {first.data.data}; methods {each(run.method.label for run in missing)}; "
        f"learning rates {each(f'{run.lr:g}' for run in missing)}; "
        f"seeds {each(run.seed for run in missing)}; {first.recipe.epochs} epochs, {steps(first)} steps each; "
        f"{how}, on {first.execution.device}. Logs go to {out}."
    )


def progress_bar(missing: list[Run], total: int, shown: bool = True) -> tqdm:
    """Of the steps of all runs."""
    # A log file wants a line now and then, not ten a second.
    interval = 0.1 if sys.stderr.isatty() else 30
    description = f"{len(missing)} of {total} runs"
    steps_in_all = len(missing) * steps(missing[0])
    how = {"unit": "step", "mininterval": interval, "smoothing": 0.05, "disable": not shown}
    return tqdm(total=steps_in_all, desc=description, **how)


def show(bar: tqdm, report: int | str) -> None:
    """A number of steps, or a sentence about a run."""
    if isinstance(report, int):
        bar.update(report)
    else:
        bar.set_postfix_str(report)


class Progress:
    """Of one training: reports its steps, a batch of them at a time, and after the first epoch how long it will take.

    report: takes what show() takes.
    """

    def __init__(self, report: Callable[[int | str], object], every: int = 1):
        self._report, self._every, self._steps, self._start = report, every, 0, time.perf_counter()

    def step(self) -> None:
        """After each step."""
        self._steps += 1
        if self._steps == self._every:
            self.flush()

    def flush(self) -> None:
        """Reports the steps that have not been reported."""
        self._report(self._steps)
        self._steps = 0

    def epoch(self, training: Training) -> None:
        """After each epoch; its time is that of the training, of the evaluation and, in the first, of the start."""
        epochs = training.run.recipe.epochs
        if len(training.rows) == 1:
            seconds = epochs * (time.perf_counter() - self._start)
            what = f"{training.run.method.label}, lr {training.run.lr:g}, seed {training.run.seed}"
            self._report(f"{what}: about {tqdm.format_interval(seconds)} for {epochs} epochs")


def train_one(run: Run, plan: Plan, progress: Progress, kind: type[Training] = Training) -> None:
    """Train and write the log: the CSV after each epoch, the JSON at the end."""
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)

    def after_epoch(training: Training) -> None:
        progress.epoch(training)
        run_log.write_epochs(plan.out, run, training.rows)

    training = train(run, create_task(run.task, run.data), progress.step, after_epoch, kind)
    progress.flush()
    run_log.write_finished(plan.out, training, plan.command)


def _in_processes(runs: list[Run], plan: Plan, workers: int, bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch's threads may hang
    reports = context.Queue()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_keep_queue, initargs=(reports,))
    with pool:
        futures = [pool.submit(_train_in_process, run, plan) for run in runs]
        try:
            pending = set(futures)
            while pending:
                _drain(reports, bar)
                done, pending = wait(pending, timeout=_POLL, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what the training raised
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        _drain(reports, bar)


def _drain(reports: multiprocessing.Queue, bar: tqdm) -> None:
    while True:
        try:
            show(bar, reports.get_nowait())
        except queue.Empty:
            return


_reports: multiprocessing.Queue | None = None  # of this process to its parent


def _keep_queue(reports: multiprocessing.Queue) -> None:
    global _reports
    _reports = reports


def _train_in_process(run: Run, plan: Plan) -> None:
    train_one(run, plan, Progress(_reports.put, every=50))
