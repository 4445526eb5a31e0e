# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of CSGD itself: what is loaded is what was saved, and training goes on as if nothing had happened."""

import copy
import io

import pytest
import torch

from csgd_cuda import CSGD

from ..helpers import DTYPES, assert_same_snapshots, make_params, snapshot
from .common import SHAPES, assert_same_tree, copies_of, go_on, optimizer_of, other_options, trained
from .options import with_options


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@with_options()
def test_state_dict_deterministic(options, device, fused):
    """Loading neither loses nor adds a bit, whatever the optimizer was before; every later step is the same."""
    params = [p for k, dtype in enumerate(DTYPES) for p in make_params([(70,), (3, 5)], dtype, device, seed=k)]
    optimizer = optimizer_of(params, options, fused=fused)
    go_on(params, optimizer)
    state_dict = optimizer.state_dict()
    assert_same_tree(state_dict, optimizer.state_dict())
    twins = copies_of(params)
    second = optimizer_of(twins, other_options(options), maximize=True)
    go_on(twins, second, seed=5)
    with torch.no_grad():
        for twin, param in zip(twins, params, strict=True):
            twin.copy_(param)
    second.load_state_dict(state_dict)
    assert_same_tree(state_dict, second.state_dict())
    for step in range(3):
        go_on(params, optimizer, steps=1, seed=step)
        go_on(twins, second, steps=1, seed=step)
        assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, second))
        assert_same_tree(optimizer.state_dict(), second.state_dict())


@with_options()
def test_state_dict_of_repeated_groups_has_the_same_ids(options, device, fused):
    """Parameters are numbered by what they are, not by where they were found (pytorch#36831)."""
    _, optimizer = trained(options, device, fused=fused)
    once = optimizer.state_dict()
    optimizer.param_groups.extend(optimizer.param_groups)
    twice = optimizer.state_dict()
    assert_same_tree(once["state"], twice["state"])
    assert_same_tree(once["param_groups"] * 2, twice["param_groups"])


def test_state_dict_is_ordered_like_the_parameters(device, fused):
    """Also where the first gradients came in another order: keys are positions."""
    params = make_params(SHAPES, torch.float32, device)
    optimizer = CSGD([{"params": params[:1]}, {"params": params[1:]}], momentum=0.9, fused=fused)
    for k in (2, 0):
        params[k].grad = torch.full_like(params[k], k + 1.0)
        optimizer.step()
        params[k].grad = None
    state_dict = optimizer.state_dict()
    assert [group["params"] for group in state_dict["param_groups"]] == [[0], [1, 2]]
    assert set(state_dict["state"]) == {0, 2}
    for k in (0, 2):
        assert state_dict["state"][k]["momentum_buffer"].eq(k + 1).all()


@with_options()
def test_save_load_equality_with_weights_only(options, device, fused):
    """Nothing in a checkpoint needs pickle's powers, and a file changes nothing."""
    params, optimizer = trained(options, device, fused=fused)
    state_dict = optimizer.state_dict()
    loaded = through_a_file(state_dict)
    assert_same_tree(state_dict, loaded)
    twins = copies_of(params)
    second = optimizer_of(twins, other_options(options), fused=fused)
    second.load_state_dict(loaded)
    assert_same_tree(state_dict, second.state_dict())
    go_on(params, optimizer, seed=1)
    go_on(twins, second, seed=1)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, second))


@with_options(
    kind={
        "a float": float,
        "an int": int,
        "a tensor of one": lambda step: torch.tensor([float(step)]),
        "a tensor": torch.tensor,
    }
)
def test_load_nontensor_step(kind, options, device, fused):
    """A checkpoint may have counted in numbers, or in other tensors than ours."""
    params, optimizer = trained(options, device, fused=fused)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = kind(int(state["step"]))
    twins = copies_of(params)
    second = optimizer_of(twins, options, fused=fused)
    second.load_state_dict(state_dict)
    assert_same_tree(optimizer.state_dict(), second.state_dict())
    go_on(params, optimizer, seed=1)
    go_on(twins, second, seed=1)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, second))


@with_options()
def test_checkpoint_moves_between_devices(options, device, fused):
    """Saved on one device, loaded where the parameters are: the state lives there, with the same bits."""
    for here, there in (("cpu", device), (device, torch.device("cpu"))):
        params, optimizer = trained(options, here, fused=fused)
        moved = [param.detach().to(there).clone().requires_grad_() for param in params]
        second = optimizer_of(moved, options, fused=fused)
        second.load_state_dict(optimizer.state_dict())
        for param in moved:
            assert {tensor.device for tensor in second.state[param].values()} == {param.device}
        go_on(params, optimizer, seed=1)
        go_on(moved, second, seed=1)
        assert_same_snapshots(snapshot(params, optimizer), snapshot(moved, second))


@with_options()
def test_checkpoint_and_optimizer_share_nothing(options, device, fused):
    """Neither the steps of the loading optimizer nor a tensor learning rate reach the loaded dict."""
    params, optimizer = trained(options, device, fused=fused)
    loaded = through_a_file(optimizer.state_dict())
    before = copy.deepcopy(loaded)
    second = optimizer_of(copies_of(params), options, fused=fused)
    second.load_state_dict(loaded)
    go_on(second.param_groups[0]["params"], second, seed=1)
    lr = second.param_groups[0]["lr"]
    if isinstance(lr, torch.Tensor):
        lr.fill_(7.0)
    second.param_groups[0]["lr"] = 9.0
    assert_same_tree(before, loaded)


@with_options()
def test_loading_before_the_first_step(options, device, fused):
    """A checkpoint without state leaves none behind, and the next step is a first step."""
    params, optimizer = trained(options, device, steps=0, fused=fused)
    twins, second = trained(other_options(options), device, fused=fused)
    second.load_state_dict(optimizer.state_dict())
    assert not second.state
    with torch.no_grad():
        for twin, param in zip(twins, params, strict=True):
            twin.copy_(param)
    go_on(params, optimizer)
    go_on(twins, second)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_that_is_not_ours_is_loaded_as_torch_does(dtype, device, fused):
    """Kept under a key that is no parameter's; cast and moved where it is a parameter's, as a derived class may do."""
    loaded = []
    for cls, how in ((CSGD, {"fused": fused}), (torch.optim.SGD, {})):
        params = make_params(SHAPES, dtype, device)
        optimizer = cls(params, momentum=0.9, **how)
        go_on(params, optimizer)
        state_dict = optimizer.state_dict()
        state_dict["state"]["note"] = {"epoch": 3}
        extra = {"average": torch.linspace(0, 1, 5, dtype=torch.float64), "number": 2.5, "count": torch.arange(3)}
        state_dict["state"][0] = {**state_dict["state"][0], **extra}
        optimizer.load_state_dict(state_dict)
        assert optimizer.state["note"] == {"epoch": 3}
        loaded.append({name: optimizer.state[params[0]][name] for name in extra})
    assert loaded[0]["average"].device == params[0].device
    assert_same_tree(*loaded)
