# SPDX-License-Identifier: Apache-2.0
"""What determines the result of one training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .methods import Method
from .schedule import Schedule
from .task import DataOptions


@dataclass(frozen=True)
class Recipe:
    """The training but for method, learning rate and seed; weight decay and Nesterov as in torch.optim.SGD."""

    epochs: int
    batch_size: int
    schedule: Schedule
    momentum: float
    weight_decay: float
    nesterov: bool


@dataclass(frozen=True)
class Execution:
    """Where and in which numbers.

    device: "cpu", "cuda" or "cuda:N".
    dtype: of parameters, gradients and momentum; there is no float32 copy beside them.
    amp: autocast, to float16 with loss scaling on CUDA and to bfloat16 elsewhere.
    """

    device: str = "cpu"
    dtype: str = "float32"
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = True


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    data: DataOptions
    model: str
    recipe: Recipe
    execution: Execution
    method: Method
    lr: float
    seed: int
    about: dict[str, Any] = field(compare=False, hash=False)  # Task.about()

    @property
    def name(self) -> str:
        """Of its files: tells the runs of one grid apart, and says what they are."""
        parts = [self.data.data, self.model.replace(":", "-").replace("/", "-"), self.method.label]
        return "_".join([*parts, f"lr{self.lr:g}", self.execution.dtype, f"seed{self.seed}"])

    def settings(self) -> dict[str, Any]:
        """Everything that two runs must agree on to be the same; JSON values.

        The data are told by their content, not by where they lie, and not by how they are read.
        """
        reading = ("directory", "loaders", "skip_unreadable")
        data = {key: value for key, value in asdict(self.data).items() if key not in reading}
        if data["shrink"] == 1:
            del data["shrink"]  # as in logs of the time before there was this option
        return {
            "task": self.task,
            "data": data,
            "about": self.about,
            "model": self.model,
            "recipe": asdict(self.recipe) | {"schedule": self.recipe.schedule.describe()},
            "execution": asdict(self.execution) | {"device": self.execution.device.partition(":")[0]},
            **self.method.settings(),
            "lr": self.lr,
            "seed": self.seed,
        }
