# SPDX-License-Identifier: Apache-2.0
"""Steps that only make state, of sharded parameters: all processes decide alike."""

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from csgd_cuda import CSGD

from .launch import run
from .test_sharded import assert_same_everything, everything


def steps_at_lr_0(rank):
    """The steps counted of three sharded and one replicated parameter: some elements of one are not 0, on one rank."""
    mesh = init_device_mesh("cpu", (2,))
    places = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()]]
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, place)) for place in places]
    own = torch.nn.Parameter(torch.ones(3))
    optimizer = CSGD([*params, own], lr=0.0, momentum=0.9)
    counts = []
    for corner in (0.0, 1.0):
        grad = torch.zeros(4, 3)
        grad[3, 0] = corner  # of rank 1 in a split of rows, of rank 0 in one of columns
        for k, (param, place) in enumerate(zip(params, places, strict=True)):
            param.grad = distribute_tensor(grad if k != 1 else torch.zeros(4, 3), mesh, place)
        own.grad = torch.zeros_like(own)
        optimizer.step()
        counts.append([int(optimizer.state[param]["step"]) for param in [*params, own]])
    return counts, list(optimizer.lipschitz_bounds().values())


def test_a_gradient_on_one_process_is_a_step_on_all():
    for counts, bounds in run(2, steps_at_lr_0):
        assert counts == [[0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]
        assert bounds == [1.0, 0.0, 1.0, 1.0, 0.0]


def training(rank, optimizer_class, asks_for_state):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    momentum = {"momentum": 0.9, "dampening": 0.5} if optimizer_class is CSGD else {"betas": (0.5, 0.9)}
    optimizer = optimizer_class(model.parameters(), lr=0.1, **momentum)
    if asks_for_state:
        get_optimizer_state_dict(model, optimizer)
    for step in range(3):
        torch.manual_seed(10 + step)
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return everything(list(model.parameters()), optimizer)


def test_a_state_dict_of_a_fresh_optimizer_leaves_a_sharded_training_as_it_is(optimizer_class):
    of_both = (run(2, training, optimizer_class, asks_for_state) for asks_for_state in (False, True))
    for plain, asked in zip(*of_both, strict=True):
        assert_same_everything(plain, asked, "after get_optimizer_state_dict")
