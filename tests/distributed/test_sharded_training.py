# SPDX-License-Identifier: Apache-2.0
"""DTensors in a training: tensor parallel, GradScaler, what is exchanged, and what is refused on which ranks."""

import os
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from csgd_cuda import CSGD, CalibratedAdamW
from csgd_cuda.distributed import bounds

from ..helpers import make_params
from .launch import run
from .test_sharded import OPTIONS, STEPS, assert_same_everything, everything, gradients, stepped


def trained_by_fully_shard(rank, optimizer_class, options):
    """Loss before and after a real training with fully_shard, with tensor parallel below it, and what ranks hold."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    plan = {"0": SequenceParallel(), "1": ColwiseParallel(), "3": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = optimizer_class(model.parameters(), lr=0.05, calibration=0.5, **options)
    x = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(mesh.get_local_rank("data")))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        # Sequence parallel: each rank of the tensor dimension has its part of the second dimension.
        part = DTensor.from_local(x[:, mesh.get_local_rank("tensor")].unsqueeze(1), mesh["tensor"], [Shard(1)])
        out = model(part)
        target = x[..., :3]
        loss = (out - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    placements = [str(p.placements) for p in model.parameters()]
    return {"losses": losses, "all": everything(list(model.parameters()), optimizer), "placements": placements,
            "density": optimizer.density(), "bounds": optimizer.lipschitz_bounds()}  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer_class", "options"), [(CSGD, {"momentum": 0.9}), (CalibratedAdamW, {})], ids=["CSGD", "AdamW"]
)
def test_training_with_fully_shard_and_tensor_parallel(optimizer_class, options):
    """Parameters split twice, replicated, and with gradients that are pending sums."""
    ranks = run(4, trained_by_fully_shard, optimizer_class, options)
    for rank in ranks:
        assert rank["losses"][-1] < 0.7 * rank["losses"][0]
        assert_same_everything(ranks[0]["all"], rank["all"], "ranks")
        assert rank["bounds"] == ranks[0]["bounds"]
        assert all(0 <= share <= 1 for share in rank["density"].values())
    assert sum(share > 0 for rank in ranks for share in rank["density"].values()) > 8
    assert len(set(ranks[0]["placements"])) > 1


def scaled_steps(rank, optimizer_class, fused):
    """GradScaler with an Inf in one rank's part of one gradient; the states after the step and after a good one."""
    mesh = init_device_mesh("cpu", (2,))
    params = [
        torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        for p in make_params([(5, 3), (4,)], torch.float32)
    ]
    optimizer = optimizer_class(params, **(OPTIONS if optimizer_class is CSGD else {"lr": 0.1}), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    out = []
    for spoiled in (False, True, False):
        scaler.scale(torch.zeros(1))
        for param, grad in zip(params, gradients([p.shape for p in params], torch.float32, 3), strict=True):
            param.grad = distribute_tensor(grad * scaler.get_scale(), mesh, [Shard(0)])
        if spoiled and rank == 1:
            params[0].grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        out.append(everything(params, optimizer))
    return out


@pytest.mark.parametrize("fused", [None, True], ids=["scaler unscales", "kernel unscales"])
def test_overflow_in_one_part_skips_the_step_everywhere(fused, optimizer_class):
    for first, spoiled, good in run(2, scaled_steps, optimizer_class, fused):
        assert_same_everything(first, spoiled, "after an overflow")
        assert dict(good)["step 0"] == dict(first)["step 0"] + 1


def count_exchanges(rank):
    """How many all-reduces two steps made, and whether the second was sent while the first step's was awaited."""
    sizes, real = [], dist.all_reduce

    def counted(tensor, *args, **options):
        sizes.append((tensor.numel(), options.get("async_op", False)))
        return real(tensor, *args, **options)

    bounds.dist.all_reduce = counted
    mesh = init_device_mesh("cpu", (2,))
    stepped([((5, 3), [Shard(0)]), ((4, 4), [Shard(1)]), ((3,), [Replicate()])], torch.float32, mesh)
    plain = len(sizes)
    params = make_params([(5, 3)], torch.float32)
    optimizer = CSGD(params, lr=0.1)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    return sizes, len(sizes) - plain


def test_a_step_makes_one_asynchronous_exchange_of_all_bounds():
    for sizes, without_dtensors in run(2, count_exchanges):
        assert sizes == [(3 * 2, True)] * STEPS  # of two parameters: the bound, and twice whether there was a gradient
        assert without_dtensors == 0


def wrong_state_of_one_rank(rank):
    """Its error, and how many all-reduces it launches in that step: as many as the other rank, which has no error."""
    mesh, launched = init_device_mesh("cpu", (2,)), []
    param = torch.nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Replicate()]))
    optimizer = CSGD([param], lr=0.1)
    for step in range(3):
        param.grad = DTensor.from_local(torch.ones(6), mesh, [Partial()])
        if step < 2:
            optimizer.step()
    if rank == 1:
        optimizer.state[param]["step"] = optimizer.state[param]["step"].float()
    redistribute = DTensor.redistribute

    def counted(*args, **options):
        launched.append(1)
        return redistribute(*args, **options)

    with mock.patch.object(DTensor, "redistribute", counted):
        try:
            optimizer.step()
        except ValueError as error:
            return str(error), len(launched)
    return None, len(launched)


def test_error_of_one_rank_communicates_nothing_more():
    good, (message, launched) = run(2, wrong_state_of_one_rank)
    assert good == (None, 1)
    assert "step must be one" in message
    assert launched == 1


def lost(rank):
    mesh = init_device_mesh("cpu", (2,))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    optimizer = CSGD([param], lr=0.1)
    for step in range(3):
        if rank == 1 and step == 1:
            os._exit(1)
        param.grad = torch.ones_like(param)
        try:
            optimizer.step()
            optimizer.state_dict()
        except RuntimeError as error:
            return type(error).__module__, str(error)


def test_lost_rank_ends_in_an_error_of_torch():
    (_, message), _ = run(2, lost, lost=(1,))
    assert re.search("closed by peer|reset by peer|Broken pipe|Connection", message), message


def refused(rank):
    """What is said about a partial sum, a gradient and a state that are no DTensors, and three split dimensions."""
    mesh, cube = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 2, 2))
    other = torch.ones(2).requires_grad_()
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = CSGD([other, param], lr=0.1)
    saved = {"momentum_buffer": torch.ones(4), "step": torch.tensor(1)}
    other.grad = torch.ones(2)

    def plain_gradient():
        # autograd does not let anybody set such a gradient
        with mock.patch.object(DTensor, "grad", torch.ones(2)):
            optimizer.step()

    actions = (
        lambda: CSGD([other, torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))]),
        lambda: optimizer.load_state_dict({**optimizer.state_dict(), "state": {1: saved}}),
        plain_gradient,
        lambda: CSGD(
            [torch.nn.Parameter(distribute_tensor(torch.ones(2, 4, 4, 4), cube, [Shard(1), Shard(2), Shard(3)]))]
        ),
    )
    messages = []
    for action in actions:
        try:
            action()
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages, other.detach()


def test_what_cannot_be_stepped_is_refused():
    for messages, other in run(8, refused):
        for message, expected in zip(
            messages,
            (
                "a parameter cannot be a partial sum",
                "parameter 1: the loaded momentum_buffer is a Tensor, expected a DTensor as the parameter",
                "parameter 1: gradient is a Tensor, expected a DTensor",
                "it is split along three dimensions after the first, csgd_cuda can draw for two",
            ),
            strict=True,
        ):
            assert expected in message
        assert other.eq(1).all()
