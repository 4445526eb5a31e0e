# SPDX-License-Identifier: Apache-2.0
"""export_pruned of chains: the same outputs, whatever dead filters give; and what it refuses, by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from csgd_cuda import CSGD, GradientCalibration, calibrate, export_pruned


def chain(padding=1, bias=False, pool=None, padding_mode="zeros"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding, bias=bias, padding_mode=padding_mode), nn.BatchNorm2d(8)),
        nn.ReLU(), nn.MaxPool2d(2, padding=1), nn.Conv2d(8, 12, 3, padding=padding, padding_mode=padding_mode),
        nn.BatchNorm2d(12), nn.ReLU(), pool or nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(20),
        nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip
    model(torch.randn(2, 3, 12, 12))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model.eval()


def kill(layer, *filters):
    with torch.no_grad():
        layer.weight[list(filters)] = 0


def weights(model):
    return sum(p.numel() for p in model.parameters())


def assert_same_outputs(model, pruned):
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = model(images), pruned(images)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_dead_filters_go_and_the_outputs_stay(padding, bias, padding_mode):
    model = chain(padding, bias, padding_mode=padding_mode)
    kill(model[0][0], 0, 2, 3, 7)
    kill(model[3], 1, 5, 6, 11)
    kill(model[9], 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = export_pruned(model)
    assert_same_outputs(model, pruned)
    zeros_interrupt = padding in (1, "same") and padding_mode == "zeros"
    assert (
        pruned[0][0].out_channels == pruned[0][1].num_features == pruned[3].in_channels == (5 if zeros_interrupt else 4)
    )
    assert pruned[3].out_channels == len(pruned[4].running_mean) == 8
    assert pruned[-1].in_features == 19
    assert weights(pruned) < weights(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the given model was changed"


def test_without_dead_filters_nothing_changes():
    model = chain()
    pruned = export_pruned(model)
    assert weights(pruned) == weights(model)
    assert_same_outputs(model, pruned)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_layer_of_dead_filters_alone_keeps_one(padding):
    model = chain(padding)
    kill(model[0][0], *range(8))
    pruned = export_pruned(model)
    assert pruned[0][0].out_channels == 1
    assert_same_outputs(model, pruned)


def test_adaptive_pooling_keeps_constants():
    model = chain(pool=nn.AdaptiveAvgPool2d(2))
    kill(model[3], 0, 1)
    pruned = export_pruned(model)
    assert pruned[3].out_channels == 10
    assert_same_outputs(model, pruned)


def test_outputs_are_never_cut():
    model = nn.Sequential(nn.Linear(4, 3))
    kill(model[0], 0, 1)
    assert export_pruned(model)[0].out_features == 3


def test_a_model_trained_with_sparse_filters_gets_smaller():
    model = chain().train()
    convolutions = [p for p in model.parameters() if p.dim() == 4]
    others = [p for p in model.parameters() if p.dim() != 4]
    groups = [{"params": convolutions, "sparsity": 0.5, "structure": "filter", "regrow": False}, {"params": others}]
    optimizer = CSGD(groups, lr=0.01, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 12, 12)).square().mean().backward()
        optimizer.step()
    pruned = export_pruned(model)
    assert pruned.training
    assert (pruned[0][0].out_channels, pruned[3].out_channels) in ((4, 6), (5, 6))
    assert_same_outputs(model.eval(), pruned.eval())


@pytest.mark.parametrize("shared", ["relu", "convolution", "normalization"])
def test_of_a_module_that_occurs_twice_the_channels_stay(shared):
    torch.manual_seed(0)
    relu, twice, norm = nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    nn.init.normal_(norm.running_mean)
    second = twice if shared == "convolution" else nn.Conv2d(8, 8, 3, padding=1)
    norms = (norm, norm) if shared == "normalization" else (nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    first = nn.Conv2d(3, 8, 3, padding=1)
    model = nn.Sequential(
        first, norms[0], relu, twice, norms[1], relu, second, nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4)
    ).eval()
    kill(first, 0, 3)
    kill(twice, 1, 2, 5)
    pruned = export_pruned(model)
    assert [pruned[k].out_channels < 8 for k in (0, 3)] == [shared == "relu"] * 2
    assert_same_outputs(model, pruned)


ACTIVATIONS = [nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()]


def with_layers(activation=None, between=None, end=None):
    """Convolutions without padding and linear layers, with something after each of them; biases of all sizes."""
    torch.manual_seed(0)
    activation, between, end = activation or nn.ReLU(), between or nn.Identity(), end or nn.Identity()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), activation, between, nn.Conv2d(8, 6, 3), activation, between, nn.Flatten(),
        nn.LazyLinear(20), activation, nn.Linear(20, 5), end,
    )  # fmt: skip
    model(torch.randn(2, 3, 12, 12))
    for layer in (model[0], model[3], model[7]):
        nn.init.uniform_(layer.bias, -8, 8)
    kill(model[0], 0, 2, 3, 7)
    kill(model[3], 1, 4)
    kill(model[7], 0, 5, 6)
    return model.eval()


@pytest.mark.parametrize("layers", [
    *({"activation": layer} for layer in ACTIVATIONS),
    *({"between": layer} for layer in (
        nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, stride=2, ceil_mode=True), nn.AdaptiveAvgPool2d(4),
        nn.AdaptiveMaxPool2d(4), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5), nn.Identity(),
    )),
    *({"end": layer} for layer in (nn.LogSoftmax(dim=1), nn.Softmax(dim=1), nn.Softmax(dim=-1), nn.Dropout1d(0.5))),
], ids=str)  # fmt: skip
def test_layers_that_chains_are_made_of(layers):
    model = with_layers(**layers)
    pruned = export_pruned(model)
    assert (pruned[0].out_channels, pruned[3].out_channels, pruned[7].out_features) == (4, 4, 17)
    assert_same_outputs(model, pruned)


def test_softmax_of_images_at_the_end():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.LogSoftmax(dim=1)).eval()
    kill(model[0], 1, 2)
    kill(model[2], 0)
    pruned = export_pruned(model)
    assert (pruned[0].out_channels, pruned[2].out_channels) == (6, 4)
    assert_same_outputs(model, pruned)


@pytest.mark.parametrize("affine", [{"affine": False}, {"bias": False}])
def test_normalization_without_weight_or_bias(affine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **affine), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model(torch.randn(8, 3, 12, 12))
    kill(model[0], 1, 2)
    pruned = export_pruned(model.eval())
    assert pruned[1].num_features == 6
    assert_same_outputs(model, pruned)


def test_frozen_parameters_and_the_modes_of_layers_stay():
    model = chain().train()
    model[0][1].eval()
    model[0][0].requires_grad_(False)
    model[3].requires_grad_(False)
    kill(model[0][0], 1, 2)
    kill(model[3], 0)
    pruned = export_pruned(model)
    assert pruned.training
    assert [layer.training for layer in (*pruned[0], pruned[1])] == [True, False, True]
    assert [p.requires_grad for layer in pruned[:4] for p in layer.parameters()] == [False, True, True, False, False]


@pytest.mark.parametrize("where", ["weight", "output"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_calibrated_model_comes_out_plain_and_can_be_tuned(where, per_channel):
    model = calibrate(chain(), where=where, per_channel=per_channel)
    kill(model[0][0], 0, 2)
    kill(model[3], 1, 5)
    kill(model[9], 4)
    calibrated = copy.deepcopy(model)
    pruned = export_pruned(model)
    assert pruned[3].out_channels == 10
    assert {type(layer) for layer in pruned[0]} == {nn.Conv2d, nn.BatchNorm2d}
    assert not any(isinstance(layer, GradientCalibration) for layer in pruned.modules())
    assert_same_outputs(model, pruned)
    assert [type(layer).__name__ for layer in model.modules()] == [type(m).__name__ for m in calibrated.modules()]
    pruned = calibrate(pruned.train(), where=where, per_channel=per_channel)
    for _ in range(2):
        pruned(torch.randn(4, 3, 12, 12)).square().mean().backward()
    assert pruned[3].weight.grad.shape == pruned[3].weight.shape


def changed(change, inner=None):
    """A chain whose layer 1.0 is given to ``change``."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(inner or nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    change(model[1][0])
    return model


def hooked(method, path="1.0"):
    model = changed(lambda layer: None)
    getattr(model.get_submodule(path), method)(lambda *args: None)
    return model


def own_method(name):
    def change(layer):
        setattr(layer, name, lambda *args: args[0])

    return change


def plain_weight(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


@pytest.mark.parametrize(("model", "error", "message"), [
    (nn.Sequential(nn.LazyLinear(2)), TypeError, "^0 is a LazyLinear that has not seen its input yet"),
    (torch.compile(nn.Linear(2, 2)), TypeError, "^the model is compiled; give export_pruned what was compiled"),
    (nn.Sequential(torch.compile(nn.Linear(2, 2))), TypeError, "^0 is compiled"),
    (torch.jit.ScriptModule(), TypeError, "^the model is a ScriptModule; give export_pruned what was"),
    (nn.DataParallel(nn.Linear(2, 2)), TypeError, r"^the model is a DataParallel; give export_pruned its \.module"),
    (changed(parametrizations.weight_norm), TypeError, r"^1\.0 has a parametrization of weight"),
    (changed(parametrizations.orthogonal), TypeError, r"^1\.0 has a parametrization of weight"),
    (changed(lambda m: parametrizations.weight_norm(calibrate(m))), TypeError, r"^1\.0 has a parametrization"),
    (changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)), TypeError, r"^1\.0 has hooks in _forward_pre_hooks"),
    (hooked("register_forward_hook"), TypeError, r"^1\.0 has hooks in _forward_hooks"),
    (hooked("register_full_backward_hook"), TypeError, r"^1\.0 has hooks in _backward_hooks"),
    (hooked("register_full_backward_pre_hook"), TypeError, r"^1\.0 has hooks in _backward_pre_hooks"),
    (hooked("register_forward_hook", "1.1"), TypeError, r"^1\.1 has hooks in _forward_hooks"),
    (hooked("register_forward_hook", "1"), TypeError, "^1 has hooks in _forward_hooks"),
    (hooked("register_forward_pre_hook", ""), TypeError, "^the model has hooks in _forward_pre_hooks"),
    (changed(own_method("forward")), TypeError, r"^1\.0 has a forward of its own in place of that of Linear"),
    (changed(own_method("_conv_forward"), nn.Conv2d(4, 4, 1)), TypeError, r"^1\.0 has a _conv_forward of its own"),
    (changed(lambda m: own_method("forward")(calibrate(m))), TypeError, r"^1\.0 has a forward of its own"),
    (changed(plain_weight), TypeError, r"^1\.0: export_pruned needs a weight that is a Parameter, got Tensor"),
    (changed(lambda layer: layer.to("meta")), TypeError, r"^1\.0: .* on meta"),
    (changed(id, nn.Linear(4, 4, dtype=torch.complex64)), TypeError, r"^1\.0: .* got torch.complex64"),
])  # fmt: skip
def test_what_cannot_be_exported_is_named(model, error, message):
    with pytest.raises(error, match=message):
        export_pruned(model)


def test_of_filters_before_padded_average_pooling_only_those_that_give_0_go():
    model = chain(pool=nn.AvgPool2d(2, padding=1))
    kill(model[3], *range(6))
    with torch.no_grad():
        model[4].bias[:2], model[4].running_mean[:2] = -1, 0  # behind ReLU the constant is 0
        model[3].bias[:2] = 0
        model[4].weight[:6], model[4].bias[2:6] = 0, 1
    pruned = export_pruned(model)
    assert pruned[3].out_channels == 10
    assert_same_outputs(model, pruned)
