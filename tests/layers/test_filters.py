# SPDX-License-Identifier: Apache-2.0
"""GCConv2d and GCLinear: filters made of base filters and branch factors, as the paper's figure of its layer shows."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from csgd_cuda import GCConv2d, GCLinear, calibrate, calibrate_filters, export_pruned, fold

from ..distributed.launch import run
from ..helpers import assert_same_bits, set_grads

CASES = {
    "layer": {"factors_per": "layer"},
    "filter": {"factors_per": "filter"},
    "channel": {"factors_per": "channel"},
    "as they are": {"normalize": False},
    "groups": {"groups": 2, "bias": False},
    "two branches": {"branches": 2, "padding": "same", "padding_mode": "reflect"},
    "one branch": {"branches": 1},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def make(device="cpu", dtype=torch.float32, **options):
    torch.manual_seed(0)
    return GCConv2d(4, 8, 3, **options).to(device, dtype)


def images(device="cpu", dtype=torch.float32):
    return torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def used_factors(layer):
    """R for each filter, (base filters, branches, inputs or 1, kh, kw)."""
    factors = layer.factors.unflatten(0, (-1, layer.branches))
    if layer.normalize:
        factors = factors - factors.mean(1, keepdim=True) + 1
    return factors.expand(layer.weight.shape[0], *factors.shape[1:])


@cases
def test_a_filter_is_its_base_filter_times_its_factors(options, device):
    layer = make(device, **options)
    factors = used_factors(layer)
    for number, found in enumerate(layer.filters()):
        base, branch = divmod(number, layer.branches)
        assert_same_bits(found, factors[base, branch] * layer.weight[base])


@cases
def test_the_output_is_that_of_the_plain_layer_with_these_filters(options, device):
    layer = make(device, **options)
    plain = {name: value for name, value in options.items() if name in ("groups", "bias", "padding", "padding_mode")}
    other = nn.Conv2d(4, 8, 3, **plain).to(device)
    with torch.no_grad():
        other.weight.copy_(layer.filters())
        if other.bias is not None:
            other.bias.copy_(layer.bias)
    assert_same_bits(layer(images(device)), other(images(device)))


@cases
def test_gradients_are_those_of_the_figure(options, device):
    """w receives the sum over the branches of R_i times the gradient of filter R_i * w, and R_i that of its filters
    times w; with normalize less its mean over the branches."""
    layer = make(device, torch.float64, **options)
    layer(images(device, torch.float64)).square().sum().backward()
    folded = fold(layer)
    folded(images(device, torch.float64)).square().sum().backward()
    of_filters = folded.weight.grad.unflatten(0, (-1, layer.branches))
    factors = used_factors(layer).detach()
    torch.testing.assert_close(layer.weight.grad, (factors * of_filters).sum(1), rtol=1e-12, atol=1e-12)
    of_factors = layer.weight.detach()[:, None] * of_filters
    per_filter = len(layer.factors) == layer.out_channels > layer.branches
    expected = of_factors if per_filter else of_factors.sum(0, keepdim=True)
    expected = expected if layer.factors.shape[1] > 1 else expected.sum(2, keepdim=True)
    if layer.normalize:
        expected = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(layer.factors.grad, expected.flatten(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factors_per", ["layer", "filter", "channel"])
def test_gradients_are_those_of_autograd_in_float64(factors_per):
    layer = GCConv2d(2, 4, 2, branches=2, factors_per=factors_per, dtype=torch.float64)

    def output(x, weight, factors, bias):
        return torch.func.functional_call(layer, {"weight": weight, "factors": factors, "bias": bias}, (x,))

    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.factors, layer.bias)]
    assert torch.autograd.gradcheck(output, (x, *values))


@pytest.mark.parametrize("factors_per", ["layer", "filter", "channel"])
@pytest.mark.parametrize("branches", [1, 2, 4, 8])
def test_a_branch_drawn_at_random_is_an_unbiased_estimate_of_the_variables(branches, factors_per):
    """By enumeration of the branches, after the factors have been changed at will."""
    layer = make(torch.device("cpu"), torch.float64, branches=branches, factors_per=factors_per)
    with torch.no_grad():
        layer.factors.normal_(3.0, 2.0)
    mean = layer.filters().unflatten(0, (-1, branches)).mean(1)
    torch.testing.assert_close(mean, layer.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"spread": 0.0}, {"spread": 2.0}, {"factors_per": "channel"}, {"branches": 2}])
def test_a_new_layer_has_the_variance_of_a_plain_one(options):
    torch.manual_seed(0)
    x = torch.randn(64, 64, 8, 8)
    ours = torch.stack([GCConv2d(64, 64, 3, bias=False, **options)(x).var() for _ in range(8)]).mean()
    theirs = torch.stack([nn.Conv2d(64, 64, 3, bias=False)(x).var() for _ in range(8)]).mean()
    assert (ours / theirs).item() == pytest.approx(1, abs=0.1)


def test_it_has_a_share_of_the_weights():
    layer = GCConv2d(64, 128, 3, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 64 * 128 * 9 // 4 + 4 * 9
    assert GCConv2d(64, 128, 3, factors_per="filter").factors.shape == (128, 1, 3, 3)
    assert GCConv2d(64, 128, 3, factors_per="channel").factors.shape == (4, 64, 3, 3)


def test_gclinear_is_the_same_of_rows():
    torch.manual_seed(0)
    layer = GCLinear(6, 8, branches=4)
    assert layer.weight.shape == (2, 6)
    assert layer.factors.shape == (4, 6)
    factors = layer.factors - layer.factors.mean(0, keepdim=True) + 1
    for number, row in enumerate(layer.filters()):
        assert_same_bits(row, factors[number % 4] * layer.weight[number // 4])
    torch.testing.assert_close(layer.filters().unflatten(0, (2, 4)).mean(1), layer.weight)
    x = torch.randn(3, 6)
    assert_same_bits(layer(x), nn.functional.linear(x, layer.filters(), layer.bias))
    assert_same_bits(fold(layer)(x), layer(x))


# Where layers stand.


def network(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(
        GCConv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), GCLinear(128, 8), nn.ReLU(), nn.Linear(8, 4)
    ).to(device)


def test_compiles_without_a_break():
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(images()), layer(images()))
    compiled(images()).square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(images()).square().sum().backward()
    for grad, p in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_is_exported():
    layer = make().eval()
    exported = torch.export.export(layer, (images(),)).module()
    assert_same_bits(exported(images()), layer(images()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant, device):
    plain, other = network(device), network(device)
    x = images(device).requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(other, x, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert_same_bits(a.grad, b.grad)


def test_autocast_computes_in_bfloat16(device):
    layer = make(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(images(device))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.weight.grad.dtype == layer.factors.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(images(device)), rtol=0.05, atol=0.05)


@cases
def test_channels_last(options, device):
    layer = make(device, **options)
    expected = layer(images(device))
    got = layer.to(memory_format=torch.channels_last)(images(device).to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_the_same(copied, device):
    layer = make(device)
    other = copied(layer)
    assert_same_bits(other(images(device)), layer(images(device)))
    assert repr(other) == repr(layer)


def test_state_dict_of_another_process_loads():
    layer, other = make(), GCConv2d(4, 8, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(other(images()), layer(images()))


def test_trains_under_both_optimizers(optimizer_class, device, fused):
    model = network(device)
    optimizer = optimizer_class(model.named_parameters(), lr=0.01, fused=fused)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(images(device)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_calibrate_puts_its_layers_on_the_base_filters(device):
    plain, model = network(device), calibrate(network(device), types=(GCConv2d, GCLinear), calibration=0.0)
    for each in (plain, model):
        each(images(device)).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert_same_bits(a.grad, b.grad)
    assert model[0].weight_calibration.step.item() == 1


def test_pruning_of_filters_counts_base_filters(optimizer_class):
    model = nn.Sequential(make(), nn.ReLU())
    optimizer = optimizer_class(
        [{"params": [model[0].weight], "sparsity": 0.5, "structure": "filter"}, {"params": [model[0].factors]}], lr=0.1
    )
    set_grads(list(model.parameters()), seed=0)
    optimizer.step()
    alive = model[0].weight.flatten(1).any(1)
    assert alive.sum() == 1
    assert_same_bits(model[0].filters().flatten(1).any(1), alive.repeat_interleave(4))
    with pytest.raises(TypeError, match="GCConv2d"):
        export_pruned(model)
    assert export_pruned(fold(nn.Sequential(model, nn.Conv2d(8, 2, 1))))[0][0].weight.shape[0] == 4


# fold.


def test_folding_changes_no_bit_and_leaves_a_plain_model(device):
    model = network(device).train()
    model(images(device))
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert [type(m) for m in folded] == [
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear
    ]  # fmt: skip
    assert folded.training
    assert_same_bits(folded.eval()(images(device)), model.eval()(images(device)))
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)
    plain = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    plain.load_state_dict(folded.state_dict())


def test_a_layer_in_two_places_is_folded_once():
    layer = GCLinear(8, 8)
    folded = fold(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert folded["a"] is folded["b"][0]


def test_folding_leaves_shared_weights_shared():
    model = nn.Sequential(GCConv2d(4, 4, 3), GCConv2d(4, 4, 3), GCConv2d(4, 4, 3, branches=2))
    model[1].weight, model[1].factors, model[1].bias = model[0].weight, model[0].factors, model[0].bias
    folded = fold(model)
    assert folded[0].weight is folded[1].weight
    assert folded[0].bias is folded[1].bias
    assert folded[2].weight is not folded[1].weight


def test_folding_leaves_hooks_and_draws_nothing():
    model = nn.Sequential(make()).eval()
    model[0].register_forward_hook(lambda module, inputs, out: out.relu())
    state = torch.get_rng_state()
    folded = fold(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(folded[0]) is nn.Conv2d
    assert_same_bits(folded(images()), model(images()))


def test_folding_of_a_compiled_or_parametrized_layer():
    compiled = torch.compile(make().eval(), backend="aot_eager")
    assert_same_bits(fold(compiled)(images()), make()(images()))
    layer = nn.utils.parametrizations.weight_norm(make())
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    folded = fold(layer)
    assert type(folded) is nn.Conv2d
    assert list(folded.state_dict()) == ["weight", "bias"]
    assert_same_bits(folded(images()), layer(images()))


class Rectified(GCConv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Renamed(GCConv2d):
    """With another constructor only."""

    def __init__(self, width):
        super().__init__(4, width, 3)


def with_forward():
    layer = make()
    layer.forward = lambda x: GCConv2d.forward(layer, x).relu()
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Rectified(4, 8, 3), r"module '0' \(Rectified\) has a forward of its own"),
        (with_forward, r"module '0' \(GCConv2d\) has a forward of its own"),
        (lambda: nn.utils.spectral_norm(make()), r"module '0' \(GCConv2d\) has a weight that hooks make"),
    ],
)
def test_what_no_plain_layer_computes_is_not_folded(layer, message):
    with pytest.raises(TypeError, match=message):
        fold(nn.Sequential(layer()))
    assert type(fold(Renamed(8))) is nn.Conv2d


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("made", [make, lambda: calibrate_filters(nn.Conv2d(4, 8, 3))], ids=["base", "drawn"])
def test_factors_are_not_pruned(made, copied, optimizer_class):
    model = copied(made())
    with pytest.raises(ValueError, match="parameter 2 has the branch factors"):
        optimizer_class(model.parameters(), lr=0.1, sparsity=0.5, structure="filter")


def test_frozen_parameters_stay_frozen():
    layer = make().requires_grad_(False)
    assert not fold(layer).weight.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"branches": 3}, ValueError, "GCConv2d: branches must divide the 8 outputs, got 3"),
        ({"branches": 0}, ValueError, "GCConv2d: branches must be at least 1, got 0"),
        ({"branches": 2.0}, TypeError, "branches must be"),
        ({"spread": -1.0}, ValueError, "GCConv2d: spread must be a finite number >= 0, got -1.0"),
        ({"factors_per": "branch"}, ValueError, "factors_per must be one of layer, filter, channel, got 'branch'"),
        ({"normalize": "yes"}, TypeError, "normalize must be"),
        ({"out_channels": "8"}, TypeError, "the number of outputs must be an integer, got '8'"),
        ({"groups": 3}, ValueError, "divisible by groups"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        GCConv2d(4, **{"out_channels": 8, "kernel_size": 3} | options)
    if "branches" in options:
        with pytest.raises(error, match=re.escape(message.replace("GCConv2d", "GCLinear"))):
            GCLinear(4, 8, **options)


# Processes.


def gradients_of_rank(rank):
    """By DistributedDataParallel; of the mean loss over both ranks' batches in one process; and by fully_shard."""
    batches = [torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    replica, whole, sharded = network().double(), network().double(), network().double()
    for model in (replica, whole, sharded):
        model[1] = nn.Identity()  # whose statistics would be those of a batch
    sum(whole(batch.double()).square().mean() for batch in batches).div(2).backward()
    wrapped = DistributedDataParallel(replica)
    wrapped(batches[rank].double()).square().mean().backward()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    sharded(batches[rank].double()).square().mean().backward()
    return [[p.grad.clone() for p in model.parameters()] for model in (whole, replica)] + [
        [p.grad.full_tensor() for p in sharded.parameters()]
    ]


def test_replicas_and_shards_have_the_mean_of_the_gradients():
    for whole, replica, sharded in run(2, gradients_of_rank):
        for expected, of_replica, of_shard in zip(whole, replica, sharded, strict=True):
            torch.testing.assert_close(of_replica, expected, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(of_shard, expected, rtol=1e-12, atol=1e-14)
