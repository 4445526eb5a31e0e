# SPDX-License-Identifier: Apache-2.0
"""A gradient that some rank does not have: where all lack it, a step without it; where some do, an error."""

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from csgd_cuda import CSGD
from csgd_cuda.distributed import check_ranks_agree

from ..helpers import make_params
from .launch import run
from .test_sharded import OPTIONS, STEPS, assert_same_everything, everything, gradients

SHAPES = [(5, 3), (8, 4), (4, 4)]
WITHOUT = 1  # the parameter
MISSING = 2  # in this step


def start(mesh, placements, **options):
    """Two parameter groups on a mesh, or plain where that is None."""
    whole = [p.detach() for p in make_params(SHAPES, torch.float32)]
    params = [torch.nn.Parameter(p if mesh is None else distribute_tensor(p, mesh, placements)) for p in whole]
    return params, CSGD([{"params": params[:1]}, {"params": params[1:]}], **{**OPTIONS, **options})


def set_gradients(params, mesh, placements, step, has_all):
    for k, (param, grad) in enumerate(zip(params, gradients(SHAPES, torch.float32, step), strict=True)):
        spread = grad if mesh is None else distribute_tensor(grad, mesh, placements)  # all ranks take part
        param.grad = spread if has_all or (k, step) != (WITHOUT, MISSING) else None


def stepped(rank, mesh_shape, lacking):
    """What steps leave where ranks ``lacking`` it have no gradient; or the error, and whether nothing had changed by
    then."""
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape)
    placements = None if mesh is None else [Shard(0), Shard(1)][: mesh.ndim]
    params, optimizer = start(mesh, placements)
    for step in range(STEPS):
        set_gradients(params, mesh, placements, step, has_all=rank not in lacking)
        before = [param.detach().clone() for param in params]
        try:
            optimizer.step()
        except ValueError as error:
            same = all(torch.equal(a, param) for a, param in zip(before, params, strict=True))
            return step, str(error), "nothing changed" if same else "changed"
    return everything(params, optimizer)


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)], ids=str)
def test_gradient_that_no_rank_has_is_a_step_without_it(mesh_shape):
    expected = stepped(0, None, [0])
    assert dict(expected)["step 1"] == STEPS - 1
    count = torch.Size(mesh_shape).numel()
    for rank, got in enumerate(run(count, stepped, mesh_shape, list(range(count)))):
        assert_same_everything(expected, got, f"rank {rank}")


@pytest.mark.parametrize(("mesh_shape", "lacking"), [((2,), [1]), ((3,), [0, 2]), ((2, 2), [3])], ids=str)
def test_gradient_that_some_ranks_lack_is_told_to_all_at_the_next_step(mesh_shape, lacking):
    count = torch.Size(mesh_shape).numel()
    for step, message, state in run(count, stepped, mesh_shape, lacking):
        assert (step, state) == (MISSING + 1, "nothing changed")
        assert message.startswith("parameter 1 had a gradient in the last step on some ranks, but none on others")


def asked_after_the_step(rank, options):
    """The errors of state_dict after that step, called twice, of a step and of check_ranks_agree."""
    mesh = init_device_mesh("cpu", (2,))
    params, optimizer = start(mesh, [Shard(0)], **options)
    for step in range(MISSING + 1):
        set_gradients(params, mesh, [Shard(0)], step, has_all=rank == 0)
        optimizer.step()
    said = []
    for ask in (optimizer.state_dict, optimizer.state_dict, optimizer.step, lambda: check_ranks_agree(optimizer)):
        try:
            ask()
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("options", [{}, {"lipschitz": 1.0}], ids=str)
def test_no_checkpoint_is_made_of_parts_a_step_apart(options):
    """With a fixed constant nothing travels that could tell; there the check of all ranks is what remains."""
    by_checkpoint = [] if options else ["parameter 1 had a gradient in the last step on some ranks"] * 3
    for said in run(2, asked_after_the_step, options):
        for message, expected in zip(said, [*by_checkpoint, "the ranks disagree: step of parameter 1"], strict=True):
            assert message.startswith(expected)
