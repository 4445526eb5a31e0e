# SPDX-License-Identifier: Apache-2.0
"""Same seed, same gradients, same bits: reference, CPU kernel and CUDA kernel, at any thread count and width."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csgd_cuda import CSGD
from csgd_cuda.reference import step as reference_step

from ..conftest import need_kernel
from ..helpers import (
    BACKENDS,
    BOUNDARIES,
    DTYPES,
    INSTRUCTION_SETS,
    LAYOUTS,
    OPTIMIZERS,
    USUAL_OPTIONS,
    assert_same_bits,
    assert_same_snapshots,
    edge_values,
    heavy_tailed,
    instruction_set,
    laid_out,
    make_params,
    run_steps,
    snapshot,
    threads,
)


def assert_backends_agree(build, step_all):
    """``build(device)`` makes the parameters, ``step_all(params, fused)`` steps them and returns the optimizer."""
    need_kernel(torch.device("cpu"))
    results = []
    for device, fused in BACKENDS:
        params = build(device)
        results.append(snapshot(params, step_all(params, fused)))
    for other in results[1:]:
        assert_same_snapshots(results[0], other)


@pytest.mark.parametrize(
    ("dtype", "integer", "nans"),
    [
        (torch.float32, torch.int32, [-0x400000, 0x7FFFFFFF, 0x7FC00000, 0x7F800001]),  # of x86, of a GPU, and others
        (torch.float64, torch.int64, [-(2**51), 2**63 - 1, 0x7FF8000000000000]),
        (torch.bfloat16, torch.int16, [-0x40, 0x7FFF, 0x7FC0]),
        (torch.float16, torch.int16, [-0x200, 0x7FFF, 0x7E00]),
    ],
    ids=str,
)
def test_any_nan_agrees_with_any_other_and_with_nothing_else(dtype, integer, nans):
    """Processors make different NaN. Of all other numbers one bit makes a difference, be it the sign of zero."""
    nans = torch.tensor(nans, dtype=integer).view(dtype)
    assert nans.isnan().all()
    assert_same_bits(nans, nans.flip(0))
    for a, b in ((nans, torch.full_like(nans, torch.inf)), (nans.new_zeros(1), -nans.new_zeros(1))):
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_every_boundary_size(dtype, rounding, optimizer_class):
    shapes = [(n,) for n in BOUNDARIES]
    options = {"optimizer_class": optimizer_class, "rounding": rounding, "seed": 2**64 - 1}
    assert_backends_agree(
        lambda device: make_params(shapes, dtype, device),
        lambda params, fused: run_steps(params, fused=fused, **options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tensors_at_once(dtype, optimizer_class):
    """More tensors than one CUDA launch takes, of mixed sizes."""
    options = {"optimizer_class": optimizer_class, "weight_decay": 0.01}
    if optimizer_class is CSGD:
        options["nesterov"] = True
    shapes = [(1 + 37 * k % 211,) for k in range(120)]
    assert_backends_agree(
        lambda device: make_params(shapes, dtype, device),
        lambda params, fused: run_steps(params, fused=fused, **options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boundaries_of_the_reference(dtype, optimizer_class, monkeypatch):
    """Its blocks, four of which share their draws, and its stacks of equal tensors, made small."""
    monkeypatch.setattr(reference_step, "block_elements", lambda device: 64)
    shapes = [(n,) for n in (0, 1, 7, 8, 63, 64, 65, 128, 255, 256, 257, 264, 513, 1025)]
    shapes += 5 * [(0,)] + 9 * [(3, 4)] + 9 * [(8,)] + 17 * [(32,)] + 3 * [(33,)] + 3 * [(65,)]  # up to 64 in a stack
    assert_backends_agree(
        lambda device: make_params(shapes, dtype, device),
        lambda params, fused: run_steps(params, optimizer_class=optimizer_class, fused=fused, weight_decay=0.01),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_lengths_with_state_of_their_own(dtype, optimizer_class):
    """Of one length, but each with a shape, layouts, a number of steps and a bound of its own; one step overflows."""
    places = [(shape, layout) for shape in [(4, 6), (24,), (2, 3, 4)] for layout in LAYOUTS]

    def build(device):
        generator = torch.Generator().manual_seed(1)
        params = [laid_out(torch.randn(shape, generator=generator).to(dtype).to(device), at) for shape, at in places]
        return [param.detach().requires_grad_() for param in params]

    def step_all(params, fused):
        optimizer = optimizer_class(params, **USUAL_OPTIONS[optimizer_class], fused=fused)
        generator = torch.Generator().manual_seed(2)
        for step in range(5):
            for k, param in enumerate(params):
                layout = LAYOUTS[(k + step) % len(LAYOUTS)]
                grad = laid_out(edge_values(param.shape, generator, dtype).to(param.device), layout)
                param.grad = None if (k + step) % 4 == 0 else grad
            optimizer.found_inf = torch.tensor(float(step == 2), device=params[0].device)
            optimizer.step()
        return optimizer

    assert_backends_agree(build, step_all)


def test_mixed_dtypes_in_one_group(optimizer_class):
    def build(device):
        return [p for k, dtype in enumerate(DTYPES) for p in make_params([(65,), (8, 9)], dtype, device, seed=k)]

    assert_backends_agree(build, lambda params, fused: run_steps(params, optimizer_class=optimizer_class, fused=fused))


@st.composite
def cases(draw):
    small = st.integers(0, 9)
    sizes = st.one_of(
        st.tuples(st.sampled_from(BOUNDARIES)),
        st.lists(small, min_size=0, max_size=4).map(tuple),
        st.tuples(st.integers(1, 5), st.sampled_from([63, 64, 65, 4096, 4099])),
    )
    optimizer_class = draw(st.sampled_from(OPTIMIZERS))
    if optimizer_class is CSGD:
        momentum = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        nesterov = momentum > 0 and draw(st.booleans())
        dampening = 0.0 if nesterov else draw(st.sampled_from([0.0, 0.1, 1.0]))
        own = {"momentum": momentum, "nesterov": nesterov, "dampening": dampening}
    else:
        betas = st.sampled_from([(0.9, 0.999), (0.9, 0.99), (0.0, 0.0), (0.0, 0.9), (0.5, 1 - 2.0**-40)])
        own = {"betas": draw(betas), "eps": draw(st.sampled_from([1e-8, 1e-8, 1e-3, 0.0, 1e-50, 1e30]))}
    lrs = [
        0.0,
        1e-3,
        0.1,
        1.0,
        torch.tensor(0.1),
        torch.tensor(0.3, dtype=torch.float64),
        torch.tensor([0.3]).bfloat16(),
    ]
    return {
        "optimizer_class": optimizer_class,
        "tensors": draw(st.lists(st.tuples(sizes, *[st.sampled_from(LAYOUTS)] * 2), min_size=1, max_size=4)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "data_seed": draw(st.integers(0, 2**32 - 1)),
        "edges": draw(st.booleans()),
        "steps": draw(st.integers(1, 4)),
        "threads": draw(st.integers(1, 3)),
        "count": draw(st.sampled_from([None, None, 10**6, 2**24, 2**31 - 1, 2**32 - 1, 2**40])),
        "scaled": draw(st.booleans()),
        "overflowing": draw(st.sampled_from([None, None, 0, 1])),
        "options": {
            **own,
            "lr": draw(st.sampled_from(lrs)),
            "weight_decay": draw(st.sampled_from([0.0, 1e-4, 0.1])),
            "calibration": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e6])),
            "lipschitz": draw(st.sampled_from([None, None, 0.0, 0.7, 1e-3, 1e30])),
            "bound_decay": draw(st.sampled_from([0.0, 0.9, 0.99, 1.0])),
            "rounding": draw(st.sampled_from(["stochastic", "nearest"])),
            "maximize": draw(st.booleans()),
            "seed": draw(st.sampled_from([0, 1, 2**63, 2**64 - 1])),
        },
    }


def run_case(case, device, fused):
    """``count``: of the steps, after the first; ``overflowing``: the step that must not be made."""
    generator = torch.Generator().manual_seed(case["data_seed"])
    params, grad_layouts = [], []
    for shape, layout, grad_layout in case["tensors"]:
        if len(shape) == 0 and layout == "last dimension first":
            layout = "contiguous"
        values = torch.randn(shape, generator=generator).to(case["dtype"]).to(device)
        params.append(laid_out(values, layout).detach().requires_grad_())
        grad_layouts.append("contiguous" if len(shape) == 0 else grad_layout)
    optimizer = case["optimizer_class"](params, fused=fused, **case["options"])
    if case["scaled"]:
        optimizer.grad_scale = torch.tensor(3.0, device=device)
    make = edge_values if case["edges"] else heavy_tailed
    for step in range(case["steps"]):
        if step == 1 and case["count"] is not None:
            for state in optimizer.state.values():
                state["step"].fill_(case["count"])
        if case["scaled"]:
            optimizer.found_inf = torch.tensor(float(step == case["overflowing"]), device=device)
        for param, layout in zip(params, grad_layouts, strict=True):
            param.grad = laid_out(make(tuple(param.shape), generator, case["dtype"]).to(device), layout)
        with threads(case["threads"]):
            optimizer.step()
    return snapshot(params, optimizer), optimizer.density()


@settings(max_examples=400)
@given(cases())
def test_random_cases(case):
    need_kernel(torch.device("cpu"))
    results = []
    for device, fused in BACKENDS:
        for name in INSTRUCTION_SETS if fused and device == "cpu" else [None]:
            with contextlib.nullcontext() if name is None else instruction_set(name):
                results.append(run_case(case, device, fused))
    (first, density), *others = results
    for other, other_density in others:
        assert_same_snapshots(first, other)
        assert str(density) == str(other_density)  # NaN for empty parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, optimizer_class):
    need_kernel(torch.device("cpu"))
    shapes = [(16384 * 5 + 3,), (100,), (40000,)]
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            params = make_params(shapes, dtype)
            results.append(snapshot(params, run_steps(params, optimizer_class=optimizer_class, fused=True)))
    for other in results[1:]:
        assert_same_snapshots(results[0], other)


USES_THREADS = """
import os, numpy, torch
from csgd_cuda import CSGD
torch.set_num_threads(5)
param = torch.from_numpy(numpy.zeros(1_000_000, dtype=numpy.float32)).requires_grad_()
param.grad = torch.from_numpy(numpy.zeros(1_000_000, dtype=numpy.float32))
optimizer = CSGD([param], fused=True)
before = len(os.listdir("/proc/self/task"))
optimizer.step()
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_kernel_runs_on_the_threads_of_torch():
    """Compiled without OpenMP, at::parallel_for would run on one thread without a word."""
    need_kernel(torch.device("cpu"))
    done = subprocess.run([sys.executable, "-c", USES_THREADS], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(isa, dtype, compiled, optimizer_class):
    results = []
    for name in (compiled.build_info()["cpu_isa"], isa):
        with instruction_set(name) as there:
            if not there:
                pytest.skip(f"this machine or build has no {name}")
            params = make_params([(n,) for n in BOUNDARIES], dtype)
            optimizer = run_steps(params, optimizer_class=optimizer_class, fused=True, weight_decay=0.01)
            results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)


def test_steps_beyond_float32_integers(optimizer_class):
    """Around 2^24 and 2^32 applied steps the backends still agree, and the count is exact."""
    for start in (10**6, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40):

        def step_all(params, fused, start=start):
            optimizer = run_steps(params, steps=1, optimizer_class=optimizer_class, fused=fused)
            optimizer.state[params[0]]["step"].fill_(start)
            optimizer.step()
            assert int(optimizer.state[params[0]]["step"]) == start + 1
            return optimizer

        assert_backends_agree(lambda device: make_params([(1000,)], torch.float32, device), step_all)
