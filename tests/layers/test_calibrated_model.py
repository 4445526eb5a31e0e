# SPDX-License-Identifier: Apache-2.0
"""calibrate and uncalibrate: one line each, and everything else about the model stays as it was."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda import CSGD, GradientCalibration, calibrate, uncalibrate

from ..distributed.launch import run
from ..helpers import assert_same_bits
from .test_calibration_layer import assert_same, batch, gradients, layers_of

WHERE = ["weight", "output"]


def make_model(device="cpu", seed=0):
    """Convolution, normalisation, and two linear layers of which the first has no bias."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 9, bias=False), nn.Linear(9, 5)
    ).to(device)


def train(model, steps=3, first=0):
    """A few steps of SGD; returns the optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for seed in range(first, first + steps):
        gradients(model, batch(seed=seed))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_module_of_the_types_is_calibrated(where, per_channel, device):
    model = calibrate(make_model(device), where=where, per_channel=per_channel)
    layers = layers_of(model)
    assert [layer.index.item() for layer in layers] == [0, 1, 2]
    assert [layer.channels for layer in layers] == ([8, 9, 5] if per_channel else [None] * 3)
    for seed in range(3):
        gradients(model, batch(device, seed))
    assert all(layer.step.item() == 3 for layer in layers)
    assert all(0 < layer.density() < 1 for layer in layers)


@pytest.mark.parametrize("where", WHERE)
def test_zero_calibration_changes_no_bit(where, device):
    plain, model = make_model(device), calibrate(make_model(device), where=where, calibration=0.0)
    for seed in range(2):
        expected = gradients(plain, batch(device, seed))
        assert_same(gradients(model, batch(device, seed))[: len(expected)], expected)


def test_weights_get_what_the_layer_makes_of_their_gradient(device):
    """The calibrated gradient is that of the plain model, through a layer with the same index."""
    plain, model = make_model(device), calibrate(make_model(device), types=(nn.Conv2d,), seed=5)
    layer = GradientCalibration(seed=5, index=0).to(device)
    for seed in range(3):
        gradients(plain, batch(device, seed))
        gradients(model, batch(device, seed))
        weight = plain[0].weight.detach().clone().requires_grad_()
        layer(weight).backward(plain[0].weight.grad)
        assert_same_bits(model[0].weight.grad, weight.grad)


@pytest.mark.parametrize("where", WHERE)
def test_parameters_keep_their_names_order_and_identity(where):
    """So an optimizer made before goes on, and its checkpoints fit the plain model."""
    plain, model = make_model(), make_model()
    before = list(model.named_parameters())
    calibrate(model, where=where)
    after = list(model.named_parameters())
    assert [(name, id(p)) for name, p in after] == [(name, id(p)) for name, p in before]
    optimizer = train(model)
    other = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits(optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
    assert [(name, id(p)) for name, p in uncalibrate(model).named_parameters()] == [(n, id(p)) for n, p in before]


@pytest.mark.parametrize("where", WHERE)
def test_state_dict_loads_into_the_plain_model_and_back(where):
    model, plain = calibrate(make_model(), where=where), make_model(seed=1)
    train(model)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    assert_same(list(plain.state_dict().values()), list(state.values()))
    model.load_state_dict(make_model(seed=2).state_dict())
    assert_same(list(model.state_dict().values()), list(make_model(seed=2).state_dict().values()))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("way", ["state_dict", "weights_only", "assign", "deepcopy", "pickle"])
def test_resumes_exactly(where, way):
    model = calibrate(make_model(), where=where, per_channel=True)
    train(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = calibrate(make_model(seed=1), where=where, per_channel=True)
        state = copy.deepcopy(model.state_dict())
        if way == "weights_only":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_state_dict(state, assign=way == "assign")
    for seed in range(3, 6):
        assert_same(gradients(other, batch(seed=seed)), gradients(model, batch(seed=seed)))
    assert type(uncalibrate(other)[0]) is nn.Conv2d  # also a copy can be taken apart


@pytest.mark.parametrize("where", WHERE)
def test_uncalibrated_model_is_the_plain_one(where):
    model, plain = uncalibrate(calibrate(make_model(), where=where)), make_model()
    assert repr(model) == repr(plain)
    assert_same(gradients(model, batch()), gradients(plain, batch()))
    assert "csgd_cuda.calibration" not in str(model.state_dict()._metadata)
    pickle.dumps(model)


def test_both_places_at_once_and_calibrating_twice():
    model = calibrate(calibrate(make_model(), where="weight"), where="output")
    assert len(layers_of(model)) == 6
    assert sorted(layer.index.item() for layer in layers_of(model)) == list(range(6))
    calibrate(model, where="output")  # all are calibrated already: they stay as they are
    assert len(layers_of(model)) == 6
    train(model)
    assert not layers_of(uncalibrate(model))


def test_layers_of_its_own_stay_and_are_numbered():
    model = nn.Sequential(GradientCalibration(index=40), nn.Linear(3, 3), nn.Linear(3, 3))
    calibrate(model)
    assert [layer.index.item() for layer in layers_of(model)] == [0, 1, 2]
    assert len(layers_of(uncalibrate(model))) == 1


def test_tied_weights_get_a_layer_in_each_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    calibrate(model)
    assert model[2].weight is model[0].weight
    for _ in range(2):
        model(torch.randn(8, 4)).square().sum().backward()
    assert [layer.step.item() for layer in layers_of(model)] == [2, 2]


@pytest.mark.parametrize("where", WHERE)
def test_compiled_code_is_not_used_again_without_the_layer(where):
    """torch.compile compares a module's class, but not its hooks, to find out whether its code still fits."""
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch()).square().sum().backward()
    calibrate(model, where=where)
    layers = layers_of(model)
    for _ in range(2):
        compiled(batch()).square().sum().backward()
    other = calibrate(make_model(), where=where)
    torch.compile(other, backend="aot_eager")(batch()).square().sum().backward()
    assert [layer.step.item() for layer in layers + layers_of(other)] == [2] * 3 + [1] * 3
    uncalibrate(model)
    compiled(batch()).square().sum().backward()
    assert [layer.step.item() for layer in layers] == [2] * 3


def test_other_modules_that_look_at_the_weight(device):
    """Initialisation in place, functional_call, freezing, and casting reach the parameter itself."""
    model = calibrate(make_model(device))
    nn.init.constant_(model[4].weight, 0.5)
    assert bool((model[4].weight == 0.5).all())
    zeros = {"4.weight": torch.zeros(9, 288, device=device)}
    out = torch.func.functional_call(model, zeros, (batch(device),))
    assert_same_bits(out, model[5].bias.detach().expand(4, 5))
    model.requires_grad_(False)
    assert not model[0].weight.requires_grad
    assert model.double()[0].weight.dtype == torch.float64


def test_training_with_csgd_and_layers_together(device):
    """Optimizer and layer of the same seed draw apart: both see every coordinate."""
    model = calibrate(make_model(device))
    optimizer = CSGD(model.parameters(), lr=0.05, momentum=0.9)
    first = gradients(model, batch(device))[0]
    for _ in range(30):
        gradients(model, batch(device))
        optimizer.step()
    loss = model(batch(device)).square().mean().item()
    assert first.isfinite().all()
    assert loss < make_model(device)(batch(device)).square().mean().item()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"where": "bias"}, ValueError, "where must be"),
        ({"types": (nn.LSTM,)}, ValueError, "no module of type LSTM"),
        ({"types": (nn.ReLU,)}, TypeError, "has no parameter 'weight'"),
        ({"types": (nn.BatchNorm2d,), "per_channel": True}, TypeError, "no output channels"),
        ({"calibration": -1.0}, ValueError, "calibration must be"),
    ],
)
def test_errors_change_nothing(options, error, message):
    model = make_model()
    before = repr(model)
    with pytest.raises(error, match=message):
        calibrate(model, **options)
    assert repr(model) == before


def test_parametrized_weight_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="parametrized"):
        calibrate(model)
    calibrate(model, where="output")


def trained_with_ddp(rank, where):
    """The parameters of this rank after a few steps, and how many coordinates each of its layers let through."""
    model = DistributedDataParallel(calibrate(make_model(), where=where))
    optimizer = CSGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        gradients(model, batch(seed=step))
        optimizer.step()
    passed = [layer.tally[0].item() for layer in layers_of(model)]
    return [p.detach() for p in model.parameters()], passed


@pytest.mark.parametrize("where", WHERE)
def test_ddp_keeps_replicas_equal_and_ranks_draw_apart(where):
    """Given the same data each rank lets other coordinates through; what is averaged, and so the weights, are equal."""
    (first, passed), (second, passed_by_second) = run(2, trained_with_ddp, where)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    assert passed != passed_by_second
