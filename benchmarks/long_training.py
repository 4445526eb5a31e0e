# SPDX-License-Identifier: Apache-2.0
"""The training of soak.py, kills.py and tests/integration/test_resume.py: in a few steps all that changes in months.

A small network for each dtype has two parameter groups, one for each layer. Along a cycle of steps, layers freeze, a
group comes and goes, options change and a group is pruned, while a scheduler moves learning rate and momentum. A
checkpoint holds all that the next step depends on.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csgd_cuda import CSGD, CalibratedAdamW

OPTIMIZERS = {"csgd": CSGD, "adamw": CalibratedAdamW}
DTYPES = (torch.float32, torch.bfloat16)
BATCH, BATCHES = 8, 8  # samples of a batch, batches of an epoch
# An embedding of 33,792 elements: enough for two threads, and cheap where it is not stepped.
TOKENS, WIDTH, LENGTH = 512, 66, 8
# Prime, so that checkpoints after equal numbers of steps fall on each place in the cycle.
CYCLE = 61

# Of each optimizer the options of four groups; those of a third network are the first again.
_GROUPS: dict[str, list[dict[str, Any]]] = {
    "csgd": [
        {"nesterov": True, "momentum": 0.9, "weight_decay": 1e-3, "seed": 2**63 + 5},
        {"dampening": 0.3, "bound_decay": 0.9},
        {"weight_decay": 1e-2},
        {"lipschitz": 0.5, "calibration": 0.7, "rounding": "nearest"},
    ],
    "adamw": [
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "seed": 2**63 + 6},
        {"bound_decay": 0.9},
        # In float16 squares of gradients become 0, and with the usual eps a step would be huge.
        {"weight_decay": 0.0, "eps": 1e-3},
        {"lipschitz": 2.0, "calibration": 0.7, "rounding": "nearest", "eps": 1e-3},
    ],
}
_LARGEST_LR = {"csgd": 2e-3, "adamw": 2e-3}
# Before the step of this number in a cycle: the place of the groups in _GROUPS, and what changes in them.
_OPTION_CHANGES: dict[int, tuple[int, dict[str, Any]]] = {
    3: (0, {"calibration": 1.0, "maximize": False, "weight_decay": 0.0}),
    9: (2, {"rounding": "nearest", "bound_decay": 0.5}),
    14: (3, {"lipschitz": None}),
    21: (2, {"sparsity": 0.5, "regrow": False, "threshold_every": 2}),
    29: (1, {"calibration": 0.0, "seed": 77}),
    34: (2, {"sparsity": 0.0, "regrow": True}),
    40: (0, {"calibration": 0.25, "weight_decay": 1e-3}),
    46: (3, {"lipschitz": 0.5}),
    50: (1, {"calibration": 0.25, "seed": 0}),
    55: (2, {"rounding": "stochastic", "bound_decay": 0.99}),
}
_FREEZE, _UNFREEZE, _ADD_GROUP, _REMOVE_GROUP = 5, 17, 24, 52


class Training:
    """Networks, optimizer, scheduler, data and their order. A batch is ``prepare()``, ``optimizer.step()``,
    ``finish()``."""

    def __init__(self, optimizer: str, dtypes: Sequence[torch.dtype] = DTYPES):
        """``optimizer``: a name of OPTIMIZERS."""
        torch.manual_seed(0)
        self.name, self.batch = optimizer, 0
        self.networks = nn.ModuleList(_network(dtype) for dtype in dtypes)
        self.heads = nn.ModuleList()  # of the group that comes and goes
        self.frozen: int | None = None  # the network whose first layer is
        layers = [layer for network in self.networks for layer in (network[0], network[-1])]
        groups = zip(layers, itertools.cycle(_GROUPS[optimizer]), strict=False)
        self.optimizer = OPTIMIZERS[optimizer]([{"params": layer.parameters(), **options} for layer, options in groups])
        self._schedule()
        self.data = torch.randint(TOKENS, (BATCH * BATCHES, LENGTH))
        self.order, self.permutation = torch.Generator().manual_seed(1), torch.empty(0, dtype=torch.int64)

    def run_batch(self) -> None:
        self.prepare()
        self.optimizer.step()
        self.finish()

    def prepare(self) -> None:
        """What changes before this batch, and the gradients."""
        place = self.batch % CYCLE
        if place in _OPTION_CHANGES:
            first, options = _OPTION_CHANGES[place]
            for group in self.optimizer.param_groups[first : 2 * len(self.networks) : len(_GROUPS[self.name])]:
                group.update(options)
        if place == _FREEZE:
            self._freeze(self.batch // CYCLE % len(self.networks))
        elif place == _UNFREEZE:
            self._freeze(None)
        elif place == _ADD_GROUP:
            self._add_group()
        elif place == _REMOVE_GROUP:
            self._remove_group()
        if self.batch % BATCHES == 0:
            self.permutation = torch.randperm(len(self.data), generator=self.order)
        first = self.batch % BATCHES * BATCH
        x = self.data[self.permutation[first : first + BATCH]]
        self.networks.zero_grad()
        self.heads.zero_grad()
        outputs = [network(x) for network in self.networks]  # dropout draws from torch's own generator
        if self.heads:
            outputs = [output + head(x).mean(1) for output, head in zip(outputs, self.heads, strict=True)]
        aim = x[:, :1].sin()
        sum((output.double() - aim).square().mean() for output in outputs).backward()

    def finish(self) -> None:
        self.scheduler.step()
        self.batch += 1

    def _schedule(self) -> None:
        """A new scheduler, since one of torch is for the groups that there are when it is made."""
        lr = _LARGEST_LR[self.name]
        self.scheduler = torch.optim.lr_scheduler.CyclicLR(self.optimizer, lr / 10, lr, step_size_up=20)

    def _freeze(self, network: int | None) -> None:
        """The first layer of this network only; None: of none."""
        self.frozen = network
        for k, of_dtype in enumerate(self.networks):
            of_dtype[0].requires_grad_(k != network)
            if k == network:
                of_dtype.zero_grad()

    def _add_group(self) -> None:
        self.heads = nn.ModuleList(nn.Embedding(TOKENS, 1, dtype=network[0].weight.dtype) for network in self.networks)
        self.optimizer.add_param_group({"params": self.heads.parameters(), "weight_decay": 0.05})
        self._schedule()

    def _remove_group(self) -> None:
        for param in self.optimizer.param_groups.pop()["params"]:
            self.optimizer.state.pop(param, None)
        self.heads = nn.ModuleList()
        self._schedule()

    def state_dict(self) -> dict[str, Any]:
        """For torch.save, and for torch.load with weights_only=True."""
        return {
            "networks": self.networks.state_dict(),
            "heads": self.heads.state_dict(),
            "frozen": self.frozen,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": torch.get_rng_state(),
            "order": self.order.get_state(),
            "permutation": self.permutation,
            "batch": self.batch,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Of a new training only."""
        if saved["heads"]:
            self._add_group()
            self.heads.load_state_dict(saved["heads"])
        self._freeze(saved["frozen"])
        self.networks.load_state_dict(saved["networks"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(dict(saved["scheduler"]))  # from which torch removes an entry
        torch.set_rng_state(saved["generator"])
        self.order.set_state(saved["order"])
        self.permutation, self.batch = saved["permutation"], saved["batch"]

    def save(self, path: Path) -> None:
        """Whole or not at all: killed while it writes, the last checkpoint is still there."""
        part = part_of(path)
        torch.save(self.state_dict(), part)
        os.replace(part, path)


def _network(dtype: torch.dtype) -> nn.Sequential:
    layers = nn.Embedding(TOKENS, WIDTH), nn.Flatten(), nn.Tanh(), nn.Dropout(0.2), nn.Linear(LENGTH * WIDTH, 1)
    return nn.Sequential(*layers).to(dtype)


def part_of(path: Path) -> Path:
    """Where a checkpoint is written before it takes its name."""
    return path.with_suffix(".part")


def resumed(optimizer: str, checkpoint: Path, dtypes: Sequence[torch.dtype] = DTYPES) -> Training:
    """A training made anew that goes on from the checkpoint, or that begins where there is none."""
    training = Training(optimizer, dtypes)
    if checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
    return training


def digest(state: dict[str, Any]) -> str:
    """SHA-256 of all bits of a state_dict of a training."""
    total = hashlib.sha256()
    for name, value in _leaves("", state):
        total.update(f"{name} = {value}\n".encode() if not isinstance(value, Tensor) else _bytes(name, value))
    return total.hexdigest()


def _bytes(name: str, tensor: Tensor) -> bytes:
    head = f"{name}: {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    return head + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of what is neither a dict nor a list, in the order of the paths."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _leaves(f"{name}.{key}", value[key])
    elif isinstance(value, list):
        for k, entry in enumerate(value):
            yield from _leaves(f"{name}.{k}", entry)
    else:
        yield name, value
