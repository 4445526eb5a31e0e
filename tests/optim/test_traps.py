# SPDX-License-Identifier: Apache-2.0
"""Where other optimizers went wrong: each of their faults is a promise here."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import (
    DTYPES,
    USUAL_OPTIONS,
    assert_same_bits,
    assert_same_snapshots,
    bits,
    make_params,
    run_steps,
    set_grads,
    snapshot,
)

SIZES = [1, 7, 64, 100, 1000, 4099]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_low_precision_element_is_updated(dtype, n, device, fused):
    """torch's fused SGD on the CPU skips whole vector blocks (pytorch#191763)."""
    param = torch.ones(n, dtype=dtype, device=device, requires_grad=True)
    param.grad = torch.full_like(param, 0.5)
    CSGD([param], lr=1.0, fused=fused).step()
    assert param.eq(0.5).all()


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("inf"), float("nan")])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_changes_nothing(found_inf, steps_before, dtype, device, fused, optimizer_class):
    """Not even on the first step, and not only where the flag is 1: GradScaler adds it up over devices."""
    params = make_params([(5,), (1000,)], dtype, device)
    optimizer = run_steps(params, steps=steps_before, fused=fused, optimizer_class=optimizer_class)
    before = snapshot(params, optimizer)
    density = optimizer.density()
    optimizer.found_inf = torch.tensor(found_inf, device=device)
    optimizer.grad_scale = torch.tensor(0.0, device=device)
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    after = snapshot(params, optimizer)
    if steps_before == 0:  # the state exists now, as if no step had been made
        assert all(not tensor.any() for name, tensor in after if not name.startswith("param"))
        after = [(name, tensor) for name, tensor in after if name.startswith("param")]
    assert_same_snapshots(before, after)
    assert optimizer.density() == density


def test_training_goes_on_after_an_overflow_on_the_first_step(device, fused, optimizer_class):
    options = {CSGD: {"momentum": 0.9, "dampening": 0.5}}.get(optimizer_class, {})
    results = []
    for overflow in (True, False):
        params = make_params([(1000,)], torch.float32, device)
        optimizer = optimizer_class(params, lr=0.1, fused=fused, **options)
        if overflow:
            optimizer.found_inf = torch.tensor(1.0, device=device)
            set_grads(params, seed=9)
            optimizer.step()
            del optimizer.found_inf
        for step in range(2):
            set_grads(params, seed=step)
            optimizer.step()
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)


@pytest.mark.parametrize("overflow", [False, True])
def test_momentum_switched_on_later_starts_from_the_gradient(overflow, device, fused):
    """As in torch.optim.SGD a new buffer takes the gradient undamped, also if its first step overflows."""
    (param,) = params = make_params([(100,)], torch.float64, device)
    optimizer = CSGD(params, lr=0.1, dampening=0.9, fused=fused)
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    if overflow:
        optimizer.found_inf = torch.tensor(1.0, device=device)
        optimizer.step()
        assert "momentum_buffer" not in optimizer.state[param]
        del optimizer.found_inf
    set_grads(params, seed=1)
    optimizer.step()
    assert_same_bits(optimizer.state[param]["momentum_buffer"], param.grad)


def test_parameter_unfrozen_after_the_first_step(device, fused, optimizer_class):
    params = make_params([(10,), (20,)], torch.float32, device)
    optimizer = optimizer_class(params, **USUAL_OPTIONS[optimizer_class], fused=fused)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 1
    assert params[1] not in optimizer.state
    set_grads(params, seed=0)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_view_is_updated_and_its_neighbours_are_not(dtype, device, fused):
    base = torch.full((40, 6), 3.0, dtype=dtype, device=device)
    param = base[:, 1:4].requires_grad_()
    param.grad = torch.arange(120, device=device).view(40, 3).to(dtype)
    CSGD([param], lr=1.0, momentum=0.9, fused=fused).step()
    assert_same_bits(base[:, 1:4], 3 - torch.arange(120).view(40, 3).to(dtype))
    assert base[:, [0, 4, 5]].eq(3).all()


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded", "view"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_of_another_layout_is_paired_right(channels_last, grad_layout, device, fused):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    param = torch.zeros(2, 3, 4, 5, device=device).to(memory_format=memory_format).requires_grad_()
    values = torch.arange(120.0, device=device).view(2, 3, 4, 5)
    param.grad = {
        "contiguous": values,
        "channels_last": values.to(memory_format=torch.channels_last),
        "expanded": values[:1, :, :, :1].expand(2, 3, 4, 5),
        "view": torch.stack([values, values + 1], dim=-1)[..., 0],
    }[grad_layout]
    optimizer = CSGD([param], lr=1.0, momentum=0.9, fused=fused)
    optimizer.step()
    assert_same_bits(param, 0 - param.grad)
    assert optimizer.state[param]["momentum_buffer"].stride() == param.stride()


def test_momentum_survives_a_change_of_memory_format(device, fused):
    """A model moved to channels_last between steps keeps its buffers in the old layout."""
    (param,) = params = make_params([(4, 3, 5, 5)], torch.float64, device)
    optimizer = CSGD(params, lr=0.1, momentum=0.5, calibration=0.0, fused=fused)
    grad = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    param.grad = grad
    optimizer.step()
    param.data = param.data.to(memory_format=torch.channels_last)
    param.grad = grad.clone()
    before = param.detach().clone()
    optimizer.step()
    assert_same_bits(param, before - 0.1 * (grad * 0.5 + grad))
    assert_same_bits(optimizer.state[param]["momentum_buffer"], grad * 0.5 + grad)


def test_random_bits_are_never_shared(device, fused, optimizer_class):
    """Equal tensors with equal gradients move different coordinates; so do two steps, and two seeds."""

    def moved_sets(seed):
        params = [torch.zeros(4096, device=device, requires_grad=True) for _ in range(2)]
        options = {"lr": 1.0, "weight_decay": 0.0, "calibration": 1.0, "lipschitz": 2.0}  # |d| is 1
        optimizer = optimizer_class(params, seed=seed, fused=fused, **options)
        out = []
        for _ in range(2):
            before = [p.detach().clone() for p in params]
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            out += [p.detach() != b for p, b in zip(params, before, strict=True)]
        return out

    sets = moved_sets(0) + moved_sets(1)
    for k, a in enumerate(sets):
        for b in sets[:k]:
            # Independent halves agree in half of the places: 2048, standard deviation 32.
            assert abs(int((a == b).sum()) - 2048) < 6 * 32


def test_rounding_and_calibration_use_different_bits(device, fused):
    """A coordinate that moves is not one that rounds up: with shared bits it would be."""
    n = 2**16
    param = torch.zeros(n, dtype=torch.bfloat16, device=device, requires_grad=True)
    # d moves half of the coordinates, to a value half-way between two grid points.
    value = torch.tensor(1.0 + 2.0**-8, dtype=torch.float64).item() / 2
    param.grad = torch.full_like(param, 0.5)
    CSGD([param], lr=value, calibration=1.0, lipschitz=1.0, fused=fused).step()
    moved = param[param != 0].double()
    rounded_up = (moved.abs() > value).double().mean()
    assert abs(len(moved) / n - 0.5) < 0.02
    assert abs(rounded_up - 0.5) < 0.02


class _CountReads(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_never_waits_for_the_device(scaled, device, fused, optimizer_class):
    """No .item(), which would stop the host until a GPU has caught up."""
    params = make_params([(100,), (9,)], torch.float32, device)
    options = {**USUAL_OPTIONS[optimizer_class], "lr": torch.tensor(0.1, device=device)}
    optimizer = optimizer_class(params, fused=fused, **options)
    # The reference of AdamW reads counts of steps on a CPU, for each parameter length.
    own = 2 if optimizer_class is CalibratedAdamW and not fused else 0
    for step in range(2):
        set_grads(params, seed=step)
        if scaled:
            optimizer.grad_scale = torch.tensor(2.0, device=device)
            optimizer.found_inf = torch.tensor(0.0, device=device)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")  # sees into the operator
        try:
            with _CountReads() as count:
                optimizer.step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        # Without a GPU this looks at the Python code only. It reads a learning rate on the CPU, to check it and since a
        # first step at lr 0 may be none.
        assert count.reads <= (3 + own if device.type == "cpu" else 0)


CHANGES = {
    "lr": {"lr": 0.2},
    "momentum": {"momentum": 0.8},
    "dampening": {"dampening": 0.1},
    "weight_decay": {"weight_decay": 0.1},
    "nesterov": {"nesterov": True},
    "calibration": {"calibration": 0.5},
    "lipschitz": {"lipschitz": 3.0},
    "bound_decay": {"bound_decay": 0.5},
    "rounding": {"rounding": "nearest"},
    "seed": {"seed": 1},
    "seed, high half": {"seed": 2**32},
    "maximize": {"maximize": True},
}


OF_SGD = ("momentum", "dampening", "nesterov")
ADAMW_CHANGES = {
    **{name: change for name, change in CHANGES.items() if name not in OF_SGD},
    "weight_decay": {"weight_decay": 0.5},
    "beta of the mean": {"betas": (0.8, 0.999)},
    "beta of the squares": {"betas": (0.9, 0.99)},
    "eps": {"eps": 1e-2},
}
ALL_CHANGES = [(CSGD, name, change) for name, change in CHANGES.items()]
ALL_CHANGES += [(CalibratedAdamW, name, change) for name, change in ADAMW_CHANGES.items()]


@pytest.mark.parametrize(
    ("optimizer_class", "change"),
    [(cls, change) for cls, _, change in ALL_CHANGES],
    ids=[f"{cls.__name__}: {name}" for cls, name, _ in ALL_CHANGES],
    indirect=["optimizer_class"],
)
def test_no_option_is_ignored(change, device, fused, optimizer_class):
    results = []
    for options in ({}, change):
        (param,) = params = make_params([(1000,)], torch.bfloat16, device)
        run_steps(params, steps=4, fused=fused, optimizer_class=optimizer_class, **options)
        results.append(bits(param))
    assert (results[0] != results[1]).any()


def test_stale_values_are_noticed_by_autograd(device, fused):
    """The step counts as an in-place change: a graph made before it cannot be used after it."""
    (param,) = params = make_params([(10,)], torch.float32, device)
    loss = (param * param).sum()
    optimizer = CSGD(params, lr=0.1, fused=fused)
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrapped_parameter_is_refused():
    """What another tensor class does with its parts CSGD cannot know. DTensors: tests/distributed/test_sharded.py."""
    param = TwoTensor(torch.ones(4), torch.ones(4)).requires_grad_()
    with pytest.raises(TypeError, match="parameter 1 is a TwoTensor; csgd_cuda supports plain tensors and DTensors"):
        CSGD([torch.ones(2), param])
    optimizer = CSGD([torch.ones(2), param.requires_grad_(False)])
    param.requires_grad_().grad = torch.ones_like(param)
    with pytest.raises(TypeError, match="parameter 1 is a TwoTensor; csgd_cuda supports plain tensors and DTensors"):
        optimizer.step()
    assert param.a.eq(1).all()
    assert param.b.eq(1).all()
