# SPDX-License-Identifier: Apache-2.0
"""Models with calibration layers under what shards parameters: the weights move, or a sentence says what cannot be."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from csgd_cuda import CSGD, calibrate

from ..helpers import assert_same_bits
from .launch import run
from .test_sharded import whole

OPTIMIZERS = {"SGD": torch.optim.SGD, "CSGD": CSGD}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def shard(model):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model


def train(model, optimizer, steps=4):
    """All ranks have the same data, so that their number makes no difference to gradients that are not calibrated."""
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def under_fully_shard(rank, order, name):
    """The parameters of a model trained with fully_shard, and the densities of its layers in the last backward pass."""
    with_layers = {"calibrate first": lambda m: shard(calibrate(m)), "shard first": lambda m: calibrate(shard(m))}
    model = with_layers[order](build())
    train(model, OPTIMIZERS[name](model.parameters(), lr=0.1))
    return [whole(p.detach()) for p in model.parameters()], [model[k].weight_calibration.density() for k in (0, 2)]


@pytest.mark.parametrize(("order", "name"), [("calibrate first", "SGD"), ("shard first", "CSGD")])
def test_fully_shard_on_one_process_makes_the_bits_of_the_plain_model(order, name):
    ((params, densities),) = run(1, under_fully_shard, order, name)
    model = calibrate(build())
    train(model, OPTIMIZERS[name](model.parameters(), lr=0.1))
    for param, other in zip(params, model.parameters(), strict=True):
        assert_same_bits(param, other.detach())
    assert densities == [model[k].weight_calibration.density() for k in (0, 2)]


@pytest.mark.parametrize("order", ["calibrate first", "shard first"])
def test_fully_shard_on_two_processes_moves_the_weights(order):
    """Each process draws for its own gradient; their mean, and so the weights, are equal on both."""
    (params, densities), (others, _) = run(2, under_fully_shard, order, "SGD")
    for param, other, start in zip(params, others, build().parameters(), strict=True):
        assert_same_bits(param, other)
        assert (param != start).any()
    assert all(0 < density < 1 for density in densities)


def checkpointed(rank):
    model = shard(calibrate(build()))
    optimizer = CSGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    other = shard(calibrate(build()))
    loaded = CSGD(other.parameters(), lr=0.1, momentum=0.9)
    set_optimizer_state_dict(other, loaded, state)
    steps = [loaded.state[p]["step"].item() for p in other.parameters()]
    return sorted(state["state"]), steps


def test_distributed_checkpoints_name_the_parameters():
    for names, steps in run(2, checkpointed):
        assert names == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert steps == [4] * 4


def tensor_parallel(rank, where):
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(build(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    calibrate(model, where=where)
    try:
        model(torch.ones(3, 6)).sum().backward()
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("where", ["weight", "output"])
def test_tensor_parallel_is_refused(where):
    for message in run(2, tensor_parallel, where):
        assert "takes a plain tensor, got a DTensor" in message


def under_fsdp1(rank, use_orig_params):
    model = FullyShardedDataParallel(calibrate(build()), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    layers = [m.step.item() for name, m in model.named_modules() if name.endswith("weight_calibration")]
    return layers, [bool((p.detach() != b).any()) for p, b in zip(model.parameters(), before, strict=True) if b.numel()]


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_the_older_fsdp_moves_the_weights(use_orig_params):
    for layers, moved in run(2, under_fsdp1, use_orig_params):
        assert layers == [4, 4]
        assert all(moved)
