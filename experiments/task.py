# SPDX-License-Identifier: Apache-2.0
"""What the training loop needs of a task: networks, batches, a loss and figures of merit; and the tasks by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Name: (module, class in it); the module is imported when the task is made.
TASKS = {
    "classification": ("experiments.classification.task", "Classifier"),
    "detection": ("experiments.detection.task", "Detection"),
    "degraded": ("experiments.degraded.task", "Degraded"),
    "pruning": ("experiments.pruning.task", "Pruning"),
    "gclayer": ("experiments.gclayer.task", "FilterComparison"),
}


def create(task: str, options: DataOptions) -> Task:
    """The task ``task`` on the data of ``options``; UserError where these do not work."""
    module, name = TASKS[task]
    return getattr(import_module(module), name).create(options)


class Batches(Sized, Iterable[tuple[Tensor, Any]], Protocol):
    """The batches of one epoch, as (inputs, targets); len() is their number."""


@dataclass(frozen=True)
class DataOptions:
    """Which data a task is made from; each as on the command line. A task may have a subclass with more.

    data: name of the data set, for example "fashion-mnist".
    directory: where its files lie, None for data that need none.
    limit: use the first ``limit`` training images only, None for all.
    holdout: the last ``holdout`` of all training images become the validation set and are not trained on.
    augment: vary the training images at random (what that means is up to the data set).
    loaders: processes that read images, for data sets that do not fit into memory; 0: none.
    shrink: the mean of each square of so many pixels a side takes its place; 1 leaves images as they are.
    skip_unreadable: image files that cannot be read are left out; otherwise they are an error.
    """

    data: str
    directory: str | None = None
    limit: int | None = None
    holdout: int = 0
    augment: bool = False
    loaders: int = 0
    skip_unreadable: bool = False
    shrink: int = 1


class Task(ABC):
    """Data with their loss and metrics. Made on the CPU for float32; ``to`` moves it.

    metrics: keys of what evaluate() returns. The first is the headline: a share of 0 to 1, higher is better;
        one whose name ends in "loss" is in its own unit.
    splits: what evaluate() takes after each epoch: ("test",), or ("validation", "test") where images are held out.
    """

    metrics: tuple[str, ...]
    splits: tuple[str, ...] = ("test",)
    device = torch.device("cpu")
    dtype = torch.float32
    memory_format = torch.contiguous_format

    @classmethod
    @abstractmethod
    def create(cls, options: DataOptions) -> Task:
        """The task on the data of ``options``; UserError where these are missing, damaged or do not fit."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the data are, for the log: numbers of images, sizes, checksum, ...; JSON values."""

    @abstractmethod
    def build_model(self, name: str, seed: int) -> nn.Module:
        """The network ``name`` in float32 on the CPU, initialised by ``seed`` alone; UserError if there is none."""

    @abstractmethod
    def batches(self, seed: int, epoch: int, batch_size: int) -> Batches:
        """The training batches of an epoch (from 0) on the task's device: a function of the arguments alone.

        The inputs are as cast() takes them.
        """

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Tensor, targets: Any) -> Tensor | dict[str, Tensor]:
        """Mean loss of a batch, float32 without dimensions; ``inputs`` come from cast().

        Or several by name, whose sum is what the training minimises.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        """The metrics on a split, in the order of ``metrics``. Calls model.eval() and cast() itself."""

    def final(self, model: nn.Module, name: str, seed: int) -> Any:
        """What is measured once, after the last epoch; JSON values, None for nothing. name: as for build_model()."""
        return None

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Task:
        """This task, with its data on ``device`` and inputs cast to ``dtype`` and memory format.

        A subclass moves its tensors and calls this one.
        """
        self.device, self.dtype = device, dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return self

    def cast(self, inputs: Tensor) -> Tensor:
        """A batch of inputs [B, C, H, W] as the network takes it: in the task's dtype and memory format."""
        return inputs.to(dtype=self.dtype, memory_format=self.memory_format)
