# SPDX-License-Identifier: Apache-2.0
"""Every scheduler of torch.optim.lr_scheduler: the rates of torch.optim.SGD, and the step takes them."""

import inspect
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from csgd_cuda import CSGD

from . import helpers
from .helpers import assert_same_training, make_data, make_model, make_optimizer, train

STEPS = 12
OPTIONS = {**helpers.OPTIONS, "nesterov": True}


def sequential(optimizer):
    warm, then = lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [warm, then], milestones=[3])


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9 if k % 2 else 1.0),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    # These two also change the momentum in every step.
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "SWALR": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=5),
}
# Schedules that go to the end: where torch's formula for lr ends at -2e-18 instead of 0, and where there is no
# momentum left for nesterov.
TO_ZERO = {
    "LinearLR to 0": lambda o: lr_scheduler.LinearLR(o, 1 / 3, 0.0, total_iters=7),
    "CyclicLR, momentum to 0": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.2, step_size_up=4, base_momentum=0.0, max_momentum=0.9
    ),
    "OneCycleLR, momentum to 0": lambda o: lr_scheduler.OneCycleLR(
        o, 0.2, total_steps=STEPS + 1, pct_start=6 / 13, base_momentum=0.0, max_momentum=0.9
    ),
}
CASES = SCHEDULERS | TO_ZERO
METRICS = [1.0, 0.5, 0.6, 0.7, 0.7, 0.7, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5]  # for ReduceLROnPlateau


def advance(scheduler, k):
    with warnings.catch_warnings():  # SequentialLR still passes an epoch to its parts
        warnings.filterwarnings("ignore", message="The epoch parameter")
        scheduler.step(METRICS[k]) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


def options_now(optimizer):
    group = optimizer.param_groups[0]
    return float(group["lr"]), group["momentum"]


def scheduled(name, data, lr=OPTIONS["lr"]):
    """((model, optimizer), the (lr, momentum) of each step)."""
    model = make_model()
    optimizer = make_optimizer(model, **{**OPTIONS, "lr": lr})
    scheduler = CASES[name](optimizer)
    seen = []
    for k, batch in enumerate(data):
        seen.append(options_now(optimizer))
        train(model, optimizer, [batch])
        advance(scheduler, k)
    return (model, optimizer), seen


def set_by_hand(rates, data):
    """(model, optimizer) after steps with these (lr, momentum)."""
    model = make_model()
    optimizer = make_optimizer(model, **OPTIONS)
    for (lr, momentum), batch in zip(rates, data, strict=True):
        optimizer.param_groups[0].update(lr=lr, momentum=momentum)
        train(model, optimizer, [batch])
    return model, optimizer


def test_no_scheduler_of_torch_is_missing():
    classes = {
        name
        for name, thing in vars(lr_scheduler).items()
        if inspect.isclass(thing) and issubclass(thing, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


def test_schedules_to_zero_end_where_the_constructor_would_refuse_to_begin():
    lows = {}
    for name in TO_ZERO:
        _, seen = scheduled(name, make_data(STEPS))
        lows[name] = tuple(map(min, zip(*seen, strict=True)))
    assert lows["LinearLR to 0"][0] < 0
    assert [momentum for _, momentum in lows.values()] == [0.9, 0, 0]


@pytest.mark.parametrize("name", CASES)
def test_rates_are_those_of_sgd_and_the_step_takes_them(name):
    data = make_data(STEPS)
    trained, seen = scheduled(name, data)
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), **OPTIONS)
    scheduler, expected = CASES[name](sgd), []
    for k in range(STEPS):
        expected.append(options_now(sgd))
        sgd.step()
        advance(scheduler, k)
    assert seen == expected
    assert len(set(seen)) > 1
    assert_same_training(trained, set_by_hand(seen, data))


@pytest.mark.parametrize("name", CASES)
def test_rate_as_a_tensor_is_filled_in_place_and_read_anew(name):
    data = make_data(STEPS)
    _, numbers = scheduled(name, data)
    lr = torch.tensor(OPTIONS["lr"], dtype=torch.float64)
    (model, optimizer), tensors = scheduled(name, data, lr)
    assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(torch.tensor(tensors), torch.tensor(numbers))
    assert_same_training((model, optimizer), set_by_hand(tensors, data))


@pytest.mark.parametrize("name", CASES)
def test_scheduler_and_optimizer_resume_together(name):
    data = make_data(STEPS)
    whole, _ = scheduled(name, data)
    model = make_model()
    optimizer = make_optimizer(model, **OPTIONS)
    scheduler = CASES[name](optimizer)
    for k, batch in enumerate(data[:5]):
        train(model, optimizer, [batch])
        advance(scheduler, k)
    second = CSGD(model.parameters(), lr=OPTIONS["lr"], momentum=OPTIONS["momentum"])
    resumed = CASES[name](second)
    second.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for k, batch in enumerate(data[5:], start=5):
        train(model, second, [batch])
        advance(resumed, k)
    assert_same_training(whole, (model, second))


def test_groups_are_scheduled_each_on_its_own():
    model = make_model()
    optimizer = CSGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}], lr=0.1, momentum=0.9
    )
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda k: 0.0 if k else 1.0, lambda k: 1.0])
    train(model, optimizer, make_data(1))
    scheduler.step()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, make_data(1))
    moved = [bool((p != b).any()) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
