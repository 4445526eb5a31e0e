# SPDX-License-Identifier: Apache-2.0
"""The default strength trains where SGD does; a strength of 1 need not (docs/algorithm.md, "Choosing c")."""

import inspect

import pytest
import torch

from csgd_cuda import (
    CSGD,
    CalibratedAdamW,
    GradientCalibration,
    calibrate,
    calibrate_grad,
    calibrated_adamw_,
    csgd_,
)

SEEDS = range(10)


def rosenbrock(seed, **options):
    """The value of Rosenbrock's function after 2,000 steps from (-1.2, 1); infinite where the steps diverge."""
    point = torch.nn.Parameter(torch.tensor([-1.2, 1.0]))
    optimizer = CSGD([point], lr=1e-3, momentum=0.9, nesterov=True, seed=seed, **options)
    for _ in range(2000):
        optimizer.zero_grad()
        x, y = point
        value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        if not value < 1e8:
            return float("inf")
        value.backward()
        optimizer.step()
    return value.item()


@pytest.mark.parametrize("options", [{"calibration": 0}, {}], ids=["SGD", "default"])
def test_every_seed_reaches_the_minimum(options):
    assert all(rosenbrock(seed, **options) < 1e-6 for seed in SEEDS)


def test_a_strength_of_one_is_too_much_there():
    values = [rosenbrock(seed, calibration=1) for seed in SEEDS]
    assert min(values) > 1e-3
    assert sum(value == float("inf") for value in values) == 4


@pytest.mark.parametrize(
    ("function", "default"),
    [
        *[(function, 0.25) for function in (CSGD, csgd_, CalibratedAdamW, calibrated_adamw_)],
        *[(function, 0.05) for function in (GradientCalibration, calibrate, calibrate_grad)],
    ],
)
def test_defaults(function, default):
    assert inspect.signature(function).parameters["calibration"].default == default


def test_a_group_without_the_option_gets_the_default_of_the_signature(optimizer_class):
    default = inspect.signature(optimizer_class).parameters["calibration"].default
    assert optimizer_class.direction.options["calibration"].default == default
    assert optimizer_class([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["calibration"] == default


def test_checkpoints_keep_the_strength_that_they_were_made_with(optimizer_class):
    """Those made when the default was 1 go on with 1."""
    params = [torch.nn.Parameter(torch.zeros(1))]
    old, new = optimizer_class(params, calibration=1.0), optimizer_class(params)
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["calibration"] == 1.0
