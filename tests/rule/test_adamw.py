# SPDX-License-Identifier: Apache-2.0
"""The direction of AdamW: the reference has the bits of its formulas in numpy, and powers are exact products."""

import numpy as np
import pytest
import torch

from csgd_cuda import CalibratedAdamW, calibrated_adamw_
from csgd_cuda.reference import step as reference_step
from csgd_cuda.reference.adamw import powers
from csgd_cuda.reference.rule import square_root

from ..as_on_cuda import AsOnCuda
from ..helpers import DTYPES, assert_same_bits, assert_same_snapshots, edge_values, make_params, snapshot
from ..helpers import heavy_tailed as heavy

FLOATS = {torch.float32: np.float32, torch.float64: np.float64}


def power(beta, t):
    """beta^t by square-and-multiply over the bits of t from the highest down, each product rounded to float64."""
    result = 1.0
    for bit in bin(t)[2:]:
        result = result * result
        if bit == "1":
            result = result * beta
    return result


class Oracle:
    """Steps of AdamW written with numpy, whose operations are rounded one by one; every coordinate moves."""

    def __init__(self, values, *, lr, betas, eps, weight_decay, maximize):
        self.float = values.dtype.type
        self.theta, self.mean, self.square = values.copy(), np.zeros_like(values), np.zeros_like(values)
        self.betas, self.decays, self.maximize = betas, weight_decay != 0, maximize
        self.lr, self.eps, self.weight_decay = map(self.float, (lr, eps, weight_decay))
        self.steps = 0

    def step(self, g, grad_scale):
        f, (beta1, beta2) = self.float, self.betas
        g = g * (f(1) / f(grad_scale))
        g = -g if self.maximize else g
        self.steps += 1
        mean_factor = f(np.float64(1) / (1 - np.float64(power(beta1, self.steps))))
        root_factor = f(np.float64(1) / np.sqrt(1 - np.float64(power(beta2, self.steps))))
        self.mean = self.mean * f(beta1) + g * f(1 - beta1)
        self.square = self.square * f(beta2) + (g * g) * f(1 - beta2)
        d = (self.mean * mean_factor) / (np.sqrt(self.square) * root_factor + self.eps)
        d = d + self.theta * self.weight_decay if self.decays else d
        self.theta = self.theta - d * self.lr
        return np.abs(d).max()


ORACLE_OPTIONS = [
    {"weight_decay": 0.0},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.01, "betas": (0.5, 0.9), "eps": 1e-3},
    {"weight_decay": 0.01, "betas": (0.0, 0.0), "eps": 0.0},
]


@pytest.mark.parametrize("options", ORACLE_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_are_those_of_the_formulas(dtype, options, device, fused):
    """With a loss scale, and a step in between that overflows and changes nothing."""
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False, **options}
    generator = torch.Generator().manual_seed(1)
    param = heavy(1000, generator, dtype).to(device).requires_grad_()
    optimizer = CalibratedAdamW([param], calibration=0.0, bound_decay=0.0, fused=fused, **options)
    oracle = Oracle(param.detach().cpu().numpy(), **options)
    for step in range(20):
        g = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype) + 0.125
        if step == 7:
            before = snapshot([param], optimizer)
            param.grad = torch.full_like(param, torch.inf)
            optimizer.found_inf = torch.ones((), device=device)
            optimizer.step()
            assert_same_snapshots(before, snapshot([param], optimizer))
        param.grad = (g * 3).to(device)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0, device=device), torch.zeros((), device=device)
        optimizer.step()
        largest = oracle.step((g * 3).numpy(), 3.0)
        state = optimizer.state[param]
        for name, expected in (
            ("exp_avg", oracle.mean), ("exp_avg_sq", oracle.square), ("lipschitz_bound", np.asarray(largest))
        ):  # fmt: skip
            assert_same_bits(state[name], torch.from_numpy(expected), f"{name} after step {step}")
        assert_same_bits(param, torch.from_numpy(oracle.theta), f"step {step}")
        assert int(state["step"]) == oracle.steps == step + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_that_zeros_make_nan_are_counted_one_by_one(dtype, device, fused):
    """Without eps 0 / 0 is NaN, which moves: of a parameter's own coordinates alone, not of what a vector lacks."""
    sizes = [1, 5, 70, 300]
    params = [torch.ones(n, dtype=dtype, device=device).requires_grad_() for n in sizes]
    optimizer = CalibratedAdamW(params, lr=0.5, eps=0.0, weight_decay=0.0, lipschitz=100.0, fused=fused)
    for param in params:
        param.grad = torch.ones_like(param)
        param.grad[::3] = 0.0
    optimizer.step()
    moved = [int((param != 1).sum()) for param in params]
    assert [int(param.isnan().sum()) for param in params] == [-(-n // 3) for n in sizes]
    assert optimizer.density() == {k: moved[k] / n for k, n in enumerate(sizes)}
    assert sum(moved) < sum(sizes) / 2


COUNTS = [1, 2, 3, 4, 5, 7, 8, 100, 1023, 1024, 2**24 + 1, 2**32 - 1, 2**40 + 12345, 2**63 - 1]
BASES = [0.9, 0.999, 0.0, 0.5, 1 - 2.0**-53, 1 - 2.0**-40]


def test_powers_are_products_in_the_promised_order():
    exponents = torch.tensor(COUNTS).view(-1, 1)
    expected = [[power(beta, t) for t in COUNTS] for beta in BASES]
    assert powers(BASES, exponents).squeeze(-1).tolist() == expected
    for row in exponents:
        assert powers(BASES, row.view(1, 1)).flatten().tolist() == [power(beta, int(row)) for beta in BASES]


def test_powers_do_not_need_to_know_the_largest_count(monkeypatch):
    """As on a GPU, where reading a count would make the host wait: all 63 bits give the same."""
    exponents = torch.tensor(COUNTS).view(-1, 1)
    expected = powers(BASES, exponents)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.Tensor, "max", None)
    assert_same_bits(powers(BASES, exponents), expected)


def test_counts_of_a_gpu_are_not_read():
    """On the device meta there is nothing to read."""
    assert powers(BASES, torch.ones((3, 1), dtype=torch.int64, device="meta")).shape == (len(BASES), 3, 1)


def test_each_parameter_has_the_factors_of_its_own_count():
    """Equal tensors that have made other numbers of steps are stepped together, each as alone."""
    together = make_params([(40,)] * 4, torch.float32)
    alone = [param.detach().clone().requires_grad_() for param in together]
    counts = [0, 1, 10, 1000]
    results = []
    for groups in ([together], [[param] for param in alone]):
        for params in groups:
            places = range(4) if len(params) == 4 else [results.count(None)]
            steps = [torch.tensor(counts[k]) for k in places]
            means, squares, bounds = ([torch.full_like(p, 0.5) for p in params] for _ in range(3))
            grads = [torch.linspace(-1, 1, 40) for _ in params]
            bounds = [torch.tensor(0.25) for _ in params]
            given = {"lr": 0.1, "seed": 3, "indices": places, "fused": False}
            calibrated_adamw_(params, grads, means, squares, steps, bounds, **given)
            results += [None] * (len(params) == 1)
            assert [int(step) for step in steps] == [counts[k] + 1 for k in places]
    for a, b in zip(together, alone, strict=True):
        assert_same_bits(a, b)
    assert len({tuple(param.tolist()) for param in together}) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"maximize": True}, {"rounding": "nearest"}], ids=list)
def test_reference_has_the_bits_of_a_gpu(dtype, options):
    """It uses no operator of PyTorch that differs there."""
    results = []
    for mode in (None, AsOnCuda()):
        generator = torch.Generator().manual_seed(4)
        params = make_params([(700,), (3, 5), (3, 5), (0,)], dtype)
        optimizer = CalibratedAdamW(params, lr=0.1, fused=False, seed=5, **options)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        for step in range(4):
            for param in params:
                param.grad = (heavy if step < 2 else edge_values)(param.shape, generator, dtype)
            if mode is None:
                optimizer.step()
            else:
                with mode:
                    optimizer.step()
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)


def test_streams_of_the_buffers(monkeypatch):
    """Each is rounded by draws of its own: 2 for exp_avg, 6 for exp_avg_sq."""
    taken = []
    draws = reference_step.draws
    monkeypatch.setattr(
        reference_step, "draws", lambda *range, **given: taken.append(given["stream"]) or draws(*range, **given)
    )
    params = make_params([(40,)], torch.bfloat16)
    params[0].grad = torch.ones_like(params[0])
    CalibratedAdamW(params, fused=False).step()
    assert torch.cat(taken).flatten().tolist() == [0, 1, 2, 6]


def awkward_roots(dtype):
    """Subnormal, extreme and random numbers, and those beside squares and beside squares of middles."""
    generator = torch.Generator().manual_seed(8)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.tiny * info.eps, info.tiny, info.max, 1.0, 2.0, 4.0, torch.inf, -1.0, torch.nan]
    roots = torch.cat([torch.linspace(0.5, 2, 2001, dtype=dtype), torch.rand(20000, generator=generator, dtype=dtype)])
    squares = roots * roots
    middles = (roots.double() * (1 + info.eps / 2)).square().to(dtype)
    near = torch.cat([squares, middles, 1 - info.eps / 2 * torch.arange(1, 100, dtype=dtype)])
    near = torch.cat([torch.nextafter(near, torch.zeros(()).to(dtype)), near, torch.nextafter(near, near + 1)])
    # Over all exponents, by a change of the bits alone.
    exponents = torch.randint(-1070 if dtype is torch.float64 else -145, 120, (50000,), generator=generator)
    spread = torch.rand(50000, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double())
    return torch.cat([torch.tensor(special, dtype=dtype), near, spread.to(dtype)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_square_root_is_correctly_rounded(dtype):
    values = awkward_roots(dtype)
    with np.errstate(invalid="ignore"):
        expected = torch.from_numpy(np.sqrt(values.numpy()))
    assert_same_bits(square_root(values), expected)
    with AsOnCuda():
        assert_same_bits(square_root(values), expected)


@pytest.mark.parametrize("off", [-1, 1])
def test_square_root_mends_a_root_that_is_one_unit_off(off, monkeypatch):
    """Of float64; that of float32 is rounded from such a one."""
    root = torch.Tensor.sqrt

    def inexact(values):
        exact = torch.from_numpy(np.sqrt(values.numpy()))
        bits = exact.view(torch.int64) + off
        return torch.where((exact > 0) & (exact < torch.inf), bits.view(torch.float64).clamp(max=1.0), exact)

    values = awkward_roots(torch.float64)
    values = values[(values >= 0) & (values < torch.inf)]
    expected = torch.from_numpy(np.sqrt(values.numpy()))
    monkeypatch.setattr(torch.Tensor, "sqrt", inexact)
    got = square_root(values)
    monkeypatch.setattr(torch.Tensor, "sqrt", root)
    assert_same_bits(got, expected)
