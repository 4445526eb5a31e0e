# SPDX-License-Identifier: Apache-2.0
"""export_pruned: smaller models of the same outputs, whatever dead filters give; and what it refuses, by name."""

import pytest
import torch
from torch import nn

from csgd_cuda import CSGD, export_pruned
from csgd_cuda.pruning import is_two_of_four, to_semi_structured


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
    assert pruned[0].out_channels == pruned[1].num_features == pruned[4].in_channels == (5 if zeros_interrupt else 4)
    assert pruned[4].out_channels == len(pruned[5].running_mean) == 8
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
    assert pruned[0].out_channels == 1
    assert_same_outputs(model, pruned)


def test_adaptive_pooling_keeps_constants():
    model = chain(pool=nn.AdaptiveAvgPool2d(2))
    kill(model[3], 0, 1)
    pruned = export_pruned(model)
    assert pruned[4].out_channels == 10
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
    assert (pruned[0].out_channels, pruned[4].out_channels) in ((4, 6), (5, 6))
    assert_same_outputs(model.eval(), pruned.eval())


@pytest.mark.parametrize("shared", ["relu", "convolution", "normalization"])
def test_a_module_that_occurs_twice_is_exported_twice(shared):
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
    assert len(pruned) == 10
    assert weights(pruned) < weights(model)
    assert_same_outputs(model, pruned)


class Residual(nn.Module):
    pass


@pytest.mark.parametrize(("model", "error", "message"), [
    (nn.Linear(2, 2), TypeError, "needs an nn.Sequential, got Linear"),
    (nn.Sequential(nn.Linear(2, 2), Residual()), TypeError, "1 is a Residual; export_pruned supports"),
    (nn.Sequential(nn.Sigmoid()), TypeError, "0 is a Sigmoid"),
    (nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))), ValueError, "0.0: .* needs groups=1, got 2"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2)), ValueError, "1: export_pruned needs Flatten"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), ValueError, "running statistics"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(8)), ValueError, "2: .* before Flatten"),
])  # fmt: skip
def test_what_cannot_be_cut_is_named(model, error, message):
    with pytest.raises(error, match=message):
        export_pruned(model)


def test_padded_average_pooling_of_constants_is_refused():
    model = chain(pool=nn.AvgPool2d(2, padding=1))
    assert_same_outputs(model, export_pruned(model))
    kill(model[3], *range(6))
    with pytest.raises(ValueError, match=r"6: AvgPool2d.* does not keep the constants of the \d dead filters"):
        export_pruned(model)


def test_two_of_four_is_recognised():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 4, 5, 0]])
    assert is_two_of_four(weight)
    weight[1, 4] = 1
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(2, 6))
    assert not is_two_of_four(torch.zeros(8))


def test_semi_structured_weights_need_a_gpu_and_a_pattern():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="no Linear layer of 2:4 weights"):
        to_semi_structured(model)
    CSGD(model[0].parameters(), lr=0.1, sparsity=0.5, structure="2:4").threshold()
    with pytest.raises(RuntimeError, match="0: semi-structured weights need a CUDA GPU"):
        to_semi_structured(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_semi_structured_weights_give_the_same_outputs():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no sparse tensor cores")
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).cuda().half()
    optimizer = CSGD([layer.weight for layer in (model[0], model[2])], lr=0.1, sparsity=0.5, structure="2:4")
    optimizer.threshold()
    inputs = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = model(inputs)
        assert to_semi_structured(model) == ["0", "2"]
        assert (model(inputs) - expected).abs().max() <= 2e-3 * expected.abs().max()
