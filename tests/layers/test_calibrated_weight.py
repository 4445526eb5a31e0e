# SPDX-License-Identifier: Apache-2.0
"""Outside the module's own forward, ``weight`` of a calibrated module is its parameter, as on a plain module."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from csgd_cuda import GradientCalibration, calibrate, uncalibrate

from ..helpers import assert_same_bits


def module(kind=nn.Linear):
    torch.manual_seed(0)
    return kind(3, 4) if kind is nn.Linear else kind(3, 4, 2)


def data(kind=nn.Linear):
    torch.manual_seed(1)
    return torch.randn(6, 3) if kind is nn.Linear else torch.randn(6, 3, 5, 5)


def outcome(action, of):
    """What an action on a module gives, as values that can be compared: its error, or its result and what is left."""
    try:
        result = action(of)
    except (AttributeError, KeyError, TypeError) as error:
        message = str(error).replace("Calibrated", "")
        # Before 3.11 Python itself names the attribute only.
        return type(error), message if sys.version_info >= (3, 11) else "weight" in message
    names = [name for name, _ in of.named_parameters() if "calibration" not in name]
    kept = of.__dict__.get("weight")
    return str(result), names, str(kept), hasattr(of, "weight") and str(of.weight)


def set_parameter(of):
    of.weight = nn.Parameter(torch.ones(4, 3))


def set_tensor(of):
    of.weight = torch.ones(4, 3)


def set_none(of):
    of.weight = None


def delete(of):
    del of.weight


def delete_twice(of):
    del of.weight
    del of.weight


def delete_and_look(of):
    del of.weight
    return of.weight


def delete_and_set_tensor(of):
    del of.weight
    of.weight = torch.ones(4, 3)


def delete_tensor(of):
    delete_and_set_tensor(of)
    del of.weight


def delete_and_register(of):
    del of.weight
    of.register_parameter("weight", nn.Parameter(torch.zeros(4, 3)))


def register_buffer(of):
    del of.weight
    of.register_buffer("weight", torch.zeros(4, 3))


def set_data(of):
    of.weight.data = torch.ones(4, 3)


ACTIONS = [
    set_parameter, set_tensor, set_none, delete, delete_twice, delete_and_look, delete_and_set_tensor, delete_tensor,
    delete_and_register, register_buffer, set_data,
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("action", ACTIONS)
def test_the_attribute_behaves_as_on_a_plain_module(action, training):
    plain, calibrated = module().train(training), calibrate(module()).train(training)
    assert outcome(action, plain) == outcome(action, calibrated)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d])
def test_the_attribute_is_the_parameter_outside_forward(kind):
    model = calibrate(module(kind), types=kind)
    parameter = model.get_parameter("weight")
    seen = []
    model.register_forward_pre_hook(lambda of, _: seen.append(of.weight))
    model.register_forward_hook(lambda of, *_: seen.append(of.weight))
    for training in (True, False):
        model.train(training)
        assert model.weight is parameter
        with torch.no_grad():
            assert model.weight is parameter
        model(data(kind)).sum().backward()
        assert model.weight is parameter
    assert all(weight is parameter for weight in seen)
    assert len(seen) == 4


def test_the_attribute_is_the_parameter_after_an_error_in_forward():
    model = calibrate(module())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(2, 7))
    assert model.weight is model.get_parameter("weight")


def test_hooks_on_the_weight_see_what_the_parameter_gets():
    model, seen = calibrate(module(), calibration=1.0, lipschitz=20.0), []
    model.weight.register_hook(seen.append)
    model(data()).square().sum().backward()
    assert_same_bits(seen[0], model.weight.grad)
    assert (seen[0] == 0).any()


def weight_norm(of):
    return parametrizations.weight_norm(of)


def spectral_norm(of):
    return parametrizations.spectral_norm(of)


def old_weight_norm(of):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(of)


def pruned(of):
    return prune.l1_unstructured(of, "weight", amount=0.5)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def twice_parametrized(of):
    parametrize.register_parametrization(of, "weight", Doubled())
    return parametrize.register_parametrization(of, "weight", Doubled())


def with_layer_on_weight(of, layer, x):
    """The output where ``layer`` passes on what the module's forward takes as its weight."""
    return nn.functional.linear(x, layer(of.weight), of.bias)


@pytest.mark.parametrize("change", [weight_norm, spectral_norm, old_weight_norm, pruned, twice_parametrized])
@pytest.mark.parametrize("changed_first", [False, True])
def test_what_makes_the_weight_anew_gets_the_calibrated_gradient(change, changed_first):
    """The gradient of the weight in use is calibrated, and goes on to what the weight is made of."""
    plain, model = change(module()), module()
    layer = GradientCalibration(1.0, lipschitz=3.0, index=0)
    if changed_first:
        with pytest.raises(TypeError, match="no parameter 'weight', or it is parametrized"):
            calibrate(change(model))
        return
    model = change(calibrate(model, calibration=1.0, lipschitz=3.0))
    for _ in range(3):
        x = data()
        out = model(x)
        for hook in plain._forward_pre_hooks.values():
            hook(plain, (x,))
        expected = with_layer_on_weight(plain, layer, x)
        assert_same_bits(out, expected)
        for of, value in ((model, out), (plain, expected)):
            of.zero_grad()
            value.square().sum().backward()
        for (name, param), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert_same_bits(param.grad, other.grad, name)
        assert model.weight_calibration.step.item() == layer.step.item()
    assert 0 < model.weight_calibration.density() < 1


def test_a_parametrization_can_be_taken_off():
    model = weight_norm(calibrate(module()))
    parametrize.remove_parametrizations(model, "weight")
    model(data()).sum().backward()
    assert model.weight_calibration.step.item() == 1
    assert type(uncalibrate(model)) is nn.Linear


def test_compiled_and_parametrized():
    """The layer has its place in a compiled forward, too."""
    model = weight_norm(calibrate(module()))
    torch.compile(model, backend="aot_eager")(data()).sum().backward()
    assert model.weight_calibration.step.item() == 1
    assert not model.parametrizations["weight"]._forward_hooks


class CallsItself(nn.Linear):
    def forward(self, x, again=True):
        return super().forward(self.forward(x, again=False) if again else x)


def test_a_forward_that_calls_itself():
    torch.manual_seed(0)
    model = calibrate(CallsItself(3, 3), types=CallsItself)
    model(data()).sum().backward()
    assert model.weight_calibration.step.item() == 2
    assert model.weight is model.get_parameter("weight")


def test_copies_of_weights():
    """Code that reads weights copies values and no layer; an average of models moves them."""
    model, average = calibrate(module()), torch.optim.swa_utils.AveragedModel(calibrate(module()))
    model(data()).sum().backward()
    with torch.no_grad():
        model.weight.sub_(model.weight.grad)
    average.update_parameters(model)
    assert_same_bits(average.module.weight, model.weight)
    copied = copy.deepcopy(model)
    assert copied.weight is copied.get_parameter("weight")
    assert copied.weight is not model.weight
