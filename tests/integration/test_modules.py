# SPDX-License-Identifier: Apache-2.0
"""Modules that change under the optimizer: frozen, shared, extended, copied, called as functions."""

import copy
import pickle

import pytest
import torch
from torch.func import functional_call, grad

from csgd_cuda import CSGD, CalibratedAdamW, calibrated_adamw_, csgd_

from ..helpers import assert_same_bits, snapshot
from .helpers import (
    OPTIONS,
    assert_same_training,
    loss_of,
    loss_went_down,
    make_data,
    make_model,
    make_optimizer,
    plainly_trained,
    train,
)


def test_functional_call_and_func_grad_give_the_bits_of_a_normal_step(fused, optimizer_class):
    """Gradients of a pure function of a dict of parameters, stepped by the optimizer."""
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    params = dict(model.named_parameters())
    gradient = grad(lambda values, x, y: (functional_call(model, values, (x,)) - y).square().mean())
    for x, y in data:
        for name, value in gradient({k: p.detach() for k, p in params.items()}, x, y).items():
            params[name].grad = value
        optimizer.step()
    assert_same_training((model, optimizer), plainly_trained(optimizer_class, data, fused=fused))


def test_functional_step_beside_functional_call_gives_the_bits_of_the_optimizer(fused, optimizer_class):
    """No module and no optimizer in the loop: parameters and state are tensors in lists."""
    data = make_data()
    model = make_model()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    lists = list(values.values())
    function = {CSGD: csgd_, CalibratedAdamW: calibrated_adamw_}[optimizer_class]
    names = optimizer_class.direction.buffers
    buffers = [[torch.zeros_like(v) for v in lists] for _ in names]
    steps = [torch.zeros((), dtype=torch.int64) for _ in lists]
    bounds = [torch.zeros(()) for _ in lists]
    gradient = grad(lambda values, x, y: (functional_call(model, values, (x,)) - y).square().mean())
    for x, y in data:
        grads = list(gradient(values, x, y).values())
        function(lists, grads, *buffers, steps, bounds, fused=fused, **OPTIONS[optimizer_class])
    expected, optimizer = plainly_trained(optimizer_class, data, fused=fused)
    for k, param in enumerate(expected.parameters()):
        assert_same_bits(param, lists[k])
        for name, of_name in zip(names, buffers, strict=True):
            assert_same_bits(optimizer.state[param][name], of_name[k])


def test_frozen_layers_rest_and_unfrozen_ones_go_on(fused, optimizer_class):
    """Frozen: not one bit of parameter and state changes, and its steps are not counted."""
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    losses = train(model, optimizer, data[:4])
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    frozen = snapshot(list(model[0].parameters()), optimizer)
    losses += train(model, optimizer, data[4:8])
    for (name, a), (_, b) in zip(frozen, snapshot(list(model[0].parameters()), optimizer), strict=True):
        assert_same_bits(a, b, name)
    model[0].requires_grad_(True)
    losses += train(model, optimizer, data[8:])
    assert loss_went_down(losses)
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [8, 8, 12, 12]


def test_freezing_does_not_change_what_the_others_draw(optimizer_class):
    """The draws depend on the position over all parameters: a missing gradient does not shift those of others."""
    results = []
    for frozen in (False, True):
        model = make_model()
        optimizer = make_optimizer(optimizer_class, model, lipschitz=8.0)  # so large that not all coordinates move
        for k in range(3):
            for index, param in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * k + index)
                param.grad = None if frozen and index < 2 else torch.randn(param.shape, generator=generator)
            optimizer.step()
        results.append(list(model.parameters()))
    for a, b in list(zip(*results, strict=True))[2:]:
        assert_same_bits(a, b)


def test_parameters_frozen_from_the_start_may_be_given(optimizer_class):
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(optimizer_class, model)
    before = copy.deepcopy(model[0])
    train(model, optimizer, make_data())
    for a, b in zip(model[0].parameters(), before.parameters(), strict=True):
        assert_same_bits(a, b)


def test_added_group_does_not_change_what_the_others_draw(fused, optimizer_class):
    """A head that joins the training later, e.g. in fine-tuning by stages."""
    data = make_data()
    whole = make_model()
    expected = make_optimizer(optimizer_class, whole, fused=fused)
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model[0].parameters(), fused=fused)
    for k, (x, y) in enumerate(data):
        if k == 3:
            optimizer.add_param_group({"params": model[2].parameters()})
        for m in (whole, model):
            m.zero_grad()
            loss_of(m, x, y).backward()
        if k < 3:
            for p in whole[2].parameters():
                p.grad = None
        expected.step()
        optimizer.step()
    assert_same_training((whole, expected), (model, optimizer))


def test_checkpoint_with_an_added_group_resumes(optimizer_class):
    data, results = make_data(), []
    for pause in (len(data), 6):
        model = make_model()
        optimizer = make_optimizer(optimizer_class, model[0].parameters())
        train(model, optimizer, data[:3])
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01, "calibration": 0.5})
        train(model, optimizer, data[3:pause])
        if pause < len(data):
            saved = copy.deepcopy(optimizer.state_dict())
            groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
            optimizer = optimizer_class(groups, lr=1.0)
            optimizer.load_state_dict(saved)
            train(model, optimizer, data[pause:])
        results.append((model, optimizer))
    assert_same_training(*results)


class Tied(torch.nn.Module):
    """An autoencoder whose decoder is the encoder's weight, as a module of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


@pytest.mark.filterwarnings("error")
def test_tied_weights_are_stepped_once_with_the_sum_of_their_gradients(fused, optimizer_class):
    model = Tied()
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    twin = Tied().encoder.weight.detach().clone().requires_grad_()
    other = make_optimizer(optimizer_class, [twin], fused=fused)
    losses = []
    for x, _ in make_data(24):
        loss = loss_of(model, x, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        (twin.grad,) = torch.autograd.grad((torch.tanh(x @ twin.T) @ twin.T - x).square().mean(), [twin])
        other.step()
        losses.append(loss.item())
    assert loss_went_down(losses)
    assert model.decoder.weight is model.encoder.weight
    assert int(optimizer.state[model.encoder.weight]["step"]) == 24
    torch.testing.assert_close(model.encoder.weight, twin)


def test_one_parameter_in_two_groups_is_refused(optimizer_class):
    model = Tied()
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer_class([{"params": [model.encoder.weight]}, {"params": [model.decoder.weight]}])


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_model_and_optimizer_copied_together_stay_together(copy_of, fused, optimizer_class):
    """Both copies train on, independently, to the same bits."""
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    train(model, optimizer, data[:5])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    second_model, second, state = *copy_of((model, optimizer)), scheduler.state_dict()
    resumed = torch.optim.lr_scheduler.StepLR(second, 1, gamma=0.5)
    resumed.load_state_dict(state)
    for m, o, s in ((model, optimizer, scheduler), (second_model, second, resumed)):
        train(m, o, data[5:], lambda o=o, s=s: s.step() if o.param_groups[0]["lr"] > 0.01 else None)
    assert_same_training((model, optimizer), (second_model, second))
    assert all(a is not b for a, b in zip(model.parameters(), second_model.parameters(), strict=True))
