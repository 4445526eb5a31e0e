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
from torch import Tensor, nn
from torch.optim import Optimizer

from tools.program import UserError

from .models.batch_norm import keep_float32_statistics
from .settings import Run
from .task import Task

DENSITY_EVERY = 10  # steps: reading the density makes the CPU wait for the GPU

Row = dict[str, Any]


class Training:
    """A network, its optimizers and the rows of the epochs done.

    rows: one dict per epoch: epoch (from 1), train_loss (mean over the epoch's images, in training mode; where the task
    has several losses, their sum, and train_NAME_loss for each), each metric of each split as SPLIT_METRIC, density
    (DensitySample.share(), mean over every tenth step), seconds (of training, without the evaluation).
    diverged: whether a parameter is no longer finite; there is no point in going on then.
    results: of Task.final(), after the last epoch.
    """

    def __init__(self, run: Run, task: Task):
        self.run = run
        self.device = torch.device(run.execution.device)
        self.dtype = getattr(torch, run.execution.dtype)
        self.task = task.to(self.device, self.dtype, run.execution.channels_last)
        torch.manual_seed(run.seed)  # for dropout
        self.model = self._build_model()
        self.optimizers = self._make_optimizers()
        scales = run.execution.amp and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self.rows: list[Row] = []
        self.diverged = False
        self.results: Any = None

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.run.recipe.epochs * len(self.task.batches(self.run.seed, 0, self.run.recipe.batch_size))

    def _build_model(self) -> nn.Module:
        run = self.run
        model = self.task.build_model(run.method.network(run.model), run.seed)
        memory_format = torch.channels_last if run.execution.channels_last else torch.preserve_format
        model = model.to(device=self.device, dtype=self.dtype, memory_format=memory_format)
        model = keep_float32_statistics(model)
        run.method.calibrate(model, run.seed)
        if run.execution.compile:
            model.compile()
        return model

    def _make_optimizers(self) -> list[Optimizer]:
        run, recipe = self.run, self.run.recipe
        return run.method.optimizers(
            self.model,
            run.lr,
            run.seed,
            self.steps,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )

    def train_epoch(self, after_step: Callable[[], object]) -> None:
        """Train one epoch and append its row."""
        epoch, recipe = len(self.rows), self.run.recipe
        batches = self.task.batches(self.run.seed, epoch, recipe.batch_size)
        self.model.train()
        sums: dict[str, Tensor] = {}
        examples, densities = 0, []
        start = time.perf_counter()
        for i, (inputs, targets) in enumerate(batches):
            step = epoch * len(batches) + i
            if self.run.method.before_step(self.model, step, recipe.epochs * len(batches)):
                self.optimizers = self._make_optimizers()  # without momentum
            for optimizer in self.optimizers:
                set_lr(optimizer, self.run.lr * recipe.schedule.factor(step, len(batches)))
            # Never step 0: the very first of a training is exact SGD, all coordinates move.
            sampled = i % DENSITY_EVERY == DENSITY_EVERY - 1 or i == len(batches) - 1
            losses, density = self._step(inputs, targets, sampled)
            for name, loss in losses.items():
                # float64 lest the sum over an epoch rounds away what a batch adds
                sums[name] = sums.get(name, 0) + (loss * len(inputs)).double()
            examples += len(inputs)
            if sampled:
                densities.append(density)
            after_step()
        losses = {name: total.item() / examples for name, total in sums.items()}  # waits for the device
        seconds = time.perf_counter() - start
        self.diverged = not all(bool(p.isfinite().all()) for p in self.model.parameters())
        self.rows.append(
            {
                "epoch": epoch + 1,
                "train_loss": sum(losses.values()),
                **({f"train_{name}_loss": loss for name, loss in losses.items()} if len(losses) > 1 else {}),
                **self._evaluate(),
                "density": statistics.fmean(densities),
                "seconds": seconds,
            }
        )

    def _step(self, inputs: Tensor, targets: Any, sampled: bool) -> tuple[dict[str, Tensor], float | None]:
        """The losses before the step, and if sampled its density."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self._autocast():
            loss = self.task.loss(self.model, inputs, targets)
        losses = loss if isinstance(loss, dict) else {"loss": loss}
        first, *others = losses.values()
        self.scaler.scale(sum(others, first)).backward()
        sample = self.run.method.density_sample(self.model, self.optimizers) if sampled else None
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return {name: part.detach() for name, part in losses.items()}, sample.share() if sample else None

    def _evaluate(self) -> dict[str, float]:
        with self._autocast():
            return {
                f"{split}_{metric}": value
                for split in self.task.splits
                for metric, value in self.task.evaluate(self.model, split).items()
            }

    def finish(self) -> None:
        """After the last epoch: what is measured once."""
        self.run.method.after_training(self.model)
        with self._autocast():
            self.results = self.task.final(self.model, self.run.model, self.run.seed)

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
            training.finish()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(f"--deterministic: {str(error).split(', but')[0]}; give --no-deterministic.") from None
    return training


@contextmanager
def _algorithms(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Inside, torch takes deterministic algorithms only, or else whichever cuDNN finds to be the fastest."""
    if not deterministic:
        # Not by assignment, which torch forbids to a process that has frozen its flags.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
            yield
        return
    if device.type == "cuda":
        # cuBLAS is deterministic only with a workspace of its own; read when its handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would only cost time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
