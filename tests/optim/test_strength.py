# SPDX-License-Identifier: Apache-2.0
"""The default strength trains where SGD does; a strength of 1 need not (docs/algorithm.md, "Choosing c")."""

import inspect

import pytest
import torch

from csgd_cuda import CSGD, GradientCalibration, calibrate, calibrate_grad, csgd_
from csgd_cuda.optim.options import SGD_OPTIONS

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
    [(CSGD, 0.25), (csgd_, 0.25), (GradientCalibration, 0.05), (calibrate, 0.05), (calibrate_grad, 0.05)],
)
def test_defaults(function, default):
    assert inspect.signature(function).parameters["calibration"].default == default


def test_a_group_without_the_option_gets_the_default_of_the_signature():
    assert SGD_OPTIONS["calibration"].default == inspect.signature(CSGD).parameters["calibration"].default
    assert CSGD([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["calibration"] == 0.25


def test_checkpoints_keep_the_strength_that_they_were_made_with():
    """Those made when the default was 1 go on with 1."""
    params = [torch.nn.Parameter(torch.zeros(1))]
    old, new = CSGD(params, calibration=1.0), CSGD(params)
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["calibration"] == 1.0
