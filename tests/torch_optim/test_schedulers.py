# SPDX-License-Identifier: Apache-2.0
"""Every learning-rate scheduler of torch drives our optimizers as it drives torch's, and resumes with them."""

import copy
import inspect

import pytest
import torch
from torch.optim import lr_scheduler as s
from torch.optim.swa_utils import SWALR

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import OPTIMIZERS, TORCH_CLASS, assert_same_snapshots, make_params, set_grads, snapshot
from ..pairs import BACKENDS, by_pairs
from .common import model_of
from .info import INFOS
from .options import class_of, with_options, without_class

STEPS, PAUSE, LR = 12, 5, 0.004
OPTIONS = {CSGD: {"lr": LR, "momentum": 0.5, "nesterov": True}, CalibratedAdamW: {"lr": LR, "betas": (0.5, 0.9)}}

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
    s.CyclicLR: lambda o: s.CyclicLR(o, base_lr=0.001, max_lr=0.005, step_size_up=3),  # and the momentum, or beta1
    s.CosineAnnealingWarmRestarts: lambda o: s.CosineAnnealingWarmRestarts(o, T_0=5),
    s.OneCycleLR: lambda o: s.OneCycleLR(o, max_lr=0.008, total_steps=STEPS + 1),  # and the momentum, or beta1
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
NAMED = {cls.__name__: maker for cls, maker in SCHEDULERS.items()} | TO_ZERO


def combinations(optimizer_class):
    """What PyTorch's tests run the optimizer with, some of them several on top of each other."""
    return {f"of torch's info, {k}": makers for k, makers in enumerate(INFOS[optimizer_class].scheduler_inputs)}


# (optimizer, what makes its schedulers)
CASES = {
    f"{cls.__name__}-{name}": (cls, makers)
    for cls in OPTIMIZERS
    for name, makers in ({name: [maker] for name, maker in NAMED.items()} | combinations(cls)).items()
}
every_case = pytest.mark.parametrize(("optimizer_class", "makers"), CASES.values(), ids=CASES.keys())


def test_no_scheduler_of_torch_is_missing():
    found = {
        cls
        for _, cls in inspect.getmembers(s, inspect.isclass)
        if issubclass(cls, s.LRScheduler) and cls is not s.LRScheduler and not cls.__name__.startswith("_")
    }
    assert found <= set(SCHEDULERS)


def values_of(group):
    """What schedulers change in a group."""
    return {
        name: float(group[name]) if name == "lr" else group[name]
        for name in ("lr", "momentum", "betas")
        if name in group
    }


def run(optimizer, schedulers, steps=range(STEPS), loss=None):
    """Steps and schedules; returns what every step found in its groups."""
    found = []
    for step in steps:
        found.append([values_of(group) for group in optimizer.param_groups])
        if loss is None:
            set_grads([p for group in optimizer.param_groups for p in group["params"]], seed=step)
        value = optimizer.step(loss)
        for scheduler in schedulers:
            if isinstance(scheduler, s.ReduceLROnPlateau):
                scheduler.step(1.0 if value is None else value)
            else:
                scheduler.step()
    return found


def scheduled(optimizer, makers, **run_with):
    return run(optimizer, [maker(optimizer) for maker in makers], **run_with)


def two_groups(device):
    """(parameters, groups of them)"""
    params = make_params([(70,), (1000,)], torch.float64, device)
    return params, [{"params": params[:1], "lr": 0.002}, {"params": params[1:]}]


@by_pairs(case=CASES, calibration=[0.0, 1.0], fused=BACKENDS, indirect=["fused"])
def test_param_group_with_lrscheduler_goes_right_direction(case, calibration, device, fused):
    optimizer_class, makers = case
    weight, bias, loss = model_of(device)
    groups = [{"params": [weight], "lr": 0.002}, {"params": [bias]}]
    before = loss().item()
    optimizer = optimizer_class(groups, **OPTIONS[optimizer_class], calibration=calibration, fused=fused)
    scheduled(optimizer, makers, loss=loss)
    assert loss().item() < before


@with_options()
def test_param_group_with_lrscheduler_goes_right_direction_with_all_inputs(options, device, fused):
    """Under each of the schedules that PyTorch's tests run the optimizer with."""
    optimizer_class = class_of(options)
    for makers in combinations(optimizer_class).values():
        weight, bias, loss = model_of(device)
        before = loss().item()
        groups = [{"params": [weight], "lr": 0.002}, {"params": [bias]}]
        optimizer = optimizer_class(groups, **{"lr": LR, **copy.deepcopy(without_class(options))}, fused=fused)
        scheduled(optimizer, makers, loss=loss)
        assert (loss().item() > before) == options.get("maximize", False)


@every_case
def test_lrscheduler_sets_what_it_sets_in_torch(optimizer_class, makers, device, fused):
    """Learning rate and momentum or betas of every step, exactly; and without calibration the parameters follow."""
    results = []
    for cls, own in ((optimizer_class, {"calibration": 0.0, "fused": fused}), (TORCH_CLASS[optimizer_class], {})):
        params, groups = two_groups(device)
        results.append((scheduled(cls(groups, **OPTIONS[optimizer_class], **own), makers), params))
    (found, ours), (expected, theirs) = results
    assert found == expected
    assert any(step != found[0] for step in found)  # it did schedule something
    if makers[0] in TO_ZERO.values():
        lowest = (min(v["lr"], v["momentum"] if "momentum" in v else v["betas"][0]) for step in found for v in step)
        assert min(lowest) <= 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@by_pairs(case=CASES, tensor_lr=[False, True], fused=BACKENDS, indirect=["fused"])
def test_step_uses_what_the_scheduler_set(case, tensor_lr, device, fused):
    """With calibration, too: the same bits as with the values of each step set by hand."""
    optimizer_class, makers = case
    options = {**OPTIONS[optimizer_class], "calibration": 1.0, "fused": fused}
    params, groups = two_groups(device)
    lr = LR
    if tensor_lr:
        lr, groups[0]["lr"] = torch.tensor(LR, dtype=torch.float64), torch.tensor(0.002, dtype=torch.float64)
    optimizer = optimizer_class(groups, **{**options, "lr": lr})
    found = scheduled(optimizer, makers)
    if tensor_lr:
        assert optimizer.param_groups[1]["lr"] is lr  # filled in place
    by_hand, groups = two_groups(device)
    second = optimizer_class(groups, **options)
    for step, of_groups in enumerate(found):
        for group, values in zip(second.param_groups, of_groups, strict=True):
            group.update(values)
        set_grads(by_hand, seed=step)
        second.step()
    assert_same_snapshots(snapshot(params, optimizer), snapshot(by_hand, second))


@every_case
def test_scheduler_and_optimizer_resume_together(optimizer_class, makers, device):
    def begin():
        params, groups = two_groups(device)
        optimizer = optimizer_class(groups, **OPTIONS[optimizer_class])
        return params, optimizer, [maker(optimizer) for maker in makers]

    whole, expected, schedulers = begin()
    found = run(expected, schedulers)
    first, optimizer, saved = begin()
    run(optimizer, saved, range(PAUSE))
    params, resumed, schedulers = begin()
    for param, of_first in zip(params, first, strict=True):
        param.detach().copy_(of_first.detach())
    resumed.load_state_dict(optimizer.state_dict())
    for scheduler, of_saved in zip(schedulers, saved, strict=True):
        scheduler.load_state_dict(of_saved.state_dict())
    assert run(resumed, schedulers, range(PAUSE, STEPS)) == found[PAUSE:]
    assert_same_snapshots(snapshot(whole, expected), snapshot(params, resumed))


def test_groups_are_scheduled_each_on_its_own(optimizer_class, device, fused):
    params, groups = two_groups(device)
    optimizer = optimizer_class(groups, **OPTIONS[optimizer_class], fused=fused)
    scheduler = s.LambdaLR(optimizer, [lambda k: 0.0 if k else 1.0, lambda k: 1.0])
    run(optimizer, [scheduler], range(1))
    before = [p.detach().clone() for p in params]
    run(optimizer, [scheduler], range(1))
    assert [bool((p != b).any()) for p, b in zip(params, before, strict=True)] == [False, True]
