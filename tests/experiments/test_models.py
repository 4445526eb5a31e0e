# SPDX-License-Identifier: Apache-2.0
"""Networks: the architectures of their papers, for any images, initialised by the seed alone."""

import sys

import pytest
import torch
from torch import nn

from experiments import models
from experiments.models.batch_norm import Float32StatisticsBatchNorm, keep_float32_statistics
from tools.program import UserError

MNIST, CIFAR10, IMAGENET = (
    models.Shape(1, (28, 28), 10),
    models.Shape(3, (32, 32), 10),
    models.Shape(3, (224, 224), 1000),
)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("lenet", MNIST, 61_706),  # LeNet-5 with all maps connected and linear outputs
        ("vgg", CIFAR10, 9_231_114),  # VGG-11 with batch normalisation and one linear layer
        ("resnet20", CIFAR10, 269_722),  # the paper's 0.27 M
        ("resnet56", CIFAR10, 853_018),  # 0.85 M
        ("wrn16-4", CIFAR10, 2_748_890),  # 2.7 M
        ("wrn28-10", CIFAR10, 36_479_194),  # 36.5 M
        ("resnet18", IMAGENET, 11_689_512),
        ("resnet50", IMAGENET, 25_557_032),
    ],
)
def test_networks_have_the_parameters_of_their_papers(name, shape, parameters):
    with torch.device("meta"):
        model = models.build(name, 0, shape)
        images = torch.empty(2, shape.channels, *shape.size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(images).shape == (2, shape.classes)


@pytest.mark.parametrize("name", [name for name in models.NAMES if ":" not in name])
@pytest.mark.parametrize("shape", [models.Shape(1, (28, 28), 7), models.Shape(4, (33, 40), 3)])
def test_networks_take_any_channels_size_and_classes(name, shape):
    with torch.device("meta"):
        assert models.build(name, 0, shape)(torch.empty(2, shape.channels, *shape.size)).shape == (2, shape.classes)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "wrn16-4"])
def test_the_seed_alone_decides_the_initial_weights(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (models.build(name, seed, MNIST) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


@pytest.mark.parametrize("name", ["resnet20", "wrn16-4", "vgg"])
def test_initial_logits_are_of_the_size_of_one(name):
    inputs = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert 0.01 < models.build(name, 0, MNIST).train()(inputs).std() < 10


@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [
        ("resnet", MNIST, "not among small, lenet"),
        ("lenet", models.Shape(1, (8, 8), 10), "at least 12 x 12 pixels, these have 8 x 8"),
        ("timm:no_such_network", CIFAR10, "timm"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(name, shape, word):
    with pytest.raises(UserError, match=f"--model {name}: .*{word}"):
        models.build(name, 0, shape)


def test_missing_torchvision_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in ("experiments.vision", "experiments.models.of_torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match="torchvision is not installed"):
        models.build("resnet18", 0, CIFAR10)


def test_timm_networks_are_built_for_the_images():
    pytest.importorskip("timm")
    assert models.build("timm:resnet18", 0, models.Shape(1, (32, 32), 7))(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_running_statistics_stay_float32_where_parameters_are_bfloat16():
    """As nn.BatchNorm2d on the same bfloat16 inputs, but statistics that are as exact as in float32."""
    model = keep_float32_statistics(nn.Sequential(nn.BatchNorm2d(3)).to(torch.bfloat16))
    exact = nn.BatchNorm2d(3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        x = (torch.randn(8, 3, 5, 5, generator=generator) + 3).to(torch.bfloat16)
        y, expected = model(x), exact(x.float())
    assert isinstance(model[0], Float32StatisticsBatchNorm)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.01)
    torch.testing.assert_close(model[0].running_mean, exact.running_mean, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(model[0].running_var, exact.running_var, atol=1e-4, rtol=1e-4)
    y.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_float32_networks_keep_their_batch_normalisation():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert type(keep_float32_statistics(model)[0]) is nn.BatchNorm2d
