# SPDX-License-Identifier: Apache-2.0
"""Training of one network per optimizer and seed, with the figures of every epoch."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from csgd_cuda import CSGD

from .data import Dataset
from .errors import UserError
from .model import SmallCNN, build

DENSITY_EVERY = 10  # steps: reading the density makes the CPU wait for the GPU
_TEST_BATCH = 1000  # images
_FUSED = {"auto": None, "yes": True, "no": False}


@dataclass(frozen=True)
class Settings:
    """What determines the result of a training, named as on the command line; the same in a resumed one.

    The number of threads is among them because torch's arithmetic on the CPU may round differently with another one.
    """

    data: str
    limit: int | None
    optimizers: tuple[str, ...]
    seeds: int
    batch_size: int
    lr: float
    lr_step: int
    momentum: float
    weight_decay: float
    calibration: float
    width: int
    dtype: str
    device: str
    threads: int
    fused: str

    def lr_at(self, epoch: int) -> float:
        """Learning rate in an epoch (from 0); whatever --epochs is, so that a resume may raise it."""
        return self.lr * 0.1 ** (epoch // self.lr_step) if self.lr_step else self.lr


class Trainer:
    """One network, its optimizer and the history of its epochs.

    history: one dict per epoch: epoch (from 1), lr, train_loss, test_loss (nats per image), test_accuracy
    (0 to 1), density (list, one share per parameter, mean over every tenth step), ms_per_step (median).
    """

    def __init__(self, name: str, seed: int, settings: Settings, data: Dataset):
        self.name, self.seed, self.settings, self.data = name, seed, settings, data
        self.dtype = getattr(torch, settings.dtype)
        self.device = data.train_images.device
        self.model = build(data.classes, settings.width, seed, self.dtype, self.device)
        self.optimizer = _make_optimizer(name, seed, settings, self.model)
        self.history: list[dict] = []

    def state_dict(self) -> dict:
        """Everything a resume needs, as plain containers and tensors; shares memory with the trainer."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": list(self.history),
            "backend": self.backend(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Inverse of state_dict, bit for bit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = list(state["history"])

    def backend(self) -> str:
        """What carries out the optimizer's step."""
        if self.name == "csgd":
            return self.optimizer.backend()
        # torch.optim.SGD left to its defaults: all tensors at once on CUDA, one by one on the CPU.
        return "torch foreach" if self.device.type == "cuda" else "torch for-loop"

    def train_epoch(self, after_step: Callable[[], object]) -> None:
        """Train one epoch and append its figures to the history."""
        epoch = len(self.history)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(epoch)
        self.model.train()
        batches = _batches(len(self.data.train_labels), self.settings.batch_size, self.seed, epoch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        milliseconds, densities = [], []
        for i, batch in enumerate(batches):
            batch = batch.to(self.device)
            self.optimizer.zero_grad()
            loss = self._loss(self.data.train_images[batch], self.data.train_labels[batch])[0]
            loss.backward()
            loss_sum += loss.detach() * len(batch)
            # Never step 0: the very first of a training is exact SGD, all coordinates move.
            sampled = i % DENSITY_EVERY == DENSITY_EVERY - 1 or i == len(batches) - 1
            ms, density = self._step(sampled)
            milliseconds.append(ms)
            if sampled:
                densities.append(density)
            after_step()
        test_loss, test_accuracy = self._test()
        self.history.append(
            {
                "epoch": epoch + 1,
                "lr": self.settings.lr_at(epoch),
                "train_loss": loss_sum.item() / len(self.data.train_labels),
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "density": [statistics.fmean(column) for column in zip(*densities, strict=True)],
                "ms_per_step": statistics.median(milliseconds),
            }
        )

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(self.data.inputs(images, self.dtype)).float()
        return F.cross_entropy(logits, labels), logits

    def _step(self, sampled: bool) -> tuple[float, list[float] | None]:
        """One optimizer step: its milliseconds and, if sampled, the density of every parameter."""
        parameters = list(self.model.parameters())
        compare = sampled and self.name == "sgd"
        before = [p.detach().clone() for p in parameters] if compare else None
        self._synchronize()
        start = time.perf_counter()
        self.optimizer.step()
        self._synchronize()
        ms = (time.perf_counter() - start) * 1e3
        if compare:  # SGD keeps no count: what moved is what has other bits than before
            pairs = zip(parameters, before, strict=True)
            return ms, [(p.detach() != b).double().mean().item() for p, b in pairs]
        return ms, list(self.optimizer.density().values()) if sampled else None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Loss (nats per image) and accuracy (0 to 1) on the test images."""
        self.model.eval()
        loss_sum, right = 0.0, 0
        batches = (tensor.split(_TEST_BATCH) for tensor in (self.data.test_images, self.data.test_labels))
        for images, labels in zip(*batches, strict=True):
            loss, logits = self._loss(images, labels)
            loss_sum += loss.item() * len(labels)
            right += int((logits.argmax(dim=1) == labels).sum())
        return loss_sum / len(self.data.test_labels), right / len(self.data.test_labels)


def _make_optimizer(name: str, seed: int, settings: Settings, model: SmallCNN) -> torch.optim.Optimizer:
    common = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), **common)
    fused = _FUSED[settings.fused]
    try:
        return CSGD(model.parameters(), **common, calibration=settings.calibration, seed=seed, fused=fused)
    except RuntimeError as error:
        if not fused:
            raise
        raise UserError(f"--fused yes: {error}; --fused auto leaves the choice to CSGD.") from None


def _batches(images: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Indices of the batches of one epoch: a function of seed and epoch, a resume needs no random state."""
    # torch's CPU generator looks at the low 32 bits of its seed only: both must be in there.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)
    return torch.randperm(images, generator=generator).split(batch_size)


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch uses deterministic algorithms only: a resumed training must reach the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would add to the time per step
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run_key(name: str, seed: int) -> str:
    """Name of one training in a checkpoint."""
    return f"{name}-{seed}"


def train_all(
    settings: Settings, data: Dataset, epochs: int, runs: dict[str, dict], after_epoch: Callable[[], object]
) -> None:
    """Bring every training up to ``epochs``: from its Trainer.state_dict() in ``runs``, else from the start.

    ``runs`` maps run_key to such states and is kept up to date; ``after_epoch`` is called after each epoch.
    """
    keys = [(name, seed) for seed in range(settings.seeds) for name in settings.optimizers]
    steps = math.ceil(len(data.train_labels) / settings.batch_size)
    done = sum(len(run["history"]) for run in runs.values()) * steps
    # A log file needs a line now and then, not ten a second.
    interval = 0.1 if sys.stderr.isatty() else 10
    total = len(keys) * epochs * steps
    with deterministic(), tqdm(total=total, initial=done, unit="step", mininterval=interval) as bar:
        for name, seed in keys:
            if len(runs.get(run_key(name, seed), {"history": ()})["history"]) == epochs:
                continue
            trainer = Trainer(name, seed, settings, data)
            if run_key(name, seed) in runs:
                trainer.load_state_dict(runs[run_key(name, seed)])
            while len(trainer.history) < epochs:
                epoch = len(trainer.history) + 1
                bar.set_description(f"{name}, seed {seed}, epoch {epoch}/{epochs}", refresh=False)
                trainer.train_epoch(bar.update)
                accuracy = trainer.history[-1]["test_accuracy"]
                bar.set_postfix_str(f"test accuracy {accuracy:.2%}", refresh=False)
                runs[run_key(name, seed)] = trainer.state_dict()
                after_epoch()
