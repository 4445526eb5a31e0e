# SPDX-License-Identifier: Apache-2.0
"""Sharded optimizers that differ between ranks raise an error at the first step, on all ranks."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from csgd_cuda import CSGD

from .launch import run


def disagreeing(rank, what):
    mesh = init_device_mesh("cpu", (2,))
    shapes = [(5, 3), (4 + (rank if what == "shape" else 0),)]
    params = [
        torch.nn.Parameter(distribute_tensor(torch.ones(s), mesh, [Shard(0)], src_data_rank=None)) for s in shapes
    ]
    options = {"seed": {"seed": rank}, "calibration": {"calibration": 1.0 + rank}}.get(what, {})
    optimizer = CSGD(params, **{"lr": 0.1, **options})
    for param in params:
        param.grad = torch.ones_like(param)
    if what in ("step", "loaded seed"):
        optimizer.step()
        state = optimizer.state_dict()
        if what == "step":
            state["state"][1]["step"] += rank
        else:
            state["param_groups"][0]["seed"] = rank
        optimizer.load_state_dict(state)
    before = [param.to_local().clone() for param in params]
    try:
        optimizer.step()
    except ValueError as error:
        same = all(torch.equal(a, param.to_local()) for a, param in zip(before, params, strict=True))
        return str(error) if same else "changed"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", "the ranks disagree: seed of parameter group 0 is 0 on rank 0, but 1 on rank 1"),
        ("calibration", "the ranks disagree: calibration of parameter group 0 is 1.0 on rank 0, but 2.0 on rank 1"),
        ("shape", "the ranks disagree: parameter 1 is float32 [4] on rank 0, but float32 [5] on rank 1"),
        ("step", "the ranks disagree: step of parameter 1 is 1 on rank 0, but 2 on rank 1"),
        ("loaded seed", "the ranks disagree: seed of parameter group 0 is 0 on rank 0, but 1 on rank 1"),
    ],
)
def test_ranks_that_disagree_raise_at_the_first_step(what, message):
    assert run(2, disagreeing, what) == [message] * 2


def error_of_first_step(mesh_shape, placements, **changed):
    """What the first step says where this rank's options were changed after the constructor."""
    mesh = init_device_mesh("cpu", mesh_shape)
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, placements))
    optimizer = CSGD([param], lr=0.1)
    optimizer.param_groups[0].update(changed)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="disagree") as caught:
        optimizer.step()
    return str(caught.value)


def disagreeing_on_a_grid(rank):
    """Two by two ranks, of which the last has another seed; it differs from one rank of each dimension only."""
    return error_of_first_step((2, 2), [Replicate(), Shard(0)], seed=int(rank == 3))


def test_all_ranks_of_a_grid_raise_and_the_ranks_are_those_of_the_world():
    message = "the ranks disagree: seed of parameter group 0 is 0 on rank 0, but 1 on rank 3"
    assert run(4, disagreeing_on_a_grid) == [message] * 4


def wrong_option_of_one_rank(rank):
    return error_of_first_step((2,), [Shard(0)], calibration=-1.0 if rank == 1 else 1.0)


def test_option_that_only_one_rank_would_refuse_raises_on_all():
    message = "the ranks disagree: calibration of parameter group 0 is 1.0 on rank 0, but -1.0 on rank 1"
    assert run(2, wrong_option_of_one_rank) == [message] * 2


def beside_experts(rank):
    """A shared parameter beside one of the rank's own, with a name and a shape of its own, and a note of the user's."""
    mesh = init_device_mesh("cpu", (2,))
    shared = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    own = torch.nn.Parameter(torch.ones(4 + rank))
    optimizer = CSGD([{"params": [("shared", shared), (f"experts.{rank}", own)], "note": rank}], lr=0.1)
    for param in (shared, own):
        param.grad = torch.ones_like(param)
    optimizer.step()
    return own.detach().tolist()


def test_parameters_of_its_own_may_differ_from_those_of_other_ranks():
    for rank, own in enumerate(run(2, beside_experts)):
        assert own == pytest.approx([0.9] * (4 + rank))


def added_group(rank):
    """The error of a group that is added after the first step, with another seed on each rank."""
    mesh = init_device_mesh("cpu", (2,))
    first, second = (torch.nn.Parameter(distribute_tensor(torch.ones(n, 3), mesh, [Shard(0)])) for n in (5, 4))
    optimizer = CSGD([first], lr=0.1)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "seed": rank, "lipschitz": 5.0})
    with pytest.raises(ValueError, match="disagree") as caught:
        optimizer.step()
    return str(caught.value), second.full_tensor().detach()


def test_ranks_that_disagree_on_a_new_group_are_told():
    for message, param in run(2, added_group):
        assert message == "the ranks disagree: seed of parameter group 1 is 0 on rank 0, but 1 on rank 1"
        assert param.eq(1).all()


def own_parameter_beside_a_shard(rank):
    """Steps before and after a checkpoint is loaded; the bounds."""
    mesh = init_device_mesh("cpu", (2,))
    shared = torch.nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    own = torch.nn.Parameter(torch.ones(4))
    optimizer = CSGD([{"params": [shared, own], "note": lambda: None}], lr=0.1)
    for _ in range(2):
        shared.grad, own.grad = torch.ones_like(shared), torch.full_like(own, 1.0 + rank)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    return list(optimizer.lipschitz_bounds().values())


def test_parameters_that_each_rank_has_for_itself_may_differ():
    """An expert's, say, beside sharded ones: only what the ranks share is compared."""
    assert run(2, own_parameter_beside_a_shard) == [[1.0, 1.0], [1.0, 2.0]]


def wrong_pruning_option_of_one_rank(rank):
    return error_of_first_step((2,), [Shard(0)], sparsity=2.0 if rank == 1 else 0.0)


def test_pruning_option_that_only_one_rank_would_refuse_raises_on_all():
    message = "the ranks disagree: sparsity of parameter group 0 is 0.0 on rank 0, but 2.0 on rank 1"
    assert run(2, wrong_pruning_option_of_one_rank) == [message] * 2
