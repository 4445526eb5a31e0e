# SPDX-License-Identifier: Apache-2.0
"""What is done to gradients between backward and step: clipping, accumulation, zeroing, release."""

import copy

import pytest
import torch

from csgd_cuda import CSGD

from ..helpers import assert_same_bits, assert_same_snapshots, snapshot
from .helpers import (
    assert_same_training,
    loss_of,
    loss_went_down,
    make_data,
    make_model,
    make_optimizer,
    plainly_trained,
    train,
)

CLIPPING = {
    "norm": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.1),
    "norm, one by one": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.1, foreach=False),
    "value": lambda params: torch.nn.utils.clip_grad_value_(params, 0.01),
}


@pytest.mark.parametrize("how", CLIPPING)
def test_clipped_gradients_are_the_ones_that_are_stepped(how, optimizer_class):
    """The bits of an optimizer that is given the clipped gradients as tensors of their own."""
    data = make_data(24)
    model, twin = make_model(), make_model()
    optimizer, other = make_optimizer(optimizer_class, model), make_optimizer(optimizer_class, twin)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        unclipped = [p.grad.clone() for p in model.parameters()]
        CLIPPING[how](list(model.parameters()))
        clipped = [p.grad.clone() for p in model.parameters()]
        assert any((a != b).any() for a, b in zip(unclipped, clipped, strict=True))
        optimizer.step()
        for p, grad in zip(twin.parameters(), clipped, strict=True):
            p.grad = grad
        other.step()
        losses.append(loss.item())
    assert loss_went_down(losses)
    assert_same_training((model, optimizer), (twin, other))


def test_clipping_limits_the_bound():
    """Of SGD's direction, which without momentum is the gradient."""
    model = make_model()
    optimizer = make_optimizer(CSGD, model, momentum=0, weight_decay=0)
    for x, y in make_data(4):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
    bounds = [float(optimizer.state[p]["lipschitz_bound"]) for p in model.parameters()]
    assert all(0 < bound <= 0.01 + 1e-9 for bound in bounds)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_make_one_step(set_to_none, optimizer_class):
    """One step for several backward passes: counted once, drawn once, with the sum of the gradients."""
    data = make_data()
    model, twin = make_model(), make_model()
    optimizer, other = make_optimizer(optimizer_class, model), make_optimizer(optimizer_class, twin)
    for k in range(0, len(data), 3):
        optimizer.zero_grad(set_to_none=set_to_none)
        sums = None
        for x, y in data[k : k + 3]:
            (loss_of(model, x, y) / 3).backward()
            grads = torch.autograd.grad(loss_of(twin, x, y) / 3, list(twin.parameters()))
            sums = grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
        optimizer.step()
        for p, grad in zip(twin.parameters(), sums, strict=True):
            p.grad = grad
        other.step()
    assert_same_training((model, optimizer), (twin, other))
    assert {int(state["step"]) for state in optimizer.state.values()} == {len(data) // 3}


def test_zeroed_gradients_give_the_bits_of_removed_ones(optimizer_class):
    """zero_grad(set_to_none=False): gradients are added into the same tensors, which the step must not change."""
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model)
    addresses = set()
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, x, y).backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for p, grad in zip(model.parameters(), before, strict=True):
            assert_same_bits(p.grad, grad)
        addresses.add(tuple(p.grad.data_ptr() for p in model.parameters()))
    assert len(addresses) == 1
    assert_same_training((model, optimizer), plainly_trained(optimizer_class, data))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_gradient_is_a_step_and_no_gradient_is_none(set_to_none, optimizer_class):
    """As in torch's optimizers: momentum and weight decay go on under a gradient of zeros."""
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model)
    train(model, optimizer, make_data(2))
    optimizer.zero_grad(set_to_none=set_to_none)
    before = copy.deepcopy(model)
    optimizer.step()
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert bool((p != old).any()) == (not set_to_none)
        assert int(optimizer.state[p]["step"]) == (2 if set_to_none else 3)


def train_releasing(model, optimizer_of, data):
    """Each gradient is stepped and freed inside backward, as soon as it is complete."""

    def hook(param):
        optimizer_of(param).step()
        param.grad = None

    handles = [param.register_post_accumulate_grad_hook(hook) for param in model.parameters()]
    losses = []
    for x, y in data:
        loss = loss_of(model, x, y)
        loss.backward()
        assert all(param.grad is None for param in model.parameters())
        losses.append(loss.item())
    for handle in handles:
        handle.remove()
    return losses


def test_gradient_release_with_one_optimizer_for_all_gives_the_bits_of_a_normal_step(fused, optimizer_class):
    data = make_data(24)
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    losses = train_releasing(model, lambda _: optimizer, data)
    assert loss_went_down(losses)
    assert_same_training((model, optimizer), plainly_trained(optimizer_class, data, fused=fused))


def test_gradient_release_with_one_optimizer_per_parameter_gives_the_bits_of_a_normal_step(fused, optimizer_class):
    data = make_data(24)
    model = make_model()
    optimizers = {
        param: make_optimizer(optimizer_class, [param], first_index=k, fused=fused)
        for k, param in enumerate(model.parameters())
    }
    losses = train_releasing(model, optimizers.__getitem__, data)
    assert loss_went_down(losses)
    expected, optimizer = plainly_trained(optimizer_class, data, fused=fused)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_snapshots(snapshot([a], optimizers[a]), snapshot([b], optimizer))


def test_gradient_release_with_one_optimizer_per_parameter_trains(optimizer_class):
    """With a seed each, so that equal tensors do not draw equally; a run can be repeated bit for bit."""
    data, models = make_data(24), []
    for _ in range(2):
        model = make_model()
        optimizers = {
            param: make_optimizer(optimizer_class, [param], seed=k) for k, param in enumerate(model.parameters())
        }
        assert loss_went_down(train_releasing(model, optimizers.__getitem__, data))
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert_same_bits(a, b)
