# SPDX-License-Identifier: Apache-2.0
"""export_pruned of models with a forward of their own: what is cut, what has to stay, and always the same outputs."""

import copy
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from csgd_cuda import GradientCalibration, calibrate, export_pruned
from experiments import models


def randomised(model, share=0.4):
    """In eval mode, with normalizations that are no identity and a share of the filters dead."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.running_mean is not None:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.3)
                nn.init.normal_(layer.running_mean, 0, 0.2)
                nn.init.uniform_(layer.running_var, 0.5, 2)
            elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight[torch.rand(len(layer.weight)) < share] = 0
                layer.weight[-1] = 1 / layer.weight[0].numel()  # the outputs are never all constant
    return model.eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def assert_same_outputs(model, pruned, inputs):
    expected, got = model(inputs), pruned(inputs)
    assert torch.isfinite(expected).all()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# Networks

SIDES = {"lenet": 32, "resnet20": 32, "wrn16-4": 32, "resnet18": 64, "resnet50": 64}
OF_TORCHVISION = {"resnet18", "resnet50"}


def network(name):
    if name in OF_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torch.manual_seed(0)
    return randomised(models.build(name, 0, models.Shape(3, (SIDES[name],) * 2, 10)))


@pytest.mark.parametrize("name", SIDES)
def test_networks_get_smaller_and_give_the_same(name):
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    pruned = export_pruned(model)
    assert type(pruned) is type(model)
    assert parameters(pruned) < 0.7 * parameters(model)
    assert_same_outputs(model, pruned, torch.randn(4, 3, SIDES[name], SIDES[name]))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_of_a_residual_block_the_channels_of_the_sum_stay():
    model = network("resnet20")
    pruned = export_pruned(model)
    for old, new in zip(model.stages, pruned.stages, strict=True):
        dead = int((old.conv1.weight.flatten(1) == 0).all(1).sum())
        assert len(new.conv1.weight) in (len(old.conv1.weight) - dead, len(old.conv1.weight) - dead + 1)
        assert new.conv1.weight.shape[:2] == (new.conv1.out_channels, new.conv1.in_channels)
        assert len(new.bn1.bias) == len(new.bn1.running_var) == new.bn1.num_features == new.conv1.out_channels
        assert len(new.conv2.weight) == len(old.conv2.weight)
    assert pruned.conv1.out_channels == 16


def test_the_copy_is_trained_saved_and_exported_as_the_model_is():
    model = network("resnet20").train()
    model.bn1.eval()
    pruned = export_pruned(model)
    assert [m.training for m in pruned.modules()] == [m.training for m in model.modules()]
    assert list(pruned.state_dict()) == list(model.state_dict())
    pruned(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.shape == p.shape for p in pruned.parameters())
    inputs = torch.randn(2, 3, 32, 32)
    for again in (pickle.loads(pickle.dumps(pruned)), copy.deepcopy(pruned), export_pruned(pruned)):
        assert parameters(again) == parameters(pruned)
        assert_same_outputs(pruned.eval(), again.eval(), inputs)


def test_a_calibrated_model_comes_out_plain():
    model = network("resnet20")
    small = export_pruned(model)
    for where in ("weight", "output"):
        pruned = export_pruned(calibrate(copy.deepcopy(model), where=where))
        assert [type(m) for m in pruned.modules()] == [type(m) for m in small.modules()]
        assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), small.parameters(), strict=True))


# Forwards. Each has a first convolution with dead filters.


class Model(nn.Module):
    """Two convolutions and a head; ``between`` is what the forward does between the convolutions."""

    def __init__(self, between, second=None, **modules):
        super().__init__()
        self.between = between
        self.first, self.second = nn.Conv2d(3, 8, 3), second or nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        x = self.second(self.between(self, self.first(x)))
        return self.head(x.mean((2, 3)))


def made(*args, **kwargs):
    torch.manual_seed(0)
    model = randomised(Model(*args, **kwargs))
    half_dead(model.first)
    return model


@torch.no_grad()
def half_dead(layer):
    """The first four filters dead, the others not, and biases of all sizes."""
    nn.init.normal_(layer.weight)
    layer.weight[:4] = 0
    nn.init.uniform_(layer.bias, -2, 2)


INPUTS = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("between", [
    lambda m, x: F.relu(x), lambda m, x: F.relu(x, inplace=True), lambda m, x: torch.relu(x), lambda m, x: x.relu(),
    lambda m, x: x.relu_(), lambda m, x: F.leaky_relu(x, 0.2), lambda m, x: F.gelu(x, approximate="tanh"),
    lambda m, x: torch.sigmoid(x), lambda m, x: x.tanh(), lambda m, x: F.hardswish(x), lambda m, x: F.softplus(x),
    lambda m, x: F.max_pool2d(x, 2), lambda m, x: F.max_pool2d(x, 3, 2, 1), lambda m, x: F.avg_pool2d(x, 2),
    lambda m, x: F.adaptive_avg_pool2d(x, 4), lambda m, x: F.adaptive_max_pool2d(x, 4),
    lambda m, x: x.mean((2, 3), keepdim=True), lambda m, x: torch.mean(x, dim=[-1, -2], keepdim=True),
    lambda m, x: F.dropout(x, 0.5, m.training), lambda m, x: F.dropout2d(x, training=m.training),
    lambda m, x: x.contiguous(), lambda m, x: m.norm(x), lambda m, x: m.act(x), lambda m, x: x,
    lambda m, x: nn.ReLU()(x), lambda m, x: (x.size(0), x.shape[2], x.dtype, x.dim(), F.relu(x))[-1],
])  # fmt: skip
def test_operations_that_keep_channels_apart(between):
    model = made(between, norm=nn.BatchNorm2d(8), act=nn.LeakyReLU(0.3, inplace=True))
    pruned = export_pruned(model)
    assert pruned.first.out_channels in (4, 5)
    assert_same_outputs(model, pruned, INPUTS)


class Fire(nn.Module):
    """Two layers read what an activation has overwritten, as in SqueezeNet."""

    def __init__(self, inplace):
        super().__init__()
        self.squeeze, self.act = nn.Conv2d(3, 8, 1), nn.ReLU(inplace)
        self.one, self.three = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.act(self.squeeze(x))
        return self.one(x) + self.three(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_several_layers_read_what_was_overwritten_before(inplace):
    model = Fire(inplace).eval()
    with torch.no_grad():
        model.squeeze.weight[:5] = 0
    pruned = export_pruned(model)
    assert pruned.squeeze.out_channels in (3, 4)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(pruned(x), model(x))


class Heads(nn.Module):
    """A convolution and a linear layer behind a way of flattening images of 4 x 4 pixels."""

    def __init__(self, flatten):
        super().__init__()
        self.flatten = flatten
        self.first, self.head = nn.Conv2d(3, 8, 3, stride=3), nn.Linear(128, 4)

    def forward(self, x):
        return self.head(self.flatten(self.first(x)))


@pytest.mark.parametrize(("flatten", "cuts"), [
    (lambda x: x.flatten(1), True), (lambda x: torch.flatten(x, 1), True), (lambda x: x.view(x.size(0), -1), True),
    (lambda x: torch.flatten(x, start_dim=1), True), (lambda x: x.reshape(x.shape[0], -1), True),
    (lambda x: x.view(x.size()[0], -1), True), (lambda x: F.relu(x.flatten(1)), True),
    (lambda x: x.view(-1, 128), False), (lambda x: x.permute(0, 2, 3, 1).flatten(1), False),
    (lambda x: x.view(x.shape[0], x.shape[1] * 16), False), (lambda x: x.flatten(2).flatten(1), False),
])  # fmt: skip
def test_ways_of_flattening(flatten, cuts):
    torch.manual_seed(0)
    model = randomised(Heads(flatten))
    half_dead(model.first)
    pruned = export_pruned(model)
    assert (pruned.first.out_channels, pruned.head.in_features) == ((4, 64) if cuts else (8, 128))
    assert_same_outputs(model, pruned, INPUTS)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Undecided(nn.Module):
    """A forward that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.last(self.inner(x)) if x.sum() > 0 else self.last(-self.inner(x))


class Gate(nn.Module):
    """Holds another module's layer, which it calls in a forward that torch.fx cannot follow."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def overwritten(m, x):
    y = F.relu(x, inplace=True)
    return m.other(x) + m.third(y)


def overwritten_view(m, x):
    flat = x.flatten(1)
    F.relu_(flat)
    return x


@pytest.mark.parametrize(("between", "modules"), [
    (lambda m, x: x + 1, {}), (lambda m, x: x + x, {}), (lambda m, x: torch.cat([x[:, :4], x[:, 4:]], 1), {}),
    (lambda m, x: F.relu(x) + F.relu(x), {}), (lambda m, x: x.flip(1), {}), (lambda m, x: F.softmax(x, 1), {}),
    (lambda m, x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1), {}), (lambda m, x: F.layer_norm(x, x.shape[1:]), {}),
    (lambda m, x: x.view(x.shape), {}), (lambda m, x: x * x.size(1), {}), (lambda m, x: x.mean(1, True) + x, {}),
    (lambda m, x: F.batch_norm(x, m.norm.running_mean, m.norm.running_var), {}), (lambda m, x: F.dropout(x, 0.0), {}),
    (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], {}), (lambda m, x: x - x.relu().mean(), {}),
    (lambda m, x: m.other(x), {"other": Undecided()}), (lambda m, x: m.other(x), {"other": nn.PReLU(8)}),
    (lambda m, x: m.other(x), {"other": nn.Conv2d(8, 8, 3, groups=8)}),
    (lambda m, x: m.other(x), {"other": nn.GroupNorm(2, 8)}), (lambda m, x: m.other(x), {"other": nn.Softmax(1)}),
    (lambda m, x: m.other(x), {"other": Doubled(8, 8, 1)}), (lambda m, x: m.other(x), {"other": GradientCalibration()}),
    (lambda m, x: m.other(x), {"other": nn.BatchNorm2d(8, track_running_stats=False)}),
    (lambda m, x: m.other(x), {"other": nn.Linear(10, 10)}), (lambda m, x: m.other(x), {"other": nn.Flatten(2, 2)}),
    (lambda m, x: m.norm(m.norm(x)), {}),
    (lambda m, x: F.conv2d(x, m.other.weight) + m.other(x), {"other": nn.Conv2d(8, 8, 1)}),
    (lambda m, x: m.other(x) * m.other.weight.sum(), {"other": nn.Conv2d(8, 8, 1)}),
    (lambda m, x: (m.norm(x), x)[1], {}), (overwritten_view, {}),
    (overwritten, {"other": nn.Conv2d(8, 8, 1), "third": nn.Conv2d(8, 8, 1)}),
])  # fmt: skip
def test_channels_that_go_elsewhere_stay(between, modules):
    model = made(between, norm=nn.BatchNorm2d(8), **modules)
    pruned = export_pruned(model)
    assert pruned.first.out_channels == 8
    assert_same_outputs(model, pruned, INPUTS)


def test_submodules_that_cannot_be_followed_stay_as_they_are():
    inner = Undecided()
    model = made(lambda m, x: m.other(x), other=inner)
    half_dead(inner.inner)
    pruned = export_pruned(model)
    assert pruned.other.inner.out_channels == 8
    assert_same_outputs(model, pruned, INPUTS)
    assert_same_outputs(model, pruned, -INPUTS)


@pytest.mark.parametrize("shared", ["weight", "statistics", "layer"])
def test_channels_of_layers_that_something_else_uses_stay(shared):
    model = made(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8), other=nn.Conv2d(3, 8, 3), last=nn.BatchNorm2d(8))
    if shared == "weight":
        model.other.weight = model.first.weight
    elif shared == "statistics":
        model.last.running_var = model.norm.running_var
    else:
        model = made(lambda m, x: m.gate(m.other(x)), other=nn.Conv2d(8, 8, 1), gate=Gate(nn.Identity()))
        model.gate.layer = model.other
    pruned = export_pruned(model)
    assert pruned.first.out_channels == pruned.other.out_channels == 8
    assert_same_outputs(model, pruned, INPUTS)


def test_a_layer_that_stands_under_two_names_is_cut_once():
    other = nn.Conv2d(8, 8, 1)
    model = made(lambda m, x: m.again(x), other=other, again=other)
    pruned = export_pruned(model)
    assert pruned.again is pruned.other
    assert pruned.other.in_channels == 4
    assert_same_outputs(model, pruned, INPUTS)


def test_several_layers_read_the_same_channels_with_other_constants():
    """Each that pads needs a dead filter whose constant is not 0 for it; ReLU and its opposite have none in common."""
    model = made(
        lambda m, x: m.third(F.relu(x)) + m.fourth(F.relu(m.norm(x))) + m.fifth(x.sigmoid()), norm=nn.BatchNorm2d(8),
        third=nn.Conv2d(8, 8, 3, padding=1), fourth=nn.Conv2d(8, 8, 3, padding=1), fifth=nn.Conv2d(8, 8, 1),
    )  # fmt: skip
    with torch.no_grad():
        model.first.bias[:4] = torch.tensor([1.0, 2, -1, -2])
        model.norm.weight.fill_(-1)
        model.norm.bias.zero_()
        model.norm.running_mean.zero_()
    pruned = export_pruned(model)
    assert pruned.first.out_channels == 6
    assert_same_outputs(model, pruned, INPUTS)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_layer_without_bias_leaves_constants_to_the_normalization_behind_it(normalized):
    second, norm = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6) if normalized else nn.Identity()
    model = made(lambda m, x: F.relu(x), second=nn.Sequential(second, norm))
    pruned = export_pruned(model)
    assert pruned.first.out_channels == 4
    assert (pruned.second[0].bias is None) == normalized
    assert_same_outputs(model, pruned, INPUTS)


@pytest.mark.parametrize(("layers", "cuts"), [
    ([nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)], True),
    ([nn.Unflatten(1, (8, 6)), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)], False),
    ([nn.Unflatten(1, (8, 6)), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)], True),
    ([nn.Unflatten(1, (8, 6)), nn.Linear(6, 8), nn.Flatten(), nn.Linear(64, 4)], False),
])  # fmt: skip
def test_linear_layers_of_vectors_and_of_sequences(layers, cuts):
    torch.manual_seed(0)
    model = randomised(nn.Sequential(*layers))
    linear = next(k for k, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    half_dead(model[linear])
    pruned = export_pruned(model)
    assert pruned[linear].out_features == (4 if cuts else 8)
    assert_same_outputs(model, pruned, torch.randn(5, 6 if linear == 0 else 48))


def test_channels_that_go_elsewhere_in_training_stay():
    model = made(lambda m, x: x + x.mean(1, keepdim=True) if m.training else F.relu(x))
    pruned = export_pruned(model)
    assert pruned.first.out_channels == 8
    pruned.train()(INPUTS)


def test_a_forward_is_that_of_its_defaults():
    class Optional(Model):
        def forward(self, x, mask=None, *, features=False):
            if mask is not None:
                x = x * mask
            x = self.first(x)
            return x if features else self.head(self.second(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Optional(None).eval()
    half_dead(model.first)
    pruned = export_pruned(model)
    assert pruned.first.out_channels == 5
    assert_same_outputs(model, pruned, INPUTS)


class Named(Model):
    def forward(self, *, x):
        return super().forward(x)


class Passed(Model):
    def forward(self, *args, **kwargs):
        return super().forward(args[0])


class Chosen(Model):
    def forward(self, x, kept=(1, 2), dims=None, **kwargs):
        return super().forward(x)[:, kept]


class WithoutGradients(Model):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Named, Passed, Chosen, WithoutGradients])
def test_ways_to_take_arguments(kind):
    torch.manual_seed(0)
    model = randomised(kind(lambda m, x: x))
    half_dead(model.first)
    pruned = export_pruned(model)
    assert pruned.first.out_channels == 5
    if kind is Named:
        model, pruned = (lambda x, m=m: m(x=x) for m in (model, pruned))
    assert_same_outputs(model, pruned, INPUTS)


def test_the_memory_format_of_the_weights_stays():
    pruned = export_pruned(network("resnet20").to(memory_format=torch.channels_last))
    for layer in (pruned.stages[0].conv1, pruned.stages[0].conv2):
        assert layer.weight.shape != (16, 16, 3, 3)
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_forward_that_tells_tensors_from_others_is_followed_as_with_tensors():
    def between(m, x):
        assert isinstance(x, torch.Tensor)
        return F.relu(x)

    assert export_pruned(made(between)).first.out_channels < 8


# Errors


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got"):
        export_pruned([nn.Linear(2, 2)])


@pytest.mark.parametrize(("between", "modules", "error", "message"), [
    (lambda m, x: x if x.sum() > 0 else -x, {}, TypeError, "cannot follow the forward of the model, Model"),
    (lambda m, x: x / m.first.out_channels, {}, None, ""),
    (lambda m, x: F.relu(x), {"scaled": True}, ValueError, "the forward of Scaled computes with the number of chan"),
    (lambda m, x: x, {"state": True}, TypeError, "^second has a tensor seen that waits for a backward pass"),
])  # fmt: skip
def test_what_cannot_be_exported(between, modules, error, message):
    class Scaled(Model):
        def forward(self, x):
            return super().forward(x) / self.first.out_channels

    torch.manual_seed(0)
    model = (Scaled if "scaled" in modules else Model)(between).eval()
    half_dead(model.first)
    if "state" in modules:
        model.second.seen = model.first.weight * 2
    if error is None:
        assert export_pruned(model).first.out_channels == 8
        return
    with pytest.raises(error, match=message):
        export_pruned(model)


# Random forwards


class Drawn(nn.Module):
    """A forward of operations that are drawn; each takes one of the tensors made so far, which have 4 channels."""

    FUNCTIONS = (
        F.relu, torch.sigmoid, lambda x: F.relu(x, inplace=True), lambda x: F.max_pool2d(x, 3, 2, 1), nn.Identity(),
        lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 2, 1, False, False),
        lambda x: x.mean((2, 3), keepdim=True),
    )  # fmt: skip

    def __init__(self, draws):
        super().__init__()
        self.draws, self.first, self.head = draws, nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        kinds = [(which // 2 % 2 + 1, which % 2, which % 3 == 0) for _, _, which in draws]
        self.layers = nn.ModuleList(
            nn.Conv2d(4, 4, kernel, padding=padding + kernel // 2, bias=bias) for kernel, padding, bias in kinds
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in draws)

    def forward(self, x):
        made = [self.first(x)]
        for k, (back, operation, which) in enumerate(self.draws):
            y = made[-1 - back % len(made)]
            if operation == "sum":
                y = y + F.adaptive_avg_pool2d(made[-1], 1)
            else:
                y = {"layer": self.layers[k], "norm": self.norms[k], "function": self.FUNCTIONS[which]}[operation](y)
            made.append(y)
        return self.head(made[-1].mean((2, 3)))


# Mostly of the tensor made last.
OPERATION = st.tuples(
    st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from(["layer", "layer", "norm", "function", "sum"]), st.integers(0, 7)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(OPERATION, min_size=3, max_size=9), st.integers(0, 1000))
def test_random_forwards_give_the_same(draws, seed):
    torch.manual_seed(seed)
    model = randomised(Drawn(draws))
    assert_same_outputs(model, export_pruned(model), torch.randn(2, 3, 9, 9))
