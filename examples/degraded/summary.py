# SPDX-License-Identifier: Apache-2.0
"""Means over the seeds of a comparison's trials, and the gains over the baseline that lacks the parameter."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks.train.report.summary import Spread

from .log import Log

Result = dict[str, Any]  # an entry of Log.results
Variant = tuple[str, str]  # (optimizer, injection)


class Summary:
    """Trials that share all but optimizer, injection and seed; accuracies and gains are in per cent and points.

    trials: by variant, ordered by seed.
    """

    def __init__(self, logs: list[Log]):
        found: dict[Variant, list[Log]] = defaultdict(list)
        for log in logs:
            found[log.variant].append(log)
        self.trials = {v: sorted(found[v], key=lambda log: log.settings["seed"]) for v in sorted(found)}
        self.common = logs[0].common
        self.conditions = logs[0].results

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
        return Spread.of([_mean(log, regime, chosen) for log in self.trials[variant]])

    def gain(self, variant: Variant, regime: str, chosen: Callable[[Result], bool]) -> tuple[float, float]:
        """Of the regime over "absent", paired by seed: mean and standard error (NaN for one seed)."""
        return _paired([_mean(log, regime, chosen) - _mean(log, "absent", chosen) for log in self.trials[variant]])

    def loss_difference(self, variant: Variant) -> tuple[float, float]:
        """Of the mean training loss of the last epoch, known less absent: as gain(), in nats per image."""
        rows = [log.epochs[-1] for log in self.trials[variant]]
        return _paired([row["known_loss"] - row["absent_loss"] for row in rows])

    def error(self, variant: Variant, of: str, chosen: Callable[[Result], bool]) -> float:
        """Mean of "estimation_error" or "probe_error" over seeds, chosen conditions and elements of the vector."""
        results = [result for log in self.trials[variant] for result in log.results if chosen(result)]
        return statistics.fmean(error for result in results for error in result[of])


def _paired(differences: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    spread = Spread.of(differences)
    return spread.mean, spread.std / math.sqrt(spread.count)


def _mean(log: Log, regime: str, chosen: Callable[[Result], bool]) -> float:
    return 100 * statistics.fmean(result["accuracy"][regime] for result in log.results if chosen(result))
