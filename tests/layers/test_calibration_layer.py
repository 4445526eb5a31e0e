# SPDX-License-Identifier: Apache-2.0
"""GradientCalibration: identity forward, calibrated backward, in all the places where layers stand."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from csgd_cuda import GradientCalibration, calibrate_grad
from csgd_cuda.layers import functional

from ..conftest import need_kernel
from ..helpers import DTYPES, assert_same_bits
from .test_calibrate_grad import edge_grad


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GradientCalibration)]


def make_network(device="cpu", **options):
    """A small CNN with two layers; the same weights and indices each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), GradientCalibration(index=0, **options), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 5), GradientCalibration(index=1, **options),
    ).to(device)  # fmt: skip


def batch(device="cpu", seed=0, dtype=torch.float32):
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def gradients(model, x):
    """The gradients of one backward pass, and the state of the layers after it."""
    model.zero_grad()
    model(x).float().square().mean().backward()
    state = [t.clone() for layer in layers_of(model) for t in (layer.step, layer.lipschitz_bound)]
    return [p.grad.clone() for p in model.parameters()] + state


def assert_same(a, b):
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(x, y, f"tensor {k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_calibrate_grad(dtype, fused, device):
    layer = GradientCalibration(calibration=0.5, bound_decay=0.9, seed=7, index=2, fused=fused).to(device)
    state = {name: getattr(layer, name).clone() for name in ("index", "step", "lipschitz_bound", "tally")}
    for seed in range(3):
        x = torch.zeros(3, 50, 7, dtype=dtype, device=device, requires_grad=True)
        out = layer(x)
        assert_same_bits(out, x)
        grad = edge_grad((3, 50, 7), seed, dtype).to(device)
        out.backward(grad)
        expected = calibrate_grad(grad, calibration=0.5, bound_decay=0.9, seed=7, fused=fused, **state)
        assert_same_bits(x.grad, expected)
        assert_same_bits(layer.lipschitz_bound, state["lipschitz_bound"])
    assert layer.density() == state["tally"][0].item() / x.numel()


def test_gradcheck_without_calibration(fused):
    layer = GradientCalibration(calibration=0.0, fused=fused)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x.sin()), x)


def test_mean_over_all_draws_is_the_gradient_of_the_network(monkeypatch):
    """A weight used 2^16 times, where the i-th use draws i: its gradient is that without the layer."""
    monkeypatch.setattr(functional, "draws", lambda begin, end, **_: torch.arange(begin, end))
    layer = GradientCalibration(lipschitz=0.75, fused=False)
    for value in (0.001, 0.3, -0.7, 2.0):
        w = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        layer(w.expand(2**16)).mul(w.detach()).sum().div(2**16).mul(2**16).backward()
        assert w.grad.item() / 2**16 == pytest.approx(value, rel=1e-12)


def test_costs_nothing_where_nothing_is_calibrated(device):
    """The input itself comes back: in eval mode, without gradients, and where the input needs none."""
    layer = GradientCalibration().to(device)
    x = torch.ones(3, device=device, requires_grad=True)
    with torch.no_grad():
        assert layer(x) is x
    assert layer(x.detach()) is not None
    y = x.detach()
    assert layer(y) is y
    layer.eval()
    assert layer(x) is x
    with torch.inference_mode():
        assert layer.train()(y) is y
    assert layer.step.item() == 0
    assert layer.density() is None


@pytest.mark.parametrize("channels", [None, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_gradient_keeps_its_layout(channels, layout, device):
    layer = GradientCalibration(channels=channels).to(device)
    x = torch.randn(2, 8, 5, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(2, 8, 5, 5, device=device).contiguous(memory_format=layout)
    layer(x).backward(grad)
    assert x.grad.is_contiguous(memory_format=layout)
    assert_same_bits(x.grad, grad)  # the first one is exact


def test_one_bound_for_each_channel(device):
    layer = GradientCalibration(channels=3, channel_dim=-1).to(device)
    grad = torch.tensor([[1.0, -2.0, 0.0], [0.5, 4.0, 0.0]], device=device)
    layer(torch.zeros_like(grad).requires_grad_()).backward(grad)
    assert layer.lipschitz_bound.tolist() == [1.0, 4.0, 0.0]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_draws_once(reentrant, device):
    """Recomputing the forward pass draws nothing: same gradients and state as without checkpointing."""
    plain, checkpointed = make_network(device), make_network(device)
    for seed in range(3):
        x = batch(device, seed).requires_grad_()
        expected = gradients(plain, x)
        checkpointed.zero_grad()
        checkpoint(checkpointed, x, use_reentrant=reentrant).square().mean().backward()
        state = [t for layer in layers_of(checkpointed) for t in (layer.step, layer.lipschitz_bound)]
        assert_same([p.grad for p in checkpointed.parameters()] + state, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    """The gradients arrive in the autocast dtype; the layers' bound is kept in float64."""
    model = make_network(device, calibration=1.0)
    for seed in range(3):
        with torch.autocast(device.type, dtype):
            loss = model(batch(device, seed)).float().square().mean()
        loss.backward()
    assert all(layer.step.item() == 3 for layer in layers_of(model))
    assert all(0 < layer.density() < 1 for layer in layers_of(model))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_network(backend, device):
    """One graph; with aot_eager the very bits, with inductor those of what it does to the rest of the network."""
    need_kernel(device)
    eager, model = make_network(device), make_network(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in range(3):
        expected = gradients(eager, batch(device, seed))
        model.zero_grad()
        compiled(batch(device, seed)).square().mean().backward()
        assert [layer.step.item() for layer in layers_of(model)] == [seed + 1] * 2
        got = [p.grad for p in model.parameters()]
        if backend == "aot_eager":
            assert_same(got, expected[: len(got)])
        else:  # gradients that differ in the last place move the same coordinates, but for a few
            for a, b in zip(got, expected[: len(got)], strict=True):
                assert ((a - b).abs() > 1e-3 * b.abs().max()).float().mean() < 0.02


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict", "weights_only"])
def test_resumes_exactly(copied):
    model = make_network()
    for seed in range(3):
        gradients(model, batch(seed=seed))
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = make_network(seed=0)
        other[1].number(17)  # comes back with the checkpoint
        state = model.state_dict()
        if copied == "weights_only":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_state_dict(state)
    for seed in range(3, 6):
        assert_same(gradients(other, batch(seed=seed)), gradients(model, batch(seed=seed)))


def test_gradient_accumulation_draws_anew_each_time(device):
    """Two forward passes, then two backward passes: two steps of the layer, no complaint of autograd."""
    layer = GradientCalibration(calibration=1.0, lipschitz=1.0).to(device)
    x = torch.zeros(1000, device=device, requires_grad=True)
    first, second = layer(x), layer(x)
    grad = torch.full((1000,), 0.5, device=device)
    first.backward(grad)
    one = x.grad.clone()
    second.backward(grad)
    assert layer.step.item() == 2
    assert not torch.equal(x.grad - one, one)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_model_leaves_the_bound_alone(cast):
    layer = GradientCalibration()
    layer(torch.zeros(3, requires_grad=True)).backward(torch.tensor([1e-9, 1.0 + 2**-20, 0.0]))
    getattr(nn.Sequential(layer), cast)()
    assert layer.lipschitz_bound.dtype == torch.float64
    assert layer.lipschitz_bound.item() == 1.0 + 2**-20
    assert layer.step.dtype == torch.int64


def test_differentiating_again_is_a_clear_error(device):
    layer = GradientCalibration().to(device)
    w = torch.randn(5, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(layer(w * w).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        g.square().sum().backward()
    layer.eval()  # as the message says
    (g,) = torch.autograd.grad(layer(w * w).square().sum(), w, create_graph=True)
    g.square().sum().backward()
    assert w.grad is not None


def test_wrong_channels_name_both_shapes():
    layer = GradientCalibration(channels=3)
    with pytest.raises(ValueError, match=r"expected 8 entries, one for each channel of the gradient of shape \[2, 8\]"):
        layer(torch.zeros(2, 8, requires_grad=True)).sum().backward()
    assert layer.step.item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": -1}, "calibration must be"),
        ({"lipschitz": float("inf")}, "lipschitz must be"),
        ({"bound_decay": 2}, "bound_decay must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"rounding": "down"}, "rounding must be"),
        ({"index": 2**16}, "index must be"),
        ({"channels": 0}, "channels must be"),
        ({"channels": 2, "lipschitz": 1.0}, "exclude each other"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GradientCalibration(**options)


def test_layers_of_a_process_draw_apart():
    a, b = GradientCalibration(), GradientCalibration()
    assert a.index.item() != b.index.item()


def test_grad_scaler_overflow_goes_through(device):
    """Inf in a scaled gradient reaches the scaler, which skips the step; the bound takes finite values only."""
    model = make_network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale((model(batch(device)) * 1e38).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(before, list(model.parameters()))
    assert scaler.get_scale() == 2.0**9
    assert all(layer.lipschitz_bound.isfinite() for layer in layers_of(model))
