# SPDX-License-Identifier: Apache-2.0
"""A training that may be killed at any time and goes on from its last checkpoint; for test_resume.py.

main(FOLDER, START, CONNECTION) trains, with a checkpoint in FOLDER every few batches. Before each batch it receives a
message, after each it sends the number of batches.
"""

import os

import torch

from csgd_cuda import CSGD

from ..helpers import DTYPES

EPOCHS, BATCHES, SAVE_EVERY = 2, 8, 3
# A group for each dtype; the first has every option at work.
GROUPS = [
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "seed": 2**63 + 5},
    {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "bound_decay": 0.9},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    {"lr": 0.02, "lipschitz": 0.5, "calibration": 0.7, "rounding": "nearest", "momentum": 0.9},
]


def parameters_of(models):
    return [param for model in models for param in model.parameters()]


class Training:
    """Everything that a checkpoint has to hold."""

    def __init__(self, start=0):
        """The steps are counted from ``start``."""
        torch.manual_seed(0)
        self.models = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Dropout(0.2), torch.nn.Linear(40, 1)).to(dtype)
            for dtype in DTYPES
        )
        groups = zip(self.models, GROUPS, strict=True)
        self.optimizer = CSGD([{"params": model.parameters(), **options} for model, options in groups])
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.95)
        self.data = torch.randn(BATCHES * 8, 6)
        self.order = torch.Generator().manual_seed(1)
        self.permutation = None
        self.batch, self.start = 0, start

    def run_batch(self):
        if self.batch % BATCHES == 0:
            self.permutation = torch.randperm(len(self.data), generator=self.order)
        k = self.batch % BATCHES
        x = self.data[self.permutation[8 * k : 8 * (k + 1)]]
        self.optimizer.zero_grad()
        for model, dtype in zip(self.models, DTYPES, strict=True):  # dropout draws from torch's own generator
            (model(x.to(dtype)) - x[:, :1].sin().to(dtype)).square().mean().backward()
        self.optimizer.step()
        if self.batch == 0:
            for state in self.optimizer.state.values():
                state["step"] += self.start
        self.scheduler.step()
        self.batch += 1

    def finished(self):
        return self.batch == EPOCHS * BATCHES

    def state_dict(self):
        return {
            "models": self.models.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "order": self.order.get_state(),
            "permutation": self.permutation,
            "batch": self.batch,
        }

    def load_state_dict(self, saved):
        for name in ("models", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        self.order.set_state(saved["order"])
        self.permutation, self.batch = saved["permutation"], saved["batch"]


def save(training, path):
    """Whole or not at all: killed while writing, the last checkpoint is still there."""
    part = path.with_suffix(".part")
    torch.save(training.state_dict(), part)
    os.replace(part, path)


def main(folder, start, connection):
    training = Training(start)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
    connection.send(training.batch)
    while not training.finished():
        connection.recv()
        training.run_batch()
        if training.batch % SAVE_EVERY == 0:
            save(training, checkpoint)
        connection.send(training.batch)
    save(training, folder / "final.pt")
