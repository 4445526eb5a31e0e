# SPDX-License-Identifier: Apache-2.0
"""With calibration 0, CSGD is torch.optim.SGD, and CalibratedAdamW torch.optim.AdamW; and the first step always is."""

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import (
    DTYPES,
    TORCH_CLASS,
    USUAL_OPTIONS,
    assert_same_bits,
    make_params,
    set_grads,
)

SHAPES = [(3,), (64, 9), (257,), (4, 3, 5, 5), (), (40000,)]

# torch contracts some products and sums into one rounding, we round each: they drift apart by a few units in the
# last place per step. In bfloat16 and float16, torch rounds after every operation, we once.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 6e-2, torch.float16: 8e-3}

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.05},
    "maximize": {"momentum": 0.5, "maximize": True},
    "all but nesterov": {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.01, "maximize": True},
    "nesterov and weight decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
}


def assert_close(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, b.detach().double().abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a.detach().double(), b.detach().double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
        )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_calibration_is_sgd(options, dtype, device, fused):
    ours, theirs = make_params(SHAPES, dtype, device), make_params(SHAPES, dtype, device)
    csgd = CSGD(ours, lr=0.01, calibration=0.0, rounding="nearest", fused=fused, **options)
    sgd = torch.optim.SGD(theirs, lr=0.01, foreach=False, **options)
    for step in range(8):
        for params, optimizer in ((ours, csgd), (theirs, sgd)):
            set_grads(params, seed=step)
            optimizer.step()
    assert_close(ours, theirs, dtype)
    if "momentum" in options:
        buffers = [[o.state[p]["momentum_buffer"] for p in ps] for o, ps in ((csgd, ours), (sgd, theirs))]
        assert_close(*buffers, dtype)
    assert csgd.overall_density() == 1.0


def test_zero_calibration_without_products_has_the_bits_of_sgd(device, fused):
    """lr = 1 and no other option: nothing that could be contracted, so float32 must agree exactly."""
    ours, theirs = make_params(SHAPES, torch.float32, device), make_params(SHAPES, torch.float32, device)
    csgd, sgd = CSGD(ours, lr=1.0, calibration=0.0, fused=fused), torch.optim.SGD(theirs, lr=1.0, foreach=False)
    for params, optimizer in ((ours, csgd), (theirs, sgd)):
        set_grads(params, seed=1)
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


SET_LATER = [
    {"lr": -1e-19},
    {"lr": -0.1},
    {"lr": torch.tensor(-0.1)},
    {"momentum": -0.5},
    {"momentum": 0},
    {"momentum": 0.0, "dampening": 0.5},
    {"dampening": 0.5},
    {"weight_decay": -0.05},
]


@pytest.mark.parametrize("options", SET_LATER, ids=str)
def test_what_only_the_constructor_refuses_is_stepped_as_sgd_does(options, device, fused):
    """Schedulers come to such options by rounding errors, and to a momentum of 0 under nesterov; and back."""
    both = []
    for cls, own in ((CSGD, {"calibration": 0.0, "fused": fused}), (torch.optim.SGD, {"foreach": False})):
        params = make_params(SHAPES, torch.float64, device)
        optimizer = cls(params, lr=0.1, momentum=0.9, nesterov=True, **own)
        before = {name: optimizer.param_groups[0][name] for name in options}
        for step in range(6):
            optimizer.param_groups[0].update(options if step in (0, 2, 3) else before)
            set_grads(params, seed=step)
            optimizer.step()
        both.append(params)
    assert_close(*both, torch.float64)


ADAMW_OPTIONS = {
    "defaults": {},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay": {"weight_decay": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "betas and eps": {"betas": (0.5, 0.8), "eps": 1e-3},
    "betas as tensors": {"betas": (torch.tensor(0.875).double(), torch.tensor(0.75).double())},
    "betas of 0": {"betas": (0.0, 0.0), "eps": 1e-2},
}
# After 20 steps. The mean of the gradients loses what cancels: its error is that of its largest terms.
ADAMW_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("options", ADAMW_OPTIONS.values(), ids=ADAMW_OPTIONS.keys())
@pytest.mark.parametrize("dtype", ADAMW_TOLERANCE, ids=str)
def test_zero_calibration_is_adamw(options, dtype, device, fused):
    ours, theirs = make_params(SHAPES, dtype, device), make_params(SHAPES, dtype, device)
    adamw = CalibratedAdamW(ours, lr=0.01, calibration=0.0, fused=fused, **options)
    torchs = torch.optim.AdamW(theirs, lr=0.01, foreach=False, **options)
    for step in range(20):
        for params, optimizer in ((ours, adamw), (theirs, torchs)):
            set_grads(params, seed=step)
            optimizer.step()
    tolerance = {"rtol": ADAMW_TOLERANCE[dtype], "atol": ADAMW_TOLERANCE[dtype]}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(adamw.state[a][name], torchs.state[b][name], **tolerance)
    assert adamw.overall_density() == 1.0


def assert_equal_to_rounding(ours, theirs):
    """Of float64."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_first_step_is_that_of_torch(device, fused, optimizer_class):
    """A fresh parameter has no bound yet, so every coordinate moves."""
    options = USUAL_OPTIONS[optimizer_class]
    ours, theirs = make_params(SHAPES, torch.float64, device), make_params(SHAPES, torch.float64, device)
    for params, optimizer in (
        (ours, optimizer_class(ours, fused=fused, **options)),
        (theirs, TORCH_CLASS[optimizer_class](theirs, foreach=False, **options)),
    ):
        set_grads(params, seed=1)
        optimizer.step()
    assert_equal_to_rounding(ours, theirs)


TRAINED_OPTIONS = {
    CSGD: {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
    CalibratedAdamW: {"lr": 0.1, "betas": (0.8, 0.99), "weight_decay": 0.1},
}


def test_goes_on_from_a_checkpoint_of_torch(device, fused, optimizer_class):
    """The step after loading the state of torch's optimizer is that optimizer's next step, exactly."""
    ours, theirs = make_params(SHAPES, torch.float64, device), make_params(SHAPES, torch.float64, device)
    torchs = TORCH_CLASS[optimizer_class](theirs, foreach=False, **TRAINED_OPTIONS[optimizer_class])
    for step in range(3):
        set_grads(theirs, seed=step)
        torchs.step()
    calibrated = optimizer_class(ours, fused=fused)
    calibrated.load_state_dict(torchs.state_dict())
    assert calibrated.param_groups[0]["fused"] is fused  # not that of the other optimizer
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    for params, optimizer in ((ours, calibrated), (theirs, torchs)):
        set_grads(params, seed=3)
        optimizer.step()
    assert_equal_to_rounding(ours, theirs)
    set_grads(ours, seed=4)
    calibrated.step()
    assert list(calibrated.density().values())[-1] < 0.5 + 0.4 * (optimizer_class is CalibratedAdamW)  # calibrated


def test_mean_of_many_seeds_is_sgd(device, fused):
    """The mean over independent calibrated steps approaches the exact step, within 6 standard deviations."""
    n, seeds, lr = 2000, 400, 0.1
    # No tiny gradients: 400 seeds would hit them too seldom for a normal distribution.
    grad = torch.linspace(0.1, 1.0, n, dtype=torch.float64, device=device)
    bound = 1.0
    total = torch.zeros(n, dtype=torch.float64, device=device)
    for seed in range(seeds):
        param = torch.zeros(n, dtype=torch.float64, device=device, requires_grad=True)
        param.grad = grad
        CSGD([param], lr=lr, lipschitz=bound, seed=seed, fused=fused).step()
        total += param.detach()
    deviation = lr * (grad.abs() * (bound - grad.abs()) / seeds).sqrt()
    assert ((total / seeds + lr * grad).abs() <= 6 * deviation + 1e-12).all()
