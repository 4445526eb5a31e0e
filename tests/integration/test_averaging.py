# SPDX-License-Identifier: Apache-2.0
"""torch.optim.swa_utils: averages of the weights that our optimizers make, and the training undisturbed by them."""

import copy
from functools import partial

import pytest
import torch
from torch.optim import swa_utils

from csgd_cuda import CSGD

from ..helpers import assert_same_bits
from .helpers import (
    OPTIONS,
    assert_same_training,
    loss_of,
    make_data,
    make_model,
    make_optimizer,
    plainly_trained,
    train,
)

DECAY = 0.75
AVERAGES = {
    "SWA": {},
    "EMA": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
    "EMA, one by one": {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)},
}


@pytest.mark.parametrize("name", AVERAGES)
def test_average_is_that_of_the_trajectory(name, optimizer_class):
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model)
    averaged = swa_utils.AveragedModel(model, **AVERAGES[name])
    trajectory = []

    def after_step():
        averaged.update_parameters(model)
        trajectory.append([p.detach().double() for p in model.parameters()])

    train(model, optimizer, data, after_step)
    assert_same_training((model, optimizer), plainly_trained(optimizer_class, data))  # averaging only looks
    for k, average in enumerate(averaged.module.parameters()):
        expected = trajectory[0][k]
        for count, weights in enumerate(trajectory[1:], start=2):
            share = 1 / count if name == "SWA" else 1 - DECAY
            expected = expected + (weights[k] - expected) * share
        torch.testing.assert_close(average.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_weight_average_has_a_lower_loss_than_noisy_steps(optimizer_class):
    """The recipe of the documentation: train, then average at a constant rate; the noise of the draws averages out."""
    data = make_data(60)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, calibration=3.0)
    schedule = swa_utils.SWALR(optimizer, swa_lr=1.5 * OPTIONS[optimizer_class]["lr"], anneal_epochs=5)
    averaged = swa_utils.AveragedModel(model)
    for k, batch in enumerate(data):
        train(model, optimizer, [batch])
        if k >= 30:
            averaged.update_parameters(model)
            schedule.step()
    with torch.no_grad():
        assert loss_of(averaged, x, y) < loss_of(model, x, y)


def test_batch_statistics_of_an_average_are_updated():
    data = make_data()
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
    )
    optimizer = make_optimizer(CSGD, model)
    averaged = swa_utils.AveragedModel(model)
    train(model, optimizer, data, lambda: averaged.update_parameters(model))
    swa_utils.update_bn([x for x, _ in data], averaged)
    with torch.no_grad():
        inputs = torch.stack([averaged.module[0](x) for x, _ in data])
    torch.testing.assert_close(averaged.module[1].running_mean, inputs.mean((0, 1)))


def test_average_and_optimizer_resume_together(optimizer_class):
    data, results = make_data(), []
    for pause in (len(data), 5):
        model = make_model()
        optimizer = make_optimizer(optimizer_class, model)
        averaged = swa_utils.AveragedModel(model, **AVERAGES["EMA"])
        train(model, optimizer, data[:pause], partial(averaged.update_parameters, model))
        if pause < len(data):
            saved = copy.deepcopy([thing.state_dict() for thing in (model, optimizer, averaged)])
            model = make_model(seed=5)
            optimizer = make_optimizer(optimizer_class, model)
            averaged = swa_utils.AveragedModel(model, **AVERAGES["EMA"])
            for thing, state in zip((model, optimizer, averaged), saved, strict=True):
                thing.load_state_dict(state)
            train(model, optimizer, data[pause:], partial(averaged.update_parameters, model))
        results.append((model, optimizer, averaged))
    assert_same_training(results[0][:2], results[1][:2])
    for a, b in zip(*(r[2].parameters() for r in results), strict=True):
        assert_same_bits(a, b)
