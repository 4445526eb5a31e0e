# SPDX-License-Identifier: Apache-2.0
"""One training with pruning: a chain of convolutions, as sparse as it gets when half of the steps are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from benchmarks.train.loop import set_lr
from benchmarks.train.schedule import Schedule
from benchmarks.train.tasks import Task
from csgd_cuda import CSGD, export_pruned

# name: options of CSGD. one-shot: none, the weights of least magnitude are dropped at once by torch.nn.utils.prune.
METHODS: dict[str, dict[str, Any] | None] = {
    "threshold": {"dropped_momentum": "keep"},
    "threshold, momentum cleared": {"dropped_momentum": "clear"},
    "threshold, frozen": {"dropped_momentum": "keep", "regrow": False},
    "one-shot": None,
}


@dataclass(frozen=True)
class Run:
    """One training. data: as in benchmarks.train, with ":" and the number of images where that is limited;
    calibration: c of CSGD, in every method."""

    data: str
    method: str
    structure: str
    sparsity: float
    seed: int
    epochs: int
    batch_size: int
    lr: float
    calibration: float


def build_model(channels: int, classes: int, seed: int) -> nn.Sequential:
    """A chain of three convolutions with 16, 32 and 64 filters, and a linear layer; logits [B, classes]."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.AvgPool2d(2)] if width < 64 else [nn.AdaptiveAvgPool2d(1)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


def _optimizer(model: nn.Sequential, run: Run, steps: int) -> CSGD:
    """CSGD that prunes the convolutions only: the rows of the last layer are the model's outputs."""
    convolutions = [p for p in model.parameters() if p.dim() == 4]
    others = [p for p in model.parameters() if p.dim() != 4]
    pruned: dict[str, Any] = {"params": convolutions}
    options = METHODS[run.method]
    if options is not None and run.sparsity > 0:
        ramp = ("cubic", steps // 4, steps // 2)
        pruned |= {"sparsity": run.sparsity, "sparsity_schedule": ramp, "structure": run.structure, **options}
    groups = [pruned, {"params": others}]
    return CSGD(groups, lr=run.lr, momentum=0.9, weight_decay=5e-4, calibration=run.calibration, seed=run.seed)


def _prune_at_once(model: nn.Sequential, run: Run) -> None:
    for layer in model:
        if isinstance(layer, nn.Conv2d) and run.structure == "filter":
            prune.ln_structured(layer, "weight", run.sparsity, n=2, dim=0)
        elif isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", run.sparsity)


def train(run: Run, task: Task, after_step: Callable[[], object]) -> dict[str, float]:
    """Trains and evaluates.

    Returns:
        accuracy (of the test images, 0 to 1), zeros (share of the convolutions' weights), weights and exported (numbers
        of parameters, of the model and of what export_pruned makes of it), difference (the largest between the two
        models' logits, relative to the largest logit).
    """
    inputs, _ = next(iter(task.batches(run.seed, 0, run.batch_size)))
    model = build_model(inputs.shape[1], task.about()["classes"], run.seed)
    per_epoch = len(task.batches(run.seed, 0, run.batch_size))
    steps = per_epoch * run.epochs
    optimizer, schedule = _optimizer(model, run, steps), Schedule("cosine", run.epochs)
    at_once = METHODS[run.method] is None and run.sparsity > 0
    step = 0
    for epoch in range(run.epochs):
        model.train()
        for batch, targets in task.batches(run.seed, epoch, run.batch_size):
            if at_once and step == steps // 2:
                _prune_at_once(model, run)
            set_lr(optimizer, run.lr * schedule.factor(step, per_epoch))
            optimizer.zero_grad()
            task.loss(model, batch, targets).backward()
            optimizer.step()
            step += 1
            after_step()
    if at_once:
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                prune.remove(layer, "weight")
    return _measure(model, task, inputs)


@torch.no_grad()
def _measure(model: nn.Sequential, task: Task, inputs: torch.Tensor) -> dict[str, float]:
    small = export_pruned(model.eval())
    logits = model(inputs)
    weights = [p for p in model.parameters() if p.dim() == 4]
    return {
        "accuracy": task.evaluate(model)["accuracy"],
        "zeros": sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights),
        "weights": sum(p.numel() for p in model.parameters()),
        "exported": sum(p.numel() for p in small.parameters()),
        "difference": float((small(inputs) - logits).abs().max() / logits.abs().max()),
    }
