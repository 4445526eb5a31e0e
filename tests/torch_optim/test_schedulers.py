# SPDX-License-Identifier: Apache-2.0
"""Every learning-rate scheduler of torch drives CSGD as it drives torch.optim.SGD."""

import copy
import inspect

import pytest
import torch
from torch.optim import lr_scheduler as s
from torch.optim.swa_utils import SWALR

from csgd_cuda import CSGD

from ..helpers import assert_same_snapshots, make_params, set_grads, snapshot
from ..pairs import BACKENDS, by_pairs
from .common import model_of, optimizer_of
from .info import INFO
from .options import with_options

STEPS = 12
OPTIONS = {"lr": 0.004, "momentum": 0.5, "nesterov": True}

# Each changes the learning rate within the steps above.
SCHEDULERS = {
    s.LambdaLR: lambda o: s.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    s.MultiplicativeLR: lambda o: s.MultiplicativeLR(o, lambda epoch: 0.9),
    s.StepLR: lambda o: s.StepLR(o, step_size=3, gamma=0.5),
    s.MultiStepLR: lambda o: s.MultiStepLR(o, milestones=[2, 7], gamma=0.3),
    s.ConstantLR: lambda o: s.ConstantLR(o, factor=0.4, total_iters=4),
    s.LinearLR: lambda o: s.LinearLR(o, start_factor=0.4, end_factor=0.8, total_iters=8),
    s.ExponentialLR: lambda o: s.ExponentialLR(o, gamma=0.8),
    s.SequentialLR: lambda o: s.SequentialLR(
        o, [s.ConstantLR(o, factor=0.1, total_iters=4), s.ExponentialLR(o, gamma=0.9)], milestones=[4]
    ),
    s.PolynomialLR: lambda o: s.PolynomialLR(o, total_iters=10, power=0.9),
    s.CosineAnnealingLR: lambda o: s.CosineAnnealingLR(o, T_max=10),
    s.ChainedScheduler: lambda o: s.ChainedScheduler([s.StepLR(o, step_size=2), s.ExponentialLR(o, gamma=0.9)]),
    s.ReduceLROnPlateau: lambda o: s.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    s.CyclicLR: lambda o: s.CyclicLR(o, base_lr=0.001, max_lr=0.005, step_size_up=3),  # and the momentum
    s.CosineAnnealingWarmRestarts: lambda o: s.CosineAnnealingWarmRestarts(o, T_0=5),
    s.OneCycleLR: lambda o: s.OneCycleLR(o, max_lr=0.008, total_steps=STEPS + 1),  # and the momentum
    SWALR: lambda o: SWALR(o, swa_lr=0.001, anneal_epochs=5),
}
# Schedules that go to the end: where torch's formula for lr ends at -4e-19 instead of 0, and where there is no
# momentum left for nesterov.
TO_ZERO = {
    "LinearLR to 0": lambda o: s.LinearLR(o, start_factor=1 / 3, end_factor=0.0, total_iters=10),
    "CyclicLR, momentum to 0": lambda o: s.CyclicLR(
        o, base_lr=0.001, max_lr=0.005, step_size_up=3, base_momentum=0.0, max_momentum=0.5
    ),
    "OneCycleLR, momentum to 0": lambda o: s.OneCycleLR(
        o, max_lr=0.008, total_steps=STEPS + 1, pct_start=6 / 13, base_momentum=0.0, max_momentum=0.5
    ),
}
# What PyTorch's tests run SGD with, some of them several on top of each other.
COMBINATIONS = {f"of SGD's info, {k}": makers for k, makers in enumerate(INFO.scheduler_inputs)}
NAMED = {cls.__name__: maker for cls, maker in SCHEDULERS.items()} | TO_ZERO
CASES = {name: [maker] for name, maker in NAMED.items()} | COMBINATIONS


def test_no_scheduler_of_torch_is_missing():
    found = {
        cls
        for _, cls in inspect.getmembers(s, inspect.isclass)
        if issubclass(cls, s.LRScheduler) and cls is not s.LRScheduler and not cls.__name__.startswith("_")
    }
    assert found <= set(SCHEDULERS)


def scheduled(groups, cls, makers, loss=None, lr=OPTIONS["lr"], **options):
    """Steps and schedules; returns what every step found in its groups, and the optimizer."""
    optimizer = cls(groups, **{**OPTIONS, "lr": lr, **options})
    schedulers = [maker(optimizer) for maker in makers]
    found = []
    for step in range(STEPS):
        found.append([(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups])
        if loss is None:
            set_grads([p for group in optimizer.param_groups for p in group["params"]], seed=step)
        value = optimizer.step(loss)
        for scheduler in schedulers:
            if isinstance(scheduler, s.ReduceLROnPlateau):
                scheduler.step(1.0 if value is None else value)
            else:
                scheduler.step()
    return found, optimizer


def two_groups(device):
    params = make_params([(70,), (1000,)], torch.float64, device)
    return params, [{"params": params[:1], "lr": 0.002}, {"params": params[1:]}]


@by_pairs(makers=CASES, calibration=[0.0, 1.0], fused=BACKENDS, indirect=["fused"])
def test_param_group_with_lrscheduler_goes_right_direction(makers, calibration, device, fused):
    weight, bias, loss = model_of(device)
    groups = [{"params": [weight], "lr": 0.002}, {"params": [bias]}]
    before = loss().item()
    scheduled(groups, CSGD, makers, loss, calibration=calibration, fused=fused)
    assert loss().item() < before


@with_options(optimizers=[CSGD])
def test_param_group_with_lrscheduler_goes_right_direction_with_all_inputs(options, device, fused):
    """Under each of the schedules that PyTorch's tests run SGD with."""
    for makers in COMBINATIONS.values():
        weight, bias, loss = model_of(device)
        before = loss().item()
        groups = [{"params": [weight], "lr": 0.002}, {"params": [bias]}]
        scheduled(groups, CSGD, makers, loss, **{**OPTIONS, "nesterov": False, **copy.deepcopy(options)}, fused=fused)
        assert (loss().item() > before) == options.get("maximize", False)


@pytest.mark.parametrize("makers", CASES.values(), ids=CASES.keys())
def test_lrscheduler_sets_what_it_sets_in_sgd(makers, device, fused):
    """Learning rate and momentum of every step, exactly; and without calibration the parameters follow."""
    ours, groups = two_groups(device)
    found, _ = scheduled(groups, CSGD, makers, calibration=0.0, fused=fused)
    theirs, groups = two_groups(device)
    expected, _ = scheduled(groups, torch.optim.SGD, makers)
    assert found == expected
    assert len(set(map(tuple, found))) > 1  # it did schedule something
    if makers[0] in TO_ZERO.values():
        assert min(min(values) for step in found for values in step) <= 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@by_pairs(makers=CASES, tensor_lr=[False, True], fused=BACKENDS, indirect=["fused"])
def test_step_uses_what_the_scheduler_set(makers, tensor_lr, device, fused):
    """With calibration, too: the same bits as with the values of each step set by hand."""
    params, groups = two_groups(device)
    lr = OPTIONS["lr"]
    if tensor_lr:
        lr, groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64), torch.tensor(0.002, dtype=torch.float64)
    found, optimizer = scheduled(groups, CSGD, makers, lr=lr, calibration=1.0, fused=fused)
    assert isinstance(optimizer.param_groups[1]["lr"], torch.Tensor) == tensor_lr
    by_hand, groups = two_groups(device)
    second = optimizer_of(groups, OPTIONS, calibration=1.0, fused=fused)
    for step, values in enumerate(found):
        for group, (lr, momentum) in zip(second.param_groups, values, strict=True):
            group["lr"], group["momentum"] = lr, momentum
        set_grads(by_hand, seed=step)
        second.step()
    assert_same_snapshots(snapshot(params, optimizer), snapshot(by_hand, second))
