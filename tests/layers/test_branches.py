# SPDX-License-Identifier: Apache-2.0
"""calibrate_filters: training forward passes use random, unbiased estimates of the filters; evaluation the filters."""

import copy
import io
import pickle
import re
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from csgd_cuda import GCConv2d, calibrate, calibrate_filters, fold, number_layers, uncalibrate
from csgd_cuda.reference import philox

from ..distributed.launch import run
from ..helpers import assert_same_bits


def make(device="cpu", seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(96, 5),
    ).to(device)  # fmt: skip


def calibrated(device="cpu", **options):
    model = make(device)
    torch.manual_seed(1)
    return calibrate_filters(model, **options)


def images(device="cpu", seed=0):
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).to(device)


def branches_of(model):
    return [m.filter_branches.branch(m.out_channels).clone() for m in model if isinstance(m, nn.Conv2d)]


def train(model, steps=3, first=0):
    losses = []
    for seed in range(first, first + steps):
        loss = model(images(model[0].weight.device, seed)).square().sum()
        loss.backward()
        losses.append(loss.detach())
    return losses


def factors_of(layer):
    return layer.factors - layer.factors.mean(0, keepdim=True) + 1


def test_evaluation_is_that_of_the_plain_model_bit_for_bit(device):
    plain, model = make(device), calibrated(device)
    train(plain)
    train(model)
    model[1].load_state_dict(plain[1].state_dict())  # the statistics of what passed through other filters
    assert_same_bits(model.eval()(images(device)), plain.eval()(images(device)))


def test_a_training_pass_runs_through_the_filters_drawn(device):
    model = calibrated(device)
    for _ in range(3):
        out, plain = model(images(device)), make(device)
        for m, p, branch in zip((model[0], model[3]), (plain[0], plain[3]), branches_of(model), strict=True):
            p.weight.data = m.weight.data * factors_of(m.filter_branches)[branch].detach()
        assert_same_bits(out, plain(images(device)))
        train(model, 1)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_the_filters_in_the_mean_over_all_draws_are_the_variables(branches, monkeypatch):
    """By enumeration of the branches that two filters can have, of factors changed at will."""
    layer = calibrate_filters(nn.Sequential(nn.Conv2d(3, 2, 3, dtype=torch.float64)), branches)[0]
    with torch.no_grad():
        layer.filter_branches.factors.normal_(3.0, 2.0)
    seen = []
    for choice in product(range(branches), repeat=2):
        monkeypatch.setattr(layer.filter_branches, "branch", lambda filters, step, choice=choice: torch.tensor(choice))
        seen.append(layer.filter_branches(layer.weight))
    torch.testing.assert_close(torch.stack(seen).mean(0), layer.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("branches", [1, 2, 3, 4, 8])
def test_each_branch_has_its_share_of_the_draws(branches, monkeypatch):
    """Of all 2^16: exactly the same with a power of two, else but for one draw."""
    layer = calibrate_filters(nn.Sequential(nn.Conv2d(1, 1, 1)), branches)[0].filter_branches
    monkeypatch.setattr("csgd_cuda.layers.branches.draws", lambda begin, end, **_: torch.arange(2**16).view(1, -1))
    monkeypatch.setattr("csgd_cuda.layers.branches._STEPS_AT_ONCE", 1)
    counts = torch.bincount(layer.branch(2**16), minlength=branches)
    assert counts.sum() == 2**16
    assert counts.max() - counts.min() <= (0 if branches in (1, 2, 4, 8) else 1)


def test_draws_follow_the_contract(device):
    """Stream 7, the number of the layer in the model, its own step; filter i has draw i."""
    model = calibrated(device, seed=2**40 + 3)
    train(model)
    for number, layer in enumerate((model[0], model[3])):
        step = torch.tensor(3)  # one for each of the three backward passes
        drawn = philox.draws(0, 8, seed=2**40 + 3, stream=7, index=number, step=step, device=torch.device("cpu"))
        expected = drawn[: layer.out_channels].long() * 4 // 2**16
        assert_same_bits(layer.filter_branches.branch(layer.out_channels), expected)


def test_draws_change_with_a_backward_pass(device):
    model = calibrated(device)
    first = branches_of(model)
    for _ in range(2):  # without a backward pass between them
        out = model(images(device))
        assert all(map(torch.equal, branches_of(model), first))
    model.eval()(images(device))
    with torch.no_grad():
        model.train()(images(device))
    assert all(map(torch.equal, branches_of(model), first))
    out.sum().backward()
    assert not all(map(torch.equal, branches_of(model), first))


def test_a_backward_pass_of_earlier_filters_does_not_bring_them_back(device):
    """As in a pipeline, where the backward passes of several batches follow one another."""
    model = calibrated(device)
    first, second = (model(images(device, seed)).sum() for seed in range(2))
    first.backward()
    third = model(images(device, 2)).sum()
    third.backward()
    second.backward()
    assert model[0].filter_branches.step.item() == 2


@pytest.mark.parametrize("trained", ["nothing", "bias", "head"])
def test_filters_that_are_not_trained_are_drawn_anew_in_each_pass(trained, device):
    model = calibrated(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "0.bias" if trained == "bias" else trained == "head" and name[0] == "5")
    seen = []
    for _ in range(3):
        seen.append(branches_of(model)[0])
        out = model(images(device)).sum()
        if out.requires_grad:
            out.backward()
    assert not torch.equal(seen[0], seen[1])
    assert model[0].filter_branches.step.item() == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_made_anew_by_checkpointing_has_the_same_filters(reentrant, device):
    """Also where the model is used twice before the backward pass."""
    plain, other = calibrated(device).double(), calibrated(device).double()
    for seed in range(3):
        for model, call in (
            (plain, lambda x: plain(x)),
            (other, lambda x: checkpoint(other, x, use_reentrant=reentrant)),
        ):
            model.zero_grad()
            first, second = (images(device, 10 * seed + k).double().requires_grad_() for k in range(2))
            (call(first).square().sum() + call(second).square().sum()).backward()
        for a, b in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)  # the two gradients are added in any order
        assert all(map(torch.equal, branches_of(plain), branches_of(other)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_made_anew_has_its_own_filters_after_other_passes_too(reentrant, device):
    """A forward pass between two backward passes of earlier ones, as in a pipeline."""
    plain, other = calibrated(device).double(), calibrated(device).double()
    for model, call in (
        (plain, lambda x: plain(x)),
        (other, lambda x: checkpoint(other, x, use_reentrant=reentrant)),
    ):
        model[1].eval()  # its statistics would be those of every pass, also of those made anew
        x = [images(device, k).double().requires_grad_() for k in range(4)]
        first, second = call(x[0]).square().sum(), call(x[1]).square().sum()
        first.backward()
        third = call(x[2]).square().sum()
        second.backward()
        fourth = call(x[3]).square().sum()
        fourth.backward()
        third.backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_torch_func_differentiates_and_maps(device):
    model = calibrated(device).double()
    model[1].eval()
    x = images(device).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, x):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    loss(dict(model.named_parameters()), x).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
        torch.testing.assert_close(each[name].sum(0), p.grad)


def test_gradients_are_those_through_the_filters_drawn(device):
    model = calibrated(device).double()
    x = images(device).double()
    branches = branches_of(model)
    branch = branches[0]
    model(x).square().sum().backward()
    plain = make(device).double()
    for m, p, drawn in zip((model[0], model[3]), (plain[0], plain[3]), branches, strict=True):
        p.weight.data = m.weight.data * factors_of(m.filter_branches)[drawn].detach()
    plain(x).square().sum().backward()
    layer, grad = model[0], plain[0].weight.grad
    torch.testing.assert_close(layer.weight.grad, factors_of(layer.filter_branches)[branch].detach() * grad)
    of_factors = torch.zeros_like(layer.filter_branches.factors)
    of_factors.index_add_(0, branch, (layer.weight.detach() * grad).sum(1, keepdim=True))
    torch.testing.assert_close(layer.filter_branches.factors.grad, of_factors - of_factors.mean(0, keepdim=True))


def test_parameters_keep_their_identity_and_factors_come_in_addition():
    model = make()
    before = dict(model.named_parameters())
    calibrate_filters(model)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert sorted(after.keys() - before.keys()) == ["0.filter_branches.factors", "3.filter_branches.factors"]
    assert after["3.filter_branches.factors"].shape == (4, 1, 3, 3)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_resumes_exactly(way, device):
    model = calibrated(device)
    train(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = calibrate_filters(make(device, seed=5))
        other.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, branches_of(other), branches_of(model)))
    other.load_state_dict(model.state_dict())  # all parameters
    for a, b in zip(train(model, first=3), train(other, first=3), strict=True):
        assert_same_bits(a, b)


def test_a_loaded_step_is_the_next_one_whatever_was_before(device):
    model, saved = calibrated(device), calibrated(device).state_dict()
    expected = branches_of(model)
    train(model)
    model.load_state_dict(saved)
    assert all(map(torch.equal, branches_of(model), expected))


def test_made_on_the_meta_device():
    """By to_empty and reset_parameters, or by a state dict that is assigned."""
    with torch.device("meta"):
        model = calibrated("meta")
    assert model[0].filter_branches.factors.is_meta
    other = copy.deepcopy(model).to_empty(device="cpu")
    for module in other.modules():
        getattr(module, "reset_parameters", lambda: None)()
    model.load_state_dict(calibrated().state_dict(), assign=True)
    for each in (model, other):
        assert [each[k].filter_branches.index.item() for k in (0, 3)] == [0, 1]
        assert 0 < (each[0].filter_branches.factors - 1).square().mean() < 0.04  # a spread of 0.1
        train(each)
        assert each[3].filter_branches.step.item() == 3


def test_layers_of_a_model_have_numbers_of_their_own():
    """Also where it is put together from parts, or gets the state of a part."""
    model = number_layers(nn.Sequential(calibrated(), calibrated()))
    assert numbers_of(model) == [0, 1, 2, 3]
    model[1].load_state_dict(calibrated().state_dict())
    assert numbers_of(model) == [0, 1, 2, 3]
    beside = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1), calibrated()[3])
    assert numbers_of(calibrate_filters(beside, types=nn.Conv1d)) == [0, 1, 2]


def numbers_of(model):
    return [m.filter_branches.index.item() for m in model.modules() if hasattr(m, "filter_branches")]


def test_a_pass_in_inference_mode_does_not_disturb_training():
    """What is drawn there is kept for later steps, and is of the CPU whatever the default device is."""
    model, other = calibrated(seed=77), calibrated(seed=77)  # a seed of which nothing has been drawn
    x = images()
    with torch.inference_mode(), torch.device("meta"):
        model(x)
    for a, b in zip(train(model), train(other), strict=True):
        assert_same_bits(a, b)


def test_branches_made_in_inference_mode_are_trained_later():
    model = make()
    with torch.inference_mode():
        calibrate_filters(model)
        folded = fold(model)
    train(model)
    train(folded)
    assert model[0].filter_branches.factors.grad is not None


def test_export_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"export model\.eval"):
        torch.export.export(calibrated(), (images(),))
    torch.export.export(calibrated().eval(), (images(),))


def test_casts_and_devices_leave_the_counts(device):
    model = calibrated()
    train(model)
    layer = model.to(device).half()[0].filter_branches
    assert layer.factors.dtype == torch.float16
    assert layer.index.dtype == layer.step.dtype == torch.int64
    assert layer.step.device.type == device.type
    assert layer.step.item() == 3


def test_compiled_training_draws_the_same():
    eager, model = calibrated(), calibrated()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(3):
        eager(images(seed=seed)).square().sum().backward()
        compiled(images(seed=seed)).square().sum().backward()
        assert all(map(torch.equal, branches_of(eager), branches_of(model)))
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_trains_under_both_optimizers(optimizer_class, device, fused):
    model = calibrated(device)
    optimizer = optimizer_class(model.named_parameters(), lr=0.01, fused=fused)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(images(device)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(model[0].filter_branches.factors, calibrated(device)[0].filter_branches.factors)


def test_goes_together_with_calibrate_in_any_order(device):
    """The weight passes through both layers; each is taken off by its own function."""
    one = calibrate(calibrated(device), types=nn.Conv2d, calibration=0.0)
    torch.manual_seed(0)
    other = calibrate(make(device), types=nn.Conv2d, calibration=0.0)
    torch.manual_seed(1)
    calibrate_filters(other)
    for a, b in zip(train(one), train(other), strict=True):
        assert_same_bits(a, b)
    assert one[0].weight_calibration.step.item() == 3
    assert_same_bits(train(uncalibrate(one), 1)[0], train(uncalibrate(other), 1)[0])
    assert hasattr(one[0], "filter_branches")
    assert type(fold(one)[0]) is nn.Conv2d


def test_folding_leaves_the_plain_model(device):
    model = calibrated(device)
    train(model)
    folded = fold(model)
    assert repr(folded) == repr(make())
    assert list(folded.state_dict()) == list(make().state_dict())
    assert_same_bits(folded.eval()(images(device)), model.eval()(images(device)))
    assert hasattr(model[0], "filter_branches")
    train(calibrate_filters(folded))  # a plain model can get new ones


@pytest.mark.parametrize(
    "parametrization", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_folding_leaves_a_parametrization(parametrization):
    """Which has changed the class of the module after its filters were calibrated."""
    model = calibrated()
    parametrization(model[0])
    train(model)
    folded = fold(model)
    assert_same_bits(folded.eval()(images()), model.eval()(images()))
    assert type(folded[0]).__name__ == "ParametrizedConv2d"
    assert type(folded[0]).__mro__[1] is nn.Conv2d
    assert_same_bits(calibrate(model, where="output").eval()(images()), folded(images()))


def test_folding_takes_off_all_that_is_ours():
    folded = fold(calibrate(calibrated()))
    assert [type(m) for m in folded] == [type(m) for m in make()]
    assert "csgd" not in str(folded.state_dict()._metadata)


class Parametrized(nn.Module):
    def forward(self, weight):
        return weight * 2


def with_integers():
    model = make()
    model[3].weight = nn.Parameter(torch.ones(6, 4, 3, 3, dtype=torch.int8), requires_grad=False)
    return model


def with_attribute(name, value):
    model = make()
    setattr(model[3], name, value)
    return model


def parametrized():
    model = make()
    nn.utils.parametrize.register_parametrization(model[3], "weight", Parametrized())
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (make, {"branches": 0}, ValueError, "branches must be at least 1, got 0"),
        (make, {"spread": float("nan")}, ValueError, "spread must be a finite number >= 0, got nan"),
        (make, {"seed": -1}, ValueError, "seed must be in 0 ... 2^64-1, got -1"),
        (make, {"types": nn.Conv3d}, ValueError, "no module of type Conv3d"),
        (make, {"types": (nn.Conv2d, nn.Linear)}, TypeError, "module '5' (Linear) is no nn.Conv1d"),
        (calibrated, {}, ValueError, "has branches already; fold(model)"),
        (lambda: nn.Sequential(GCConv2d(2, 8, 3)), {}, ValueError, "module '0' (GCConv2d) has branches of its own"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), {}, TypeError, "module '0' (LazyConv2d) has not seen its input"),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 8, 3)),
            {"types": (nn.Conv2d, nn.ConvTranspose2d)}, TypeError, "module '1' (ConvTranspose2d) is transposed",
        ),
        (parametrized, {}, TypeError, "module '3' (ParametrizedConv2d) has no parameter 'weight'"),
        (with_integers, {}, TypeError, "module '3' (Conv2d) has filters of dtype torch.int8"),
        (lambda: with_attribute("filter_branches", 3), {}, TypeError, "module '3' (Conv2d) has an attribute"),
        (lambda: with_attribute("forward", abs), {}, TypeError, "module '3' (Conv2d) has a forward of its own"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(2, 8, 3)), {}, ValueError, "(it has ConvTranspose2d)"),
        (make, {"types": ()}, ValueError, "types is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_named_and_nothing_changed(model, options, error, message):
    model = model()
    before = repr(model)
    with pytest.raises(error, match=re.escape(message)):
        calibrate_filters(model, **options)
    assert repr(model) == before


# Processes.


def branches_of_rank(rank, same):
    model = calibrated(same_on_all_ranks=same)
    wrapped = DistributedDataParallel(model)
    for seed in range(2):
        wrapped(images(seed=seed)).square().mean().backward()
    with pytest.raises(TypeError, match="in DistributedDataParallel already"):
        calibrate_filters(DistributedDataParallel(make()))
    sharded = fully_shard(make())
    with pytest.raises(TypeError, match=r"module '0' \(Conv2d\) is sharded already"):
        calibrate_filters(sharded)
    return branches_of(model)


@pytest.mark.parametrize("same", [False, True])
def test_ranks_draw_the_same_branches_by_choice(same):
    first, second = run(2, branches_of_rank, same)
    assert all(map(torch.equal, first, second)) is same
