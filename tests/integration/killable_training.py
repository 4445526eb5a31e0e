# SPDX-License-Identifier: Apache-2.0
"""A training that may be killed at any time and goes on from its last checkpoint; for test_resume.py.

main(FOLDER, START, CONNECTION) trains, with a checkpoint in FOLDER every few batches. Before each batch it receives a
message, after each it sends the number of batches.
"""

import os

import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import DTYPES, snapshot

EPOCHS, BATCHES, SAVE_EVERY = 2, 8, 3
# Of each optimizer a group for each dtype; the first has every option at work.
GROUPS = {
    CSGD: [
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "seed": 2**63 + 5},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "bound_decay": 0.9},
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
        {"lr": 0.02, "lipschitz": 0.5, "calibration": 0.7, "rounding": "nearest", "momentum": 0.9},
    ],
    CalibratedAdamW: [
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "seed": 2**63 + 6},
        {"lr": 0.01, "bound_decay": 0.9},
        {"lr": 0.01, "weight_decay": 0.0},
        {"lr": 0.01, "lipschitz": 2.0, "calibration": 0.7, "rounding": "nearest"},
    ],
}


class Training:
    """Everything that a checkpoint has to hold."""

    def __init__(self, start=0):
        """The steps are counted from ``start``."""
        torch.manual_seed(0)
        self.models = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Dropout(0.2), torch.nn.Linear(40, 1)).to(dtype)
            for _ in GROUPS
            for dtype in DTYPES
        )
        models = iter(self.models)
        self.optimizers = [
            optimizer_class(
                [{"params": next(models).parameters(), **options} for options in groups], first_index=64 * k
            )
            for k, (optimizer_class, groups) in enumerate(GROUPS.items())
        ]
        self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in self.optimizers]
        self.data = torch.randn(BATCHES * 8, 6)
        self.order = torch.Generator().manual_seed(1)
        self.permutation = None
        self.batch, self.start = 0, start

    def run_batch(self):
        if self.batch % BATCHES == 0:
            self.permutation = torch.randperm(len(self.data), generator=self.order)
        k = self.batch % BATCHES
        x = self.data[self.permutation[8 * k : 8 * (k + 1)]]
        self.models.zero_grad()
        for model in self.models:  # dropout draws from torch's own generator
            dtype = model[0].weight.dtype
            (model(x.to(dtype)) - x[:, :1].sin().to(dtype)).square().mean().backward()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            if self.batch == 0:
                for state in optimizer.state.values():
                    state["step"] += self.start
            scheduler.step()
        self.batch += 1

    def finished(self):
        return self.batch == EPOCHS * BATCHES

    def snapshot(self):
        """Copies of everything that the steps change."""
        out = []
        for optimizer in self.optimizers:
            out += snapshot([param for group in optimizer.param_groups for param in group["params"]], optimizer)
        return out

    def state_dict(self):
        return {
            "models": self.models.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "rng": torch.get_rng_state(),
            "order": self.order.get_state(),
            "permutation": self.permutation,
            "batch": self.batch,
        }

    def load_state_dict(self, saved):
        self.models.load_state_dict(saved["models"])
        for name in ("optimizers", "schedulers"):
            for thing, state in zip(getattr(self, name), saved[name], strict=True):
                thing.load_state_dict(state)
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
