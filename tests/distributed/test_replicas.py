# SPDX-License-Identifier: Apache-2.0
"""Replicas of DistributedDataParallel stay on the same bits, calibrated and stochastically rounded, by themselves."""

import zlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda import CSGD, CalibratedAdamW
from csgd_cuda.distributed import CalibratedHookState, calibrated_hook, check_ranks_agree

from ..helpers import assert_same_snapshots, bits, snapshot
from .launch import run

STEPS = 10
OPTIONS = {CSGD: {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}, CalibratedAdamW: {"lr": 0.01}}


def make_training(optimizer_class, dtype, seed=0):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(dtype)
    return model, optimizer_class(model.parameters(), **OPTIONS[optimizer_class], calibration=1.0, seed=seed)


def checksum(model, optimizer):
    """A number that depends on every bit of the parameters and the state."""
    total = 0
    for _, tensor in snapshot(list(model.parameters()), optimizer):
        total = zlib.crc32(bits(tensor).numpy().tobytes(), total)
    return total


def trained_replica(rank, optimizer_class, dtype, seed_of_rank, with_hook):
    """The checksum after each step, the gradients that DistributedDataParallel gave, and the density of the steps."""
    model, optimizer = make_training(optimizer_class, dtype, seed_of_rank[rank])
    replica = DistributedDataParallel(model)
    if with_hook:
        replica.register_comm_hook(CalibratedHookState(replica, skip_below=10), calibrated_hook)
    generator = torch.Generator().manual_seed(rank)
    sums, grads, losses = [], [], []
    for _ in range(STEPS):
        x = torch.randn(8, 16, generator=generator).to(dtype)
        optimizer.zero_grad()
        loss = (replica(x) - x[:, :3]).square().mean()
        loss.backward()
        grads.append([param.grad.clone() for param in model.parameters()])
        optimizer.step()
        sums.append(checksum(model, optimizer))
        losses.append(loss.item())
    if len(set(seed_of_rank)) == 1:
        check_ranks_agree(optimizer)
    return {"sums": sums, "grads": grads, "density": optimizer.density(), "losses": losses,
            "end": snapshot(list(model.parameters()), optimizer)}  # fmt: skip


@pytest.mark.parametrize("with_hook", [False, True], ids=["all-reduce", "calibrated_hook"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_keep_the_same_bits(world_size, dtype, with_hook, optimizer_class):
    ranks = run(world_size, trained_replica, optimizer_class, dtype, [0] * world_size, with_hook)
    assert len({tuple(rank["sums"]) for rank in ranks}) == 1
    assert len(set(ranks[0]["sums"])) == STEPS
    assert len({tuple(rank["losses"]) for rank in ranks}) == world_size  # each had data of its own
    assert min(ranks[0]["density"].values()) < 0.5  # and calibration was on
    # No communication is behind it: one process, given the same gradients, ends on the same bits.
    model, optimizer = make_training(optimizer_class, dtype)
    for grads in ranks[0]["grads"]:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad
        optimizer.step()
    assert_same_snapshots(snapshot(list(model.parameters()), optimizer), ranks[0]["end"])


def test_replicas_of_unequal_seeds_are_seen_to_drift(optimizer_class):
    """What the test above would find."""
    first, second = run(2, trained_replica, optimizer_class, torch.float32, [0, 1], False)
    assert first["sums"][0] == second["sums"][0]  # no bound yet: an exact step
    assert all(a != b for a, b in zip(first["sums"][1:], second["sums"][1:], strict=True))
