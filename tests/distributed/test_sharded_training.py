# SPDX-License-Identifier: Apache-2.0
"""DTensors in a training: tensor parallel, GradScaler, what is exchanged, and what is refused on which ranks."""

import math
import os
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from csgd_cuda import CSGD
from csgd_cuda.distributed import bounds

from ..helpers import make_params
from .launch import run
from .test_sharded import OPTIONS, STEPS, assert_same_everything, everything, gradients, stepped


def trained_by_fully_shard(rank):
    """Loss before and after a real training with fully_shard, with tensor parallel below it, and what ranks hold."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    plan = {"0": SequenceParallel(), "1": ColwiseParallel(), "3": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = CSGD(model.parameters(), lr=0.05, momentum=0.9, calibration=0.5)
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


def test_training_with_fully_shard_and_tensor_parallel():
    """Parameters split twice, replicated, and with gradients that are pending sums."""
    ranks = run(4, trained_by_fully_shard)
    for rank in ranks:
        assert rank["losses"][-1] < 0.7 * rank["losses"][0]
        assert_same_everything(ranks[0]["all"], rank["all"], "ranks")
        assert rank["bounds"] == ranks[0]["bounds"]
        assert all(math.isnan(share) or 0 <= share <= 1 for share in rank["density"])
    assert sum(share > 0 for rank in ranks for share in rank["density"]) > 8
    assert len(set(ranks[0]["placements"])) > 1


def scaled_steps(rank, fused):
    """GradScaler with an Inf in one rank's part of one gradient; the states after the step and after a good one."""
    mesh = init_device_mesh("cpu", (2,))
    params = [
        torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        for p in make_params([(5, 3), (4,)], torch.float32)
    ]
    optimizer = CSGD(params, **OPTIONS, fused=fused)
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
def test_overflow_in_one_part_skips_the_step_everywhere(fused):
    for first, spoiled, good in run(2, scaled_steps, fused):
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
        assert sizes == [(3 * 2, True)] * STEPS  # of two parameters, with what tells who had a gradient
        assert without_dtensors == 0


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
def test_ranks_that_disagree_are_told_at_the_first_step(what, message):
    assert run(2, disagreeing, what) == [message] * 2


def disagreeing_on_a_grid(rank):
    """Two by two ranks, of which the last has another seed; it differs from one rank of each dimension only."""
    mesh = init_device_mesh("cpu", (2, 2))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate(), Shard(0)]))
    optimizer = CSGD([param], lr=0.1, seed=int(rank == 3))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="disagree") as caught:
        optimizer.step()
    return str(caught.value)


def test_all_ranks_of_a_grid_are_told_and_the_ranks_are_those_of_the_world():
    message = "the ranks disagree: seed of parameter group 0 is 0 on rank 0, but 1 on rank 3"
    assert run(4, disagreeing_on_a_grid) == [message] * 4


def wrong_option_of_one_rank(rank):
    """Set after the constructor, which would have refused it."""
    mesh = init_device_mesh("cpu", (2,))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = CSGD([param], lr=0.1)
    optimizer.param_groups[0]["calibration"] = -1.0 if rank == 1 else 1.0
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="calibration") as caught:
        optimizer.step()
    return str(caught.value)


def test_option_that_only_one_rank_would_refuse_is_told_to_all():
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


def wrong_state_of_one_rank(rank):
    """What it is told, and how many all-reduces it launches in that step: as many as the other, which has no error."""
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
    return optimizer.lipschitz_bounds()


def test_parameters_that_each_rank_has_for_itself_may_differ():
    """An expert's, say, beside sharded ones: only what the ranks share is compared."""
    assert run(2, own_parameter_beside_a_shard) == [[1.0, 1.0], [1.0, 2.0]]


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
                "it is split along three dimensions after the first, CSGD can draw for two",
            ),
            strict=True,
        ):
            assert expected in message
        assert other.eq(1).all()
