# SPDX-License-Identifier: Apache-2.0
"""Training goes the way it should: down, up with maximize, and as each group's options say."""

import math

import torch

from ..helpers import TORCH_CLASS, assert_same_snapshots, make_params, set_grads, snapshot
from .common import go_on, model_of, optimizer_of
from .options import class_of, of_torch, with_options

STEPS = 10


def progress(params, optimizer, loss):
    """How far log(loss) went down."""
    before = loss().item()
    for _ in range(STEPS):
        optimizer.step(loss)
    return math.log(before) - math.log(loss().item())


@with_options(dtype=[torch.float32, torch.bfloat16], contiguous=[True, False])
def test_forloop_goes_right_direction(dtype, contiguous, options, device, fused):
    """Down, or up with maximize, about as far as torch's optimizer does on the same problem.

    bfloat16 parameters move less than their spacing in these steps, so only stochastic rounding gets them anywhere;
    torch's optimizer is given the float32 problem.
    """
    weight, bias, loss = model_of(device, dtype, contiguous=contiguous)
    ours = progress([weight, bias], optimizer_of([weight, bias], options, fused=fused), loss)
    assert (ours < 0) == options.get("maximize", False)
    if dtype.itemsize == 2 and options.get("rounding") == "nearest":
        return
    weight, bias, loss = model_of(device)
    torchs = TORCH_CLASS[class_of(options)]([weight, bias], **of_torch(options))
    theirs = progress([weight, bias], torchs, loss)
    # A calibrated step is right in the mean only; 2112 coordinates are a mean of a kind.
    assert abs(ours / theirs - 1) < (0.25 if options.get("calibration", 1) else 0.02 if dtype.itemsize > 2 else 0.1)


@with_options()
def test_maximizing_is_minimizing_the_negative(options, device, fused):
    """Of the gradient alone: weight decay pulls to zero either way."""
    results = []
    for sign in (1, -1):
        params = make_params([(70,), (1000,)], torch.float32, device)
        maximize = options.get("maximize", False) == (sign == 1)
        optimizer = optimizer_of(params, {**options, "maximize": maximize}, fused=fused)
        for step in range(3):
            set_grads(params, seed=step)
            for param in params:
                param.grad *= sign
            optimizer.step()
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)


@with_options(odd=[{"weight_decay": 0.375}, {"lr": 0.0625}, {"lr": torch.tensor(0.0625)}])
def test_param_groups_have_their_own(odd, options, device, fused):
    """param_groups_weight_decay, param_groups_lr: the bits of an optimizer in which the other group is the odd one."""
    ((option, value),) = odd.items()
    results = []
    default = {"weight_decay": 0, "lr": 1e-3}[option]
    for first_is_odd in (True, False):
        params = make_params([(70,), (1000,)], torch.float32, device)
        common = options.get(option, default)
        if first_is_odd:
            groups = [{"params": params[:1], option: value}, {"params": params[1:]}]
            optimizer = optimizer_of(groups, {**options, option: common}, fused=fused)
        else:
            groups = [{"params": params[:1]}, {"params": params[1:], option: common}]
            optimizer = optimizer_of(groups, {**options, option: value}, fused=fused)
        assert optimizer.param_groups[0][option] == value
        assert optimizer.param_groups[1][option] == common
        go_on(params, optimizer, steps=3)
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)


@with_options()
def test_param_groups_of_equal_options_are_one_group(options, device, fused):
    """Random draws go by the position over all groups, so how the parameters are grouped is not seen in the bits."""
    results = []
    for split in (0, 1, 3):
        params = make_params([(70,)] * 4, torch.float32, device)
        groups = [{"params": part} for part in (params[:split], params[split:]) if part]
        optimizer = optimizer_of(groups, options, fused=fused)
        go_on(params, optimizer, steps=3)
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(results[0], results[1])
    assert_same_snapshots(results[0], results[2])


@with_options()
def test_param_groups_weight_decay_acts_on_its_group_alone(options, device, fused):
    """With zero gradients: one group shrinks, by the factor of SGD, and the other stays, bit for bit."""
    lr = float(options.get("lr", 1e-3))
    params = make_params([(70,), (1000,)], torch.float64, device)
    before = [param.detach().clone() for param in params]
    optimizer = optimizer_of(
        [{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:], "weight_decay": 0}], options, fused=fused
    )
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    if options.get("lipschitz") is None:  # the first step is exact
        factor = 1 - lr * 0.5 * (1 + (options["momentum"] if options.get("nesterov") else 0))
        torch.testing.assert_close(params[0].detach(), before[0] * factor, rtol=1e-7, atol=0)
    assert ((before[0] - params[0].detach()) * before[0] >= 0).all()  # toward zero, if anywhere
    if next(iter(optimizer.density().values())) > 0:  # with the largest T none of 70 may move
        assert params[0].detach().norm() < before[0].norm()
    assert torch.equal(params[1], before[1])


@with_options()
def test_param_groups_lr_of_zero_freezes_its_group(options, device, fused):
    """Its momentum and bound go on."""
    params = make_params([(70,), (1000,)], torch.bfloat16, device)
    before = [param.detach().clone() for param in params]
    optimizer = optimizer_of([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], options, fused=fused)
    go_on(params, optimizer, steps=3)
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert int(optimizer.state[params[0]]["step"]) == 3


@with_options()
def test_param_groups_make_progress_together(options, device, fused):
    """Both terms of the loss, with another learning rate and weight decay for one group."""
    weight, bias, loss = model_of(device)
    groups = [{"params": [weight], "lr": 0.004, "weight_decay": 0.05}, {"params": [bias]}]
    optimizer = optimizer_of(groups, options, fused=fused)
    assert (progress([weight, bias], optimizer, loss) < 0) == options.get("maximize", False)
