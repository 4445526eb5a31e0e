# SPDX-License-Identifier: Apache-2.0
"""Means over the seeds of a comparison's trials, and the gains over the baseline that lacks the parameter."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from experiments.report.logs import Experiment, RunLog
from experiments.report.summary import Spread

Result = dict[str, Any]  # of a condition
Variant = tuple[str, str]  # (method, injection)


class Summary:
    """Runs that agree in all but method, injection and seed; accuracies and gains are in per cent and points.

    runs: by variant, ordered by seed.
    """

    def __init__(self, experiment: Experiment):
        found: dict[Variant, list[RunLog]] = defaultdict(list)
        for run in experiment.runs:
            found[run.method, run.settings["model"]].append(run)
        self.runs = {v: sorted(found[v], key=lambda run: run.seed) for v in sorted(found)}
        self.common, self.environment = experiment.common, experiment.environment()
        self.conditions: list[Result] = experiment.runs[0].results["conditions"]

    @property
    def kinds(self) -> list[str]:
        """What the conditions are of, without "clean"."""
        return list(dict.fromkeys(c["kind"] for c in self.conditions if c["kind"] != "clean"))

    @property
    def strengths(self) -> list[float]:
        """Ascending, without 0."""
        return sorted({c["strength"] for c in self.conditions} - {0.0})

    def accuracy(self, variant: Variant, regime: str, chosen: Callable[[Result], bool]) -> Spread:
        """Mean over the chosen conditions; its standard deviation is over the seeds."""
        return Spread.of([_mean(run, regime, chosen) for run in self.runs[variant]])

    def gain(self, variant: Variant, regime: str, chosen: Callable[[Result], bool]) -> tuple[float, float]:
        """Of the regime over "absent", paired by seed: mean and standard error (NaN for one seed)."""
        gains = [_mean(run, regime, chosen) - _mean(run, "absent", chosen) for run in self.runs[variant]]
        return Spread.of(gains).mean_and_error()

    def loss_difference(self, variant: Variant) -> tuple[float, float]:
        """Of the mean training loss of the last epoch, known less absent: as gain(), in nats per image."""
        rows = [run.epochs[-1] for run in self.runs[variant]]
        return Spread.of([row["train_known_loss"] - row["train_absent_loss"] for row in rows]).mean_and_error()

    def error(self, variant: Variant, of: str, chosen: Callable[[Result], bool]) -> float:
        """Mean of "estimation_error" or "probe_error" over seeds, chosen conditions and elements of the vector."""
        results = [result for run in self.runs[variant] for result in run.results["conditions"] if chosen(result)]
        return statistics.fmean(error for result in results for error in result[of])


def _mean(run: RunLog, regime: str, chosen: Callable[[Result], bool]) -> float:
    return 100 * statistics.fmean(result["accuracy"][regime] for result in run.results["conditions"] if chosen(result))
