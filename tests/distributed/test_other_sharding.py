# SPDX-License-Identifier: Apache-2.0
"""Sharding that gives each rank plain tensors: FSDP1 works or is refused, ZeroRedundancyOptimizer needs seeds."""

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer

from csgd_cuda import CSGD

from ..helpers import USUAL_OPTIONS
from .launch import run

SHAPES = {"0.weight": [7, 5], "0.bias": [7], "1.weight": [3, 7], "1.bias": [3]}


def fsdp1(rank, strategy, use_orig_params, groups, optimizer_class, options):
    """What a training and its optimizer's checkpoint come to, or the error of the first step and what it changed."""
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)),
        device_id=torch.device("cpu"), use_orig_params=use_orig_params, sharding_strategy=ShardingStrategy[strategy],
    )  # fmt: skip
    params = list(model.parameters())
    given = [{"params": params[:1]}, {"params": params[1:]}] if groups == 2 else params
    optimizer = optimizer_class(given, **USUAL_OPTIONS[optimizer_class], **options)
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(4, 5)).square().sum().backward()
        before = [param.detach().clone() for param in params]
        try:
            optimizer.step()
        except TypeError as error:
            unchanged = all(map(torch.equal, before, params))
            return str(error) if unchanged and not optimizer.state else "changed"
        optimizer.zero_grad()
    saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    loaded = optimizer_class(given, **USUAL_OPTIONS[optimizer_class], **options)
    loaded.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, loaded, saved))
    assert {int(state["step"]) for state in loaded.state.values()} == {3}
    buffers = ["momentum_buffer"] if optimizer_class is CSGD else ["exp_avg", "exp_avg_sq"]
    shapes = [{name: list(state[buffer].shape) for name, state in saved["state"].items()} for buffer in buffers]
    assert all(each == shapes[0] for each in shapes)
    return shapes[0]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_pieces_of_parameters_are_refused_at_the_first_step_on_all_ranks(strategy, groups, optimizer_class):
    for message in run(2, fsdp1, strategy, True, groups, optimizer_class, {}):
        assert "use_orig_params=True" in message
        assert "fully_shard" in message


@pytest.mark.parametrize(
    ("strategy", "use_orig_params", "options"),
    [
        ("FULL_SHARD", False, {}),
        ("SHARD_GRAD_OP", False, {}),
        ("FULL_SHARD", True, {"lipschitz": 2.0}),
        ("NO_SHARD", True, {}),
    ],
)
def test_flat_parameters_fixed_bounds_and_whole_parameters_work(strategy, use_orig_params, options, optimizer_class):
    for shapes in run(2, fsdp1, strategy, use_orig_params, 1, optimizer_class, options):
        assert shapes == SHAPES


def test_one_process_has_whole_parameters(optimizer_class):
    assert run(1, fsdp1, "FULL_SHARD", True, 1, optimizer_class, {}) == [SHAPES]


def zero(rank, optimizer_class, seeds):
    """Which elements of two equal parameters moved, one stepped on each rank."""
    params = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(2)]
    options = {"seed": rank} if seeds else {}
    options |= {"lr": 1.0, "calibration": 1.0, "lipschitz": 2.0}  # |d| is 1 for both
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=optimizer_class, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return [param.detach() != 0 for param in params]


@pytest.mark.parametrize("seeds", [False, True])
def test_zero_redundancy_needs_a_seed_for_each_rank(seeds, optimizer_class):
    for first, second in run(2, zero, optimizer_class, seeds):
        assert 400 < first.sum() < 600
        assert 400 < second.sum() < 600
        assert torch.equal(first, second) == (not seeds)
