# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

STEP_FACTOR = 0.1  # at each milestone
KINDS = ("constant", "step", "cosine")


@dataclass(frozen=True)
class Schedule:
    """kind: one of KINDS. epochs: of the whole training. milestones: epochs after which the rate falls tenfold.

    warmup: epochs at the start in which the rate rises linearly, from one step's share to the full one.
    """

    kind: str
    epochs: int
    milestones: tuple[int, ...] = ()
    warmup: int = 0

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the learning rate is multiplied by in ``step`` (from 0, over all epochs)."""
        warmup = self.warmup * steps_per_epoch
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "step":
            return STEP_FACTOR ** sum(step >= epoch * steps_per_epoch for epoch in self.milestones)
        if self.kind == "cosine":
            done = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
            return (1 + math.cos(math.pi * done)) / 2
        return 1.0

    def describe(self) -> dict[str, Any]:
        """For the log; the number of epochs is the recipe's."""
        return {"kind": self.kind, "milestones": list(self.milestones), "warmup": self.warmup}
