# SPDX-License-Identifier: Apache-2.0
"""One training: a row of figures per epoch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from examples.training.errors import UserError
from examples.training.loop import DENSITY_EVERY
from examples.training.loop import deterministic as deterministic_algorithms

from .models.batch_norm import keep_float32_statistics
from .settings import Run
from .tasks import Task

Row = dict[str, Any]


class Training:
    """A network, its optimizer and the rows of the epochs done.

    rows: one dict per epoch: epoch (from 1), train_loss (mean over the epoch's images, in training mode), each
    metric of each split as SPLIT_METRIC, density (DensitySample.share(), mean over every tenth step), seconds
    (of training, without the evaluation).
    diverged: whether a parameter is no longer finite; there is no point in going on then.
    """

    def __init__(self, run: Run, task: Task):
        self.run = run
        self.device = torch.device(run.execution.device)
        self.dtype = getattr(torch, run.execution.dtype)
        self.task = task.to(self.device, self.dtype, run.execution.channels_last)
        torch.manual_seed(run.seed)  # for dropout
        self.model = self._build_model()
        recipe = run.recipe
        self.optimizer = run.method.optimizer(
            self.model,
            run.lr,
            run.seed,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        scales = run.execution.amp and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self.rows: list[Row] = []
        self.diverged = False

    def _build_model(self) -> nn.Module:
        run = self.run
        model = self.task.build_model(run.model, run.seed)
        memory_format = torch.channels_last if run.execution.channels_last else torch.preserve_format
        model = model.to(device=self.device, dtype=self.dtype, memory_format=memory_format)
        model = keep_float32_statistics(model)
        run.method.calibrate(model, run.seed)
        if run.execution.compile:
            model.compile()
        return model

    def train_epoch(self, after_step: Callable[[], object]) -> None:
        """Train one epoch and append its row."""
        epoch = len(self.rows)
        batches = self.task.batches(self.run.seed, epoch, self.run.recipe.batch_size)
        self.model.train()
        # float64 lest the sum over an epoch rounds away what a batch adds
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        examples, densities = 0, []
        start = time.perf_counter()
        for i, (inputs, targets) in enumerate(batches):
            set_lr(
                self.optimizer, self.run.lr * self.run.recipe.schedule.factor(epoch * len(batches) + i, len(batches))
            )
            # Never step 0: the very first of a training is exact SGD, all coordinates move.
            sampled = i % DENSITY_EVERY == DENSITY_EVERY - 1 or i == len(batches) - 1
            loss, density = self._step(inputs, targets, sampled)
            loss_sum += loss * len(inputs)
            examples += len(inputs)
            if sampled:
                densities.append(density)
            after_step()
        train_loss = loss_sum.item() / examples  # waits for the device
        seconds = time.perf_counter() - start
        self.diverged = not all(bool(p.isfinite().all()) for p in self.model.parameters())
        self.rows.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                **self._evaluate(),
                "density": statistics.fmean(densities),
                "seconds": seconds,
            }
        )

    def _step(self, inputs: torch.Tensor, targets: Any, sampled: bool) -> tuple[torch.Tensor, float | None]:
        """The loss before the step, and if sampled its density."""
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self.task.loss(self.model, inputs, targets)
        self.scaler.scale(loss).backward()
        sample = self.run.method.density_sample(self.model, self.optimizer) if sampled else None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), sample.share() if sample else None

    def _evaluate(self) -> dict[str, float]:
        with self._autocast():
            return {
                f"{split}_{metric}": value
                for split in self.task.splits
                for metric, value in self.task.evaluate(self.model, split).items()
            }

    def _autocast(self):
        if not self.run.execution.amp:
            return nullcontext()
        return torch.autocast(self.device.type, torch.float16 if self.device.type == "cuda" else torch.bfloat16)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """In all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(
    run: Run,
    task: Task,
    after_step: Callable[[], object],
    after_epoch: Callable[[Training], object],
    kind: type[Training] = Training,
) -> Training:
    """The whole training, but not beyond an epoch in which it diverged."""
    try:
        with _algorithms(run.execution.deterministic, torch.device(run.execution.device)):
            training = kind(run, task)
            while len(training.rows) < run.recipe.epochs and not training.diverged:
                training.train_epoch(after_step)
                after_epoch(training)
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(f"--deterministic: {str(error).split(', but')[0]}; give --no-deterministic.") from None
    return training


@contextmanager
def _algorithms(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Inside, torch takes deterministic algorithms only, or else whichever cuDNN finds to be the fastest."""
    if deterministic:
        if device.type == "cuda":
            # cuBLAS is deterministic only with a workspace of its own; read when its handle is made.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with deterministic_algorithms():
            yield
        return
    # Not by assignment, which torch forbids to a process that has frozen its flags.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
        yield
