# SPDX-License-Identifier: Apache-2.0
"""How a step is made must not be seen in it: kernel or reference, dtypes and devices, torch's defaults, tensor lr."""

import copy

import pytest
import torch

from ..conftest import need_kernel
from ..helpers import (
    DTYPES,
    TORCH_CLASS,
    assert_same_bits,
    assert_same_snapshots,
    make_params,
    set_grads,
    snapshot,
    threads,
)
from .common import SHAPES, go_on, optimizer_of, tolerance_of, trained
from .info import INFO, _get_optim_inputs_including_global_cliquey_kwargs
from .options import WITH_MOMENTUM, class_of, of_torch, with_options


@with_options(dtype=DTYPES)
def test_fused_matches_forloop(dtype, options, device):
    """The kernel has the bits of the reference, on its device and on the CPU: fused_cpu_matches_cuda, too."""
    need_kernel(device)
    kernel = snapshot(*trained(options, device, steps=3, dtype=dtype, fused=True))
    assert_same_snapshots(kernel, snapshot(*trained(options, device, steps=3, dtype=dtype, fused=False)))
    assert_same_snapshots(kernel, snapshot(*trained(options, "cpu", steps=3, dtype=dtype, fused=False)))


@with_options(flags=[{"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_foreach_matches_forloop(flags, options, device, fused):
    """foreach and capturable are taken, and change nothing."""
    if flags.get("foreach") and fused:
        fused = None  # both at once are refused, as in torch.optim.SGD; None takes the kernel, too
    results = [snapshot(*trained(options, device, fused=fused, **extra)) for extra in ({}, flags)]
    assert_same_snapshots(*results)


def test_every_input_is_taken_with_every_flag_of_its_info(device):
    """As PyTorch's tests add them to the inputs: the bits are those without."""
    need_kernel(device)
    inputs = _get_optim_inputs_including_global_cliquey_kwargs(device.type, torch.float32, INFO)
    flags = [tuple(each.kwargs[name] for name in INFO.supported_impls if name in each.kwargs) for each in inputs]
    assert len(set(flags)) > 1
    plain = {each.desc: each.kwargs for each in INFO.optim_inputs_func(device)}
    for each in inputs:
        (expected, _), (found, _) = (
            trained(options, device, shapes=[(70,)]) for options in (plain[each.desc.split(" & ")[0]], each.kwargs)
        )
        assert_same_bits(expected[0], found[0], each.desc)


@with_options(calibration=[{"calibration": 0.0}])
def test_forloop_matches_torch(options, device, fused):
    """Without calibration, in float64: torch's optimizer to rounding errors, with all of its inputs."""
    ours, _ = trained(options, device, steps=6, dtype=torch.float64, fused=fused)
    theirs = make_params(SHAPES, torch.float64, device)
    torchs = TORCH_CLASS[class_of(options)](theirs, **of_torch(options))
    go_on(theirs, torchs, steps=6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance_of(options))


@with_options(momentum=WITH_MOMENTUM)
def test_fused_large_tensor(options, device):
    """Many blocks for every thread, and a rest. 2^31 elements: tests/rule/test_huge.py, where memory allows."""
    need_kernel(device)
    shapes = [(2**18 + 77,), (7,)]
    with threads(3):
        kernel, reference = (
            snapshot(*trained(options, device, shapes=shapes, dtype=torch.bfloat16, fused=how)) for how in (True, False)
        )
    assert_same_snapshots(kernel, reference)


@with_options()
def test_mixed_dtypes_in_one_group(options, device, fused):
    """Each parameter has the bits that it has when it is stepped alone at its place."""

    def new():
        return [p for k, dtype in enumerate(DTYPES) for p in make_params([(70,), (4, 300)], dtype, device, seed=k)]

    together = new()
    optimizer = optimizer_of(together, options, fused=fused)
    go_on(together, optimizer, steps=3)
    for k, param in enumerate(together):
        others = new()
        second = optimizer_of(others, options, fused=fused)
        for step in range(3):
            set_grads(others, seed=step)
            for other in others[:k] + others[k + 1 :]:
                other.grad = None
            second.step()
        assert_same_snapshots(snapshot([param], optimizer), snapshot([others[k]], second))


@with_options(momentum=WITH_MOMENTUM)  # the reference on meta is slow
def test_mixed_device_dtype(options, device, fused):
    """A group over several devices: every parameter on the CPU has the bits it has among parameters on the CPU.

    Without a GPU the second device is meta, which has no bits, and no kernel.
    """
    elsewhere = device if device.type != "cpu" else torch.device("meta")
    fused = None if fused and elsewhere.type == "meta" else fused
    results = []
    for second in (torch.device("cpu"), elsewhere):
        params = [
            p
            for k, dtype in enumerate((torch.float32, torch.bfloat16))
            for where in ("cpu", second)
            for p in make_params([(70,)], dtype, where, seed=k)
        ]
        optimizer = optimizer_of(params, options, fused=fused)
        go_on(params, optimizer)
        for param in params:
            assert {tensor.device for tensor in optimizer.state[param].values()} == {param.device}
        results.append((params, optimizer))
    (expected, first), (mixed, second) = results
    for a, b in zip(expected, mixed, strict=True):
        if b.device.type != "meta":
            assert_same_snapshots(snapshot([a], first), snapshot([b], second))


@pytest.fixture
def default_dtype_afterwards():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype_afterwards")
@with_options(other=[torch.float64, torch.float16])
def test_set_default_dtype_works(other, options, device, fused):
    """torch's default dtype and default device reach neither the bits nor the dtypes of the state."""
    grads = []

    def new():
        return [p for k, dtype in enumerate(DTYPES) for p in make_params([(70,)], dtype, device, seed=k)]

    params = new()
    optimizer = optimizer_of(params, options, fused=fused)
    for step in range(3):
        set_grads(params, seed=step)
        grads.append([param.grad for param in params])
        optimizer.step()
    expected = snapshot(params, optimizer)
    params = new()
    torch.set_default_dtype(other)
    with torch.device("meta"):
        optimizer = optimizer_of(params, options, fused=fused)
        for step in range(3):
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for (_, a), (_, b) in zip(expected, snapshot(params, optimizer), strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
    assert_same_snapshots(expected, snapshot(params, optimizer))


@with_options()
def test_fused_error_on_params_on_meta(options, device):
    """As torch.optim.SGD: a model may be on meta when its optimizer is made, but not when it steps."""
    need_kernel(device)
    shapes = [(3, 5), (70,)]
    on_meta, real = make_params(shapes, torch.float32, "meta"), make_params(shapes, torch.float32, device)
    optimizer = optimizer_of(on_meta, options, fused=True)
    set_grads(on_meta, seed=0)
    with pytest.raises(RuntimeError, match=r"fused=True, but .* 'meta'"):
        optimizer.step()
    assert not optimizer.state
    optimizer.zero_grad()
    for param, other in zip(on_meta, real, strict=True):
        torch.utils.swap_tensors(param, other)  # what a module does when it is materialised
    go_on(on_meta, optimizer)
    assert_same_snapshots(snapshot(on_meta, optimizer), snapshot(*trained(options, device, shapes=shapes, fused=True)))


@with_options(where=["cpu", "device"])
def test_tensor_lr(where, options, device, fused):
    """A learning rate in a tensor of 0, 1 or 2 dimensions has the bits of the number, and stays as it is."""
    expected = snapshot(*trained({**options, "lr": 0.03125}, device, dtype=torch.float64, fused=fused))
    for shape, dtype in (((), torch.float32), ((1,), torch.float64), ((1, 1), torch.float32)):
        lr = torch.full(shape, 0.03125, dtype=dtype, device=device if where == "device" else "cpu")
        params = make_params(SHAPES, torch.float64, device)
        optimizer = optimizer_of(params, options, lr=lr, fused=fused)
        assert optimizer.param_groups[0]["lr"] is lr
        go_on(params, optimizer)
        assert_same_snapshots(expected, snapshot(params, optimizer))
        assert optimizer.param_groups[0]["lr"] is lr
        assert lr.shape == shape
        assert lr.eq(0.03125).all()


@with_options()
def test_tensor_lr_is_read_at_every_step(options, device, fused):
    """Written to between steps, it has the bits of a number changed between steps."""
    results = []
    for lr in (0.0625, torch.tensor(0.0625)):
        params, optimizer = trained({**options, "lr": lr}, device, fused=fused)
        group = optimizer.param_groups[0]
        if isinstance(lr, torch.Tensor):
            group["lr"].mul_(0.5)
        else:
            group["lr"] *= 0.5
        go_on(params, optimizer, seed=1)
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)
    frozen = results[1][0][1].clone()
    group["lr"].zero_()
    go_on(params, optimizer, seed=2)
    assert_same_bits(params[0], frozen)
