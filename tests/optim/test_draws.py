# SPDX-License-Identifier: Apache-2.0
"""Optimizers of one process that draw the same random numbers are warned of, once; others never."""

import copy
import gc
import pickle
import warnings
from weakref import WeakValueDictionary

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward

from csgd_cuda import CSGD
from csgd_cuda.optim import draws

from ..helpers import make_params, set_grads


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """As in a process that has not warned, and has no other optimizers."""
    monkeypatch.setattr(draws, "_warned", False)
    monkeypatch.setattr(draws, "_drawing", WeakValueDictionary())


def step(optimizer, seed=0):
    set_grads([param for group in optimizer.param_groups for param in group["params"]], seed)
    optimizer.step()


def optimizers(count, shapes=((4, 5),), **options):
    return [CSGD(make_params(shapes, torch.float32), **options) for _ in range(count)]


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_one_optimizer_for_each_parameter_is_warned_of_once_with_first_index(fused):
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)])
    _apply_optimizer_in_backward(CSGD, model.parameters(), {"lr": 0.1, "fused": fused})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.ones(2, 5)).sum().backward()
    (warning,) = [w for w in caught if "same random numbers" in str(w.message)]
    assert "seed 0 and parameter index 0" in str(warning.message)
    assert "first_index=k" in str(warning.message)


def test_the_warning_points_at_the_users_line():
    first, second = optimizers(2)
    step(first)
    set_grads(second.param_groups[0]["params"], seed=0)
    with pytest.warns(UserWarning, match="same random numbers") as caught:
        second.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("overlap", [False, True])
def test_ranges_of_indices_are_compared(overlap):
    first, second = CSGD(make_params([(3,)] * 4, torch.float32)), None
    second = CSGD(make_params([(3,)] * 2, torch.float32), first_index=3 if overlap else 4)
    step(first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(second)
    assert len(caught) == overlap


@pytest.mark.usefixtures("no_warning")
class TestNoWarning:
    def test_of_an_optimizer_that_is_gone(self):
        for _ in range(3):
            (optimizer,) = optimizers(1)
            step(optimizer)
            del optimizer

    def test_of_one_that_is_left_over_in_a_cycle(self):
        gc.disable()
        try:
            for _ in range(3):
                (optimizer,) = optimizers(1)
                optimizer.myself = optimizer
                step(optimizer)
                del optimizer
        finally:
            gc.enable()

    def test_of_copies(self):
        (optimizer,) = optimizers(1)
        step(optimizer)
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            step(other)
        step(optimizer)

    def test_of_seeds_or_first_indices_of_their_own(self):
        made = [CSGD(make_params([(3,)], torch.float32), seed=k) for k in range(3)]
        made += [CSGD(make_params([(3,)], torch.float32), first_index=k) for k in (5, 6)]
        for optimizer in made:
            step(optimizer)

    def test_of_groups(self):
        params = make_params([(3,)] * 4, torch.float32)
        optimizer = CSGD([{"params": params[:2]}, {"params": params[2:]}])
        step(optimizer)
        optimizer.add_param_group({"params": make_params([(3,)], torch.float32)})
        step(optimizer)

    def test_of_another_optimizer_of_the_same_parameters(self):
        params = make_params([(3,)] * 2, torch.float32)
        made = [CSGD(params, lr=0.1), CSGD(params, lr=0.2)]
        for optimizer in made:
            step(optimizer)

    def test_of_optimizers_that_draw_nothing_or_make_no_step(self):
        first, second = optimizers(2)
        third, fourth = optimizers(2, calibration=0.0)
        for optimizer in (third, fourth, first):
            step(optimizer)
        second.param_groups[0]["lr"] = 0.0
        second.param_groups[0]["params"][0].grad = torch.zeros(4, 5)
        second.step()


def test_a_warning_that_is_an_error_has_changed_nothing():
    first, second = optimizers(2)
    step(first)
    (param,) = second.param_groups[0]["params"]
    before = param.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="first_index"):
            step(second)
    assert torch.equal(param, before)
    assert not second.state
