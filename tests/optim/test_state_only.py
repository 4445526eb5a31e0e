# SPDX-License-Identifier: Apache-2.0
"""A step that only makes state, as torch.distributed.checkpoint makes it, leaves all else as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import DTYPES, assert_same_bits, assert_same_snapshots, make_params, set_grads, snapshot, why_no_kernel

SHAPES = [(40, 3), (7,), (16, 8)]
OPTIONS = {
    "momentum": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "plain": {},
    "fixed constant": {"momentum": 0.9, "lipschitz": 0.5},
    "sparsity": {"momentum": 0.9, "sparsity": 0.9},
    "schedule": {"momentum": 0.9, "sparsity": 0.5, "sparsity_schedule": ("cubic", 1, 4), "threshold_every": 2},
    "masks": {"momentum": 0.9, "sparsity": 0.5, "regrow": False},
    "filters": {"sparsity": 0.5, "structure": "filter", "regrow": False, "dropped_momentum": "keep"},
}  # fmt: skip


OF_ADAMW = {
    "AdamW": {"weight_decay": 0.1},
    "AdamW, fixed constant": {"lipschitz": 0.5},
    "AdamW, schedule": {"sparsity": 0.5, "sparsity_schedule": ("cubic", 1, 4), "threshold_every": 2},
    "AdamW, masks": {"sparsity": 0.5, "regrow": False},
}
OPTIONS |= {name: {"optimizer": CalibratedAdamW, **options} for name, options in OF_ADAMW.items()}


def new(options, dtype=torch.float32, device="cpu", **more):
    params = make_params(SHAPES, dtype, device)
    return params, optimizer_of(params, options, device, **more)


def optimizer_of(params, options, device="cpu", **more):
    options = {"lr": 0.1, "seed": 3, **options, **more}
    optimizer_class = options.pop("optimizer", CSGD)
    if options.get("fused") and why_no_kernel(device) is not None:
        pytest.skip(f"no kernel: {why_no_kernel(device)}")
    return optimizer_class(params, **options)


def make_state_only(params, optimizer, zero=0.0):
    """What torch.distributed.checkpoint does."""
    for param in params:
        param.grad = torch.zeros_like(param)
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = zero
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


def go_on(params, optimizer, steps=3):
    for step in range(steps):
        set_grads(params, seed=step)
        optimizer.step()


@pytest.mark.parametrize("zero", [0, -0.0, torch.tensor(0.0), torch.tensor([0.0])], ids=str)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_training_after_it_has_the_bits_of_one_without_it(options, dtype, times, zero, device, fused):
    params, optimizer = new(options, dtype, device, fused=fused)
    before = [param.detach().clone() for param in params]
    for _ in range(times):
        make_state_only(params, optimizer, zero)
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old)
        state = optimizer.state[param]
        names = {"step", "lipschitz_bound", *optimizer.direction.buffers_for(optimizer.param_groups[0])}
        names -= {"lipschitz_bound"} if "lipschitz" in options else set()
        assert set(state) - {"mask"} == names
        assert all(not state[name].any() for name in names)
        assert ("mask" in state) == (not options.get("regrow", True) and param.dim() > 1)
        assert state.get("mask", torch.ones(1)).all()
    assert optimizer.param_groups[0]["threshold_step"] == 0
    twins, undisturbed = new(options, dtype, device, fused=fused)
    go_on(params, optimizer)
    go_on(twins, undisturbed)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, undisturbed))
    assert optimizer.param_groups[0]["threshold_step"] == undisturbed.param_groups[0]["threshold_step"]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_state_dicts_of_distributed_checkpoint_leave_the_optimizer_as_it_was(options, tensor_lr, fused):
    """Read from a fresh optimizer, and loaded into one, with the state of a training."""
    lr = torch.tensor(0.1) if tensor_lr else 0.1

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        return model, optimizer_of(model.parameters(), options, lr=lr, fused=fused)

    def trained(model, optimizer, steps):
        go_on(list(model.parameters()), optimizer, steps)
        return snapshot(model.parameters(), optimizer)

    model, optimizer = made()
    weights = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, weights[name], name)
    reference_model, reference = made()
    assert_same_snapshots(trained(model, optimizer, 3), trained(reference_model, reference, 3))
    other_model, other = made()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, get_optimizer_state_dict(model, optimizer))
    assert other.param_groups[0]["threshold_step"] == reference.param_groups[0]["threshold_step"]
    assert_same_snapshots(trained(other_model, other, 2), trained(reference_model, reference, 2))


def test_warm_up_from_zero_with_gradients_is_a_step(device, fused):
    """As in torch.optim.SGD: the momentum takes the gradient. The bound is found."""
    params, optimizer = new({"momentum": 0.9, "sparsity": 0.5}, device=device, fused=fused)
    scheduler = LambdaLR(optimizer, lambda step: step / 10)
    set_grads(params, seed=0)
    optimizer.step()
    scheduler.step()
    for param in params:
        assert_same_bits(optimizer.state[param]["momentum_buffer"][param != 0], param.grad[param != 0])
        assert int(optimizer.state[param]["step"]) == 1
        assert optimizer.state[param]["lipschitz_bound"] == param.grad.abs().max()
    assert optimizer.param_groups[0]["threshold_step"] == 1


@pytest.mark.parametrize("value", [1e-30, float("nan"), float("inf")])
def test_a_single_element_makes_a_gradient(value, device, fused):
    params, optimizer = new({"momentum": 0.9}, device=device, fused=fused, lr=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    params[2].grad[-1, -1] = value
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [0, 0, 1]


def test_zeros_are_a_gradient_where_the_learning_rate_is_not_zero_and_after_the_first_step(device, fused):
    params, optimizer = new({"momentum": 0.9}, device=device, fused=fused)
    for step, lr in enumerate((0.1, 0.0, 0.0), start=1):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert [int(optimizer.state[param]["step"]) for param in params] == [step] * 3


def test_a_parameter_that_joins_with_zeros_leaves_the_steps_of_the_others(device, fused):
    """It counts as one without a gradient, in a group of others and in one of its own."""
    results = []
    for joins in (False, True):
        params = make_params([*SHAPES, (30, 2)], torch.float32, device)
        groups = [{"params": params[:3]}, {"params": params[3:], "sparsity": 0.5}]
        optimizer = CSGD(groups, lr=0.1, momentum=0.9, sparsity=0.25, fused=fused)
        params[1].requires_grad_(False)
        set_grads([params[0], params[2]], seed=0)
        optimizer.step()
        counts = [group["threshold_step"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        params[1].requires_grad_()
        if joins:
            params[1].grad, params[3].grad = torch.zeros_like(params[1]), torch.zeros_like(params[3])
        optimizer.step()
        if joins:
            assert [int(optimizer.state[params[k]]["step"]) for k in (1, 3)] == [0, 0]
            assert optimizer.param_groups[1]["threshold_step"] == counts[1]
        optimizer.param_groups[1]["threshold_step"] = 0  # a group without any gradients counts its steps
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        go_on(params, optimizer)
        results.append(snapshot(params[:3], optimizer))
    assert_same_snapshots(*results)


def test_errors_are_those_of_a_step(fused):
    params, optimizer = new({"momentum": 0.9}, fused=fused, lr=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["momentum"] = float("nan")
    with pytest.raises(ValueError, match="momentum must be a finite number"):
        optimizer.step()
    assert not optimizer.state


def test_copies_and_checkpoints_of_the_state_begin_as_a_fresh_optimizer(device, fused):
    params, optimizer = new({"momentum": 0.9, "dampening": 0.5}, device=device, fused=fused)
    make_state_only(params, optimizer)
    twins, loaded = new({}, device=device, fused=fused)
    loaded.load_state_dict(optimizer.state_dict())
    make_state_only(twins, loaded)
    go_on(params, optimizer)
    go_on(twins, loaded)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, loaded))
