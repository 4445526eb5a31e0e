# SPDX-License-Identifier: Apache-2.0
"""What models are made of and what others do to them: copies, in-place operations, meta, lazy modules."""

import copy
import threading

import pytest
import torch
from torch import nn

from csgd_cuda import GradientCalibration, calibrate, number_layers, uncalibrate

from ..helpers import assert_same_bits
from .test_calibrated_model import WHERE, make_model, train
from .test_calibration_layer import assert_same, batch, gradients, layers_of


def indices(model):
    return [layer.index.item() for layer in layers_of(model)]


def test_in_place_operations_after_a_layer(device):
    """ReLU in place and ``+=`` behind a layer: the gradients of the network without in-place operations."""

    def build(inplace):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(2, 4, 3),
            nn.ReLU(inplace),
            nn.Conv2d(4, 4, 1),
            GradientCalibration(index=9),
            nn.ReLU(inplace),
        ]
        model = nn.Sequential(*layers)
        return calibrate(model, where="output").to(device)

    in_place, plain = build(True), build(False)
    for seed in range(3):
        assert_same(gradients(in_place, batch(device, seed)), gradients(plain, batch(device, seed)))
    x = torch.ones(3, device=device, requires_grad=True)
    out = GradientCalibration(lipschitz=1e-9).to(device)(x * 1)
    out += x
    out.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_models_made_of_parts_and_copies_are_numbered(device):
    encoder = nn.TransformerEncoder(calibrate(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), 3)
    assert len(set(indices(encoder))) < len(indices(encoder))
    number_layers(encoder)
    assert indices(encoder) == list(range(6))
    assert indices(calibrate(nn.Sequential(calibrate(nn.Linear(2, 2)), calibrate(nn.Linear(2, 2))))) == [0, 1]
    by_hand = nn.Sequential(calibrate(make_model()), GradientCalibration())
    assert len(set(indices(by_hand))) == 4
    encoder.to(device)(torch.randn(2, 5, 8, device=device)).sum().backward()
    assert all(layer.step.item() == 1 for layer in layers_of(encoder))


def test_a_loaded_part_keeps_its_numbers_in_the_whole():
    """A checkpoint of a calibrated backbone brings its steps and bounds, not its numbers."""
    backbone = calibrate(make_model())
    train(backbone)
    whole = calibrate(nn.Sequential(nn.Linear(3, 3), make_model(seed=1)))
    whole[1].load_state_dict(backbone.state_dict())
    assert indices(whole) == [0, 1, 2, 3]
    assert [layer.step.item() for layer in layers_of(whole)] == [0, 3, 3, 3]


@pytest.mark.parametrize("where", WHERE)
def test_models_made_on_meta(where):
    """Layers keep their numbers and scratch space through meta, to_empty and a load that assigns."""
    with torch.device("meta"):
        model = nn.Sequential(make_model("meta"), GradientCalibration(index=17))
        calibrate(model[0], where=where)
    number_layers(model)
    model.to_empty(device="cpu")
    other = nn.Sequential(calibrate(make_model(), where=where), GradientCalibration(index=3))
    train(other)
    state = other.state_dict()
    model.load_state_dict(copy.deepcopy(state), assign=True)
    assert indices(model) == [0, 1, 2, 3]
    number_layers(other)
    assert_same(gradients(model, batch()), gradients(other, batch()))
    with torch.device("meta"):
        assigned = nn.Sequential(make_model("meta"), GradientCalibration(index=3))
    assigned.load_state_dict(nn.Sequential(make_model(), GradientCalibration(index=3)).state_dict(), assign=True)
    gradients(assigned, batch())
    assert assigned[1].step.item() == 1


@pytest.mark.parametrize("where", WHERE)
def test_a_loaded_state_is_not_shared(where):
    """With assign=True as well: training one model leaves the state dict, and models loaded from it, alone."""
    model = calibrate(make_model(), where=where)
    train(model)
    state = copy.deepcopy(model.state_dict())
    one, other = (calibrate(make_model(), where=where) for _ in range(2))
    one.load_state_dict(state, assign=True)
    other.load_state_dict(copy.deepcopy(state))
    gradients(one, batch())
    assert [layer.step.item() for layer in layers_of(one)] == [4] * 3
    again = calibrate(make_model(), where=where)
    again.load_state_dict(state)
    assert_same(gradients(again, batch()), gradients(other, batch()))


def test_options_reach_every_layer():
    options = {
        "lipschitz": 2.0,
        "bound_decay": 0.5,
        "seed": 3,
        "rounding": "nearest",
        "fused": False,
        "calibration": 0.1,
    }
    for layer in layers_of(calibrate(make_model(), **options)):
        assert {name: getattr(layer, name) for name in options} == options


def test_rounding_reaches_the_gradient():
    """To nearest every passed coordinate of equal gradients is equal; stochastically it is not."""
    values = {}
    for rounding in ("nearest", "stochastic"):
        layer = GradientCalibration(1.0, lipschitz=1.1, rounding=rounding, index=0)
        x = torch.zeros(4096, dtype=torch.bfloat16, requires_grad=True)
        layer(x).backward(torch.full_like(x, 0.3))
        values[rounding] = len(x.grad.unique())
    assert values == {"nearest": 2, "stochastic": 3}


@pytest.mark.parametrize(
    ("module", "shape", "channels"),
    [
        (nn.Linear(3, 4), (2, 5, 3), 4),
        (nn.Linear(3, 4), (3,), 4),
        (nn.Conv1d(2, 4, 3), (2, 9), 4),
        (nn.Conv2d(2, 4, 3), (5, 2, 6, 6), 4),
        (nn.Conv2d(2, 4, 3), (2, 6, 6), 4),
        (nn.Conv3d(2, 4, 3), (1, 2, 4, 4, 4), 4),
        (nn.ConvTranspose2d(2, 4, 3), (1, 2, 6, 6), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_output_channels_with_and_without_a_batch(module, shape, channels):
    """One channel's gradient is larger: its bound is, and no other."""
    model = calibrate(nn.Sequential(module), types=type(module), where="output", per_channel=True)
    out = model(torch.randn(shape))
    dim = out.dim() - 1 if isinstance(module, nn.Linear) else out.dim() - len(module.kernel_size) - 1
    grad = torch.ones_like(out)
    grad.select(dim, 1).fill_(7.0)
    out.backward(grad)
    (layer,) = layers_of(model)
    assert layer.lipschitz_bound.tolist() == [1.0, 7.0, *[1.0] * (channels - 2)]
    uncalibrate(model)


def test_weight_channels_of_a_transposed_convolution():
    model = calibrate(nn.Sequential(nn.ConvTranspose2d(2, 6, 3)), types=nn.ConvTranspose2d, per_channel=True)
    (layer,) = layers_of(model)
    assert (layer.channels, layer.channel_dim) == (6, 1)
    model(torch.randn(1, 2, 4, 4)).sum().backward()


def test_attention_is_left_out():
    """nn.MultiheadAttention takes the weight of out_proj without calling it: a layer there would rest."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for where in WHERE:
        model = calibrate(copy.deepcopy(block), where=where)
        model(torch.randn(2, 3, 8)).sum().backward()
        assert [layer.step.item() for layer in layers_of(model)] == [1] * 2


def test_modules_that_cannot_be_calibrated_yet_say_so():
    with pytest.raises(TypeError, match="has not seen its input yet"):
        calibrate(nn.Sequential(nn.LazyLinear(3)))
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    with pytest.raises(TypeError, match="forward of its own"):
        calibrate(nn.Sequential(patched), where="output")
    with pytest.raises(TypeError, match="takes a tensor, got tuple"):
        GradientCalibration()((torch.ones(1),))


@pytest.mark.parametrize("where", ["weight", "output"])
def test_a_class_changed_since_is_not_thrown_away(where):
    model, plain = (calibrate(nn.Sequential(nn.Linear(3, 3)), where=where) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    uncalibrate(plain)
    for each in (model, plain):
        nn.utils.parametrizations.weight_norm(each[0])
    uncalibrate(model)
    assert type(model[0]).__name__ == type(plain[0]).__name__
    assert_same_bits(model(torch.ones(2, 3)), plain(torch.ones(2, 3)))
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


def test_a_child_of_the_same_name_stays():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.output_calibration = nn.Identity()

    assert isinstance(uncalibrate(Named()).output_calibration, nn.Identity)


def test_a_class_that_knows_how_to_copy_itself():
    class Locked(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.lock = threading.Lock()

        def __getstate__(self):
            return {name: value for name, value in self.__dict__.items() if name != "lock"}

    copied = copy.deepcopy(calibrate(nn.Sequential(Locked())))
    assert not hasattr(copied[0], "lock")
    assert indices(copied) == [0]


def test_an_error_at_the_last_module_leaves_the_first_alone():
    class Sealed(nn.Linear):
        def __init_subclass__(cls, **options):
            raise TypeError("may not be subclassed")

    model = nn.Sequential(nn.Linear(2, 2), Sealed(2, 2))
    with pytest.raises(TypeError, match="may not be subclassed"):
        calibrate(model)
    assert type(model[0]) is nn.Linear
    assert not layers_of(model)


def test_weights_put_in_place_by_others():
    """As the copies of nn.DataParallel are, and what the older weight_norm computes."""
    model = calibrate(nn.Sequential(nn.Linear(3, 3)))
    replica = model[0]._replicate_for_data_parallel()
    replica.weight = model[0]._parameters["weight"] * 2
    assert_same_bits(replica.weight, model[0]._parameters["weight"] * 2)
