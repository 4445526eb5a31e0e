# SPDX-License-Identifier: Apache-2.0
"""calibrate_grad: unbiased by enumeration, the same bits on every backend, and errors that change nothing."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csgd_cuda import calibrate_grad, csgd_
from csgd_cuda.layers import functional
from csgd_cuda.tensors import opmath_dtype

from ..conftest import need_kernel
from ..helpers import BACKENDS, DEVICES, DTYPES, assert_same_bits, heavy_tailed
from ..rule.test_theorem import BOUND, directions, expected_draws

# Around the Philox block (8), the CPU tile (128), a pass of a CUDA block (2048), what a CPU thread takes (16384).
SIZES = [0, 1, 7, 8, 9, 127, 128, 129, 255, 257, 1000, 2047, 2048, 2049, 16383, 16384, 16385, 40000]
SHAPES = [(6, 5, 7, 9), (3, 16, 8, 8), (2, 3, 128, 2), (64, 33), (5, 1000), (300, 7), (4, 6, 5, 3, 2)]


def state(channels=None, device="cpu", index=3, step=0):
    """What a call takes and changes, beside the gradient."""
    return {
        "index": torch.tensor(index, device=device),
        "step": torch.tensor(step, device=device),
        "lipschitz_bound": torch.zeros(() if channels is None else channels, dtype=torch.float64, device=device),
        "tally": torch.zeros(4 + (1 if channels is None else channels), dtype=torch.int64, device=device),
    }


def edge_grad(shape, seed, dtype):
    """Heavy-tailed, some zeros, with Inf, NaN, subnormals and -0 among them where there is room."""
    grad = heavy_tailed(shape, torch.Generator().manual_seed(seed), dtype)
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, torch.finfo(dtype).smallest_normal / 2]).to(dtype)
    if grad.numel() > 50:
        grad.view(-1)[5 : 5 + len(edges)] = edges
    return grad


def assert_backends_agree(grads, channels=None, lipschitz=None, **options):
    """Every backend calibrates the gradients in a row; all outputs and all state must have the same bits."""
    results = []
    for device, fused in BACKENDS:
        kept = state(channels, device, step=2**32 - 2)
        if lipschitz is not None:
            kept["lipschitz_bound"] = None
        outs = []
        for grad in grads:
            out = calibrate_grad(grad.to(device), lipschitz=lipschitz, fused=fused, **kept, **options)
            assert out.dtype == grad.dtype
            assert out.shape == grad.shape
            outs.append(out)
        kept["tally"] = kept["tally"][:2]  # the rest is scratch space
        results.append([*outs, *(tensor for tensor in kept.values() if tensor is not None)])
    for other in results[1:]:
        for k, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(a, b, f"tensor {k}")
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_every_boundary_size(dtype, rounding):
    for n in SIZES:
        grads = [edge_grad((n,), seed, dtype) for seed in range(3)]
        assert_backends_agree(grads, rounding=rounding, seed=2**64 - 1, rank=2**16 - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_channel_dimension_and_layout(dtype, shape):
    layouts = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 4 else [])
    for layout in layouts:
        for dim in range(-1, len(shape)):
            grads = [edge_grad(shape, seed, dtype).contiguous(memory_format=layout) for seed in range(3)]
            out, *_ = assert_backends_agree(grads, channels=shape[dim], channel_dim=dim)
            assert out.stride() == grads[0].stride()  # the fast path is one linear pass over memory


@settings(max_examples=200)
@given(
    dims=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    dtype=st.sampled_from(DTYPES),
    calibration=st.sampled_from([0.0, 1e-30, 0.05, 1.0, 3.0, 1e30]),
    bound_decay=st.sampled_from([0.0, 0.9, 1.0]),
    layout=st.sampled_from(["contiguous", "reversed", "strided", "expanded"]),
    per_channel=st.booleans(),
    fixed=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_random_calls(dims, dtype, calibration, bound_decay, layout, per_channel, fixed, seed, data):
    per_channel = per_channel and bool(dims) and not fixed
    dim = data.draw(st.integers(-len(dims), len(dims) - 1)) if per_channel else 0

    def laid_out(grad):
        if layout == "reversed":
            return grad.mT.contiguous().mT if grad.dim() > 1 else grad
        if layout == "strided":
            return grad.repeat_interleave(2, dim=-1)[..., ::2] if grad.dim() else grad
        return grad[:1].expand_as(grad) if layout == "expanded" and grad.dim() else grad

    grads = [laid_out(edge_grad(tuple(dims), k, dtype)) for k in range(2)]
    assert_backends_agree(
        grads, channels=grads[0].shape[dim] if per_channel else None, channel_dim=dim, calibration=calibration,
        bound_decay=bound_decay, lipschitz=0.5 if fixed else None, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [None, 33])
def test_every_instruction_set_and_thread_count(dtype, channels, compiled):
    grads = [edge_grad((1500, 33), seed, dtype) for seed in range(2)]
    threads, isa = torch.get_num_threads(), compiled.build_info()["cpu_isa"]
    results = []
    try:
        for name, count in [("baseline", 1), ("avx2", 1), ("avx512", 1), (isa, 2), (isa, 3), (isa, 7)]:
            if not compiled.set_cpu_isa(name):
                continue
            torch.set_num_threads(count)
            kept = state(channels)
            outs = [calibrate_grad(grad, channel_dim=1, fused=True, **kept) for grad in grads]
            results.append([*outs, *kept.values()])
    finally:
        torch.set_num_threads(threads)
        compiled.set_cpu_isa(isa)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_over_all_draws_is_the_gradient(dtype, device, monkeypatch):
    """2^16 elements with equal gradients, of which the i-th draws i; rounding to nearest where dtype has 16 bits."""
    monkeypatch.setattr(functional, "draws", lambda begin, end, **_: torch.arange(begin, end, device=device))
    opmath = opmath_dtype(dtype)
    info = torch.finfo(dtype)
    for g in directions(dtype):
        grad = torch.full((2**16,), g, dtype=dtype, device=device)
        kept = {**state(device=device), "lipschitz_bound": None}
        out = calibrate_grad(grad, calibration=1.0, lipschitz=BOUND, rounding="nearest", fused=False, **kept)
        out = out.double().tolist()
        n = expected_draws(g, opmath)
        assert all(value == 0 for value in out[n:])
        assert len(set(out[:n])) == 1
        mean = n * Fraction(out[0]) / 2**16
        tolerance = abs(Fraction(g)) * Fraction(info.eps) * Fraction(5, 4) + Fraction(info.tiny * info.eps)
        assert abs(mean - Fraction(g)) <= tolerance
        assert kept["tally"][:2].tolist() == [n, 2**16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradient_is_unbiased(dtype, fused, device):
    """Over a million elements the mean is the gradient's within 5 standard deviations: nothing is lost in rounding."""
    n, bound = 2**20, 1.1
    g = torch.tensor(0.3, dtype=torch.float64).to(dtype)
    kept = {**state(device=device), "lipschitz_bound": None}
    grad = g.expand(n).to(device).contiguous()
    out = calibrate_grad(grad, calibration=1.0, lipschitz=bound, seed=5, fused=fused, **kept)
    deviation = (g.item() * (bound - g.item()) / n) ** 0.5
    assert abs(out.double().mean().item() - g.item()) < 5 * deviation
    assert len(out.unique()) == 3  # 0, and the two neighbours of g / p, which is 1.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_calibration_gives_the_gradient_bit_for_bit(dtype, fused, device):
    grad = edge_grad((3, 50, 7), 0, dtype).to(device)
    assert_same_bits(calibrate_grad(grad, calibration=0.0, fused=fused, **state(device=device)), grad)


def test_first_call_gives_the_gradient_and_finds_its_bound(fused, device):
    grad = torch.tensor([1.0, -3.0, 0.5], device=device)
    kept = state(device=device)
    assert_same_bits(calibrate_grad(grad, fused=fused, **kept), grad)
    assert kept["lipschitz_bound"].item() == 3.0
    assert kept["step"].item() == 1
    calibrate_grad(grad / 100, bound_decay=0.5, fused=fused, **kept)
    assert kept["lipschitz_bound"].item() == 1.5


def test_draws_differ_by_all_that_tells_layers_apart(fused, device):
    """Seed, index, step and rank; and from those of an optimizer of the same seed, index and step."""
    grad = torch.linspace(-1, 1, 4096, device=device)

    def passed(rank=0, seed=0, **kept):
        kept = {**state(device=device, **kept), "lipschitz_bound": None}
        return calibrate_grad(grad, calibration=1.0, lipschitz=1.0, seed=seed, rank=rank, fused=fused, **kept) != 0

    patterns = [passed(), passed(seed=1), passed(index=4), passed(step=1), passed(rank=1), passed(index=5, rank=1)]
    for i, a in enumerate(patterns):
        for b in patterns[:i]:
            assert (a != b).float().mean() > 0.1
    param = torch.zeros_like(grad)
    step = torch.tensor(0, device=device)
    csgd_([param], [grad], [], [step], [], lr=1.0, calibration=1.0, lipschitz=1.0, indices=[3], fused=fused)
    assert ((param != 0) != patterns[0]).float().mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [None, 7])
def test_opcheck(dtype, channels, device):
    """Schema (what is mutated), fake implementation, and tracing, by torch's own checker."""
    need_kernel(device)
    options = {
        "channel_dim": 1, "calibration": 1.0, "lipschitz": None, "bound_decay": 0.99, "rounding": "stochastic",
        "seed": -1, "rank": 0,
    }  # fmt: skip
    grad = heavy_tailed((5, 7, 9), torch.Generator().manual_seed(0), dtype).to(device)  # the checker cannot compare NaN
    for given_grad in (
        grad,
        grad.transpose(0, 2).contiguous().transpose(0, 2),
        grad[..., ::2],
        grad[:1].expand(5, 7, 9),
    ):
        arguments = (given_grad, *state(channels, device).values())
        torch.library.opcheck(torch.ops.csgd_cuda.calibrate_grad.default, arguments, options)


ERRORS = [
    ({"calibration": -1.0}, "calibration must be a finite number >= 0"),
    ({"calibration": float("nan")}, "calibration must be"),
    ({"bound_decay": 1.5}, "bound_decay must be in"),
    ({"rounding": "up"}, "rounding must be"),
    ({"seed": -1}, "seed must be in"),
    ({"rank": 2**16}, "rank must be in"),
    ({"lipschitz": 1.0}, "lipschitz_bound must be given where lipschitz is not"),
    ({"lipschitz_bound": None}, "lipschitz_bound must be given where lipschitz is not"),
    ({"lipschitz": -1.0, "lipschitz_bound": None}, "lipschitz must be a finite number"),
    ({"lipschitz_bound": torch.zeros(())}, "lipschitz_bound must be a contiguous"),
    ({"lipschitz_bound": torch.zeros(3, dtype=torch.float64)}, "expected 4 entries"),
    ({"lipschitz_bound": torch.zeros(4, dtype=torch.float64), "channel_dim": 2}, "channel_dim 2 is not a dimension"),
    ({"step": torch.tensor(0.0)}, "step must be a contiguous"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, "index and step must have one element each"),
    ({"index": torch.tensor(0, dtype=torch.int32)}, "index must be a contiguous"),
    ({"tally": torch.zeros(3, dtype=torch.int64)}, "tally must have 5 entries"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS, ids=[message for _, message in ERRORS])
@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
def test_errors_name_the_argument_and_change_nothing(wrong, message, fused):
    if fused:
        need_kernel(torch.device("cpu"))
    kept = state(index=1)
    before = [tensor.clone() for tensor in kept.values()]
    with pytest.raises(ValueError, match=message):
        calibrate_grad(torch.ones(4, 5), fused=fused, **{**kept, **wrong})
    for a, b in zip(before, kept.values(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(3, dtype=torch.int32), "dtype"),
        (torch.ones(3, dtype=torch.complex64), "dtype"),
        (torch.ones(3, 3).to_sparse(), "sparse"),
    ],
    ids=["integer", "complex", "sparse"],
)
@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
def test_gradients_of_other_kinds_are_refused(grad, message, fused):
    if fused:
        need_kernel(torch.device("cpu"))
    with pytest.raises(TypeError, match=message):
        calibrate_grad(grad, fused=fused, **state())


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_state_on_another_device_is_refused():
    for fused in (True, False):
        with pytest.raises(ValueError, match="device of the gradient"):
            calibrate_grad(torch.ones(3, device="cuda"), fused=fused, **state())
