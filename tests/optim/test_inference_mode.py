# SPDX-License-Identifier: Apache-2.0
"""What is made inside torch.inference_mode() can be used outside, as with torch.optim.SGD."""

import copy

import pytest
import torch
from torch import nn

from csgd_cuda import CSGD, CalibratedAdamW, GradientCalibration, calibrate

from ..helpers import (
    TORCH_CLASS,
    USUAL_OPTIONS,
    assert_same_bits,
    assert_same_snapshots,
    make_params,
    set_grads,
    snapshot,
)

SHAPES = [(40, 3), (7,)]
PRUNED = {"sparsity": 0.5, "regrow": False}
CASES = [(CSGD, options) for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, **PRUNED}, {"lr": torch.tensor(0.1)})]
CASES += [(CalibratedAdamW, {}), (CalibratedAdamW, {"lr": torch.tensor(0.1), **PRUNED})]
LATER = {CSGD: {"momentum": 0.8}, CalibratedAdamW: {"betas": (0.8, 0.9)}}


def trained(inside, optimizer_class, options, fused, dtype=torch.float32):
    """Four steps, of which those in ``inside`` are made in inference mode; from the third on with the options of LATER:
    momentum may be new then."""
    params = make_params(SHAPES, dtype)
    optimizer = optimizer_class(params, **{"lr": 0.1, **options}, fused=fused)
    for step in range(4):
        set_grads(params, seed=step)
        if step == 2:
            optimizer.param_groups[0].update(LATER[optimizer_class])
        with torch.inference_mode(step in inside):
            optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", [{0}, {1}, {0, 2}, {0, 1, 2, 3}], ids=str)
@pytest.mark.parametrize(("optimizer_class", "options"), CASES, ids=str)
def test_steps_inside_and_outside_have_the_same_bits(optimizer_class, options, inside, dtype, fused):
    params, optimizer = trained(inside, optimizer_class, options, fused, dtype)
    outside = trained((), optimizer_class, options, fused, dtype)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(*outside))
    for state in optimizer.state.values():
        assert not any(tensor.is_inference() for tensor in state.values())


@pytest.mark.parametrize("of_torch", [False, True])
def test_a_checkpoint_loaded_inside_can_be_trained_outside(of_torch, fused, optimizer_class):
    params, options = make_params(SHAPES, torch.float32), USUAL_OPTIONS[optimizer_class]
    optimizer = (TORCH_CLASS[optimizer_class] if of_torch else optimizer_class)(params, **options)
    set_grads(params, seed=0)
    with torch.inference_mode():
        optimizer.step()
    results = []
    for inside in (True, False):
        twins = [param.detach().clone().requires_grad_() for param in params]
        loaded = optimizer_class(twins, **options, fused=fused)
        with torch.inference_mode(inside):
            loaded.load_state_dict(optimizer.state_dict())
        set_grads(twins, seed=1)
        loaded.step()
        results.append(snapshot(twins, loaded))
    assert_same_snapshots(*results)


def test_groups_and_masks_made_inside_can_be_trained_outside(fused, optimizer_class):
    results = []
    for inside in (True, False):
        params = make_params(SHAPES, torch.float32)
        with torch.inference_mode(inside):
            optimizer = optimizer_class(params[1:], **USUAL_OPTIONS[optimizer_class], fused=fused)
            optimizer.add_param_group({"params": params[:1], "sparsity": 0.5, "regrow": False})
            optimizer.threshold()
            optimizer.load_state_dict(optimizer.state_dict())
        for step in range(2):
            set_grads(params, seed=step)
            optimizer.step()
        copied = copy.deepcopy(optimizer)
        assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        results.append([*snapshot(params, optimizer), ("mask", optimizer.state[params[0]]["mask"])])
    assert_same_snapshots(*results)


def gradients_of(model):
    model.zero_grad()
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(5, 4)).square().sum().backward()
    return [param.grad for param in model.parameters()]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("where", ["weight", "output"])
def test_layers_made_inside_can_be_trained_outside(where, per_channel):
    results = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        with torch.inference_mode(inside):
            calibrate(model, where=where, per_channel=per_channel)
            model.append(GradientCalibration(index=9))
            model(torch.ones(2, 4))
            model.load_state_dict(copy.deepcopy(model.state_dict()))
        results.append(gradients_of(model))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_a_layer_cast_inside_can_be_used_outside():
    layer = GradientCalibration()
    with torch.inference_mode():
        layer.to(torch.float16).to_empty(device="cpu")
        layer.number(5)
    x = torch.ones(3, requires_grad=True)
    layer(x).sum().backward()
    assert int(layer.step) == 1
    assert not any(buffer.is_inference() for buffer in layer.buffers())
