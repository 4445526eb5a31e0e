# SPDX-License-Identifier: Apache-2.0
"""The theorem of docs/algorithm.md, proven by enumerating all 2^16 draws of one element: no luck of a sample."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW
from csgd_cuda.reference import step as reference_step
from csgd_cuda.tensors import opmath_dtype

from ..helpers import DTYPES

ALL_DRAWS = range(2**16)
BOUND = 0.75  # T
# |d| / T from far below one draw in 2^16 up to beyond the hypothesis
SHARES = [2.0**-40, 2.0**-17, 1.5 * 2.0**-16, 2.0**-16, 0.001, 0.1, 1 / 3, 0.5, 0.7, 0.999, 1 - 2.0**-17, 1, 1.5, 1e4]
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def directions(dtype):
    """Magnitudes on the dtype's own grid: subnormals, normals, and around T."""
    info = torch.finfo(dtype)
    values = [info.smallest_normal, info.smallest_normal / 2, info.tiny * info.eps]
    values += [BOUND * share for share in SHARES]
    stored = [torch.tensor(v, dtype=torch.float64).to(dtype).item() for v in values]
    return sorted({sign * v for v in stored if v != 0 for sign in (1, -1)})


def all_draws(begin, end, *, stream, device, **_):
    """In place of the reference's draws: the i-th element draws i, in each of the streams."""
    return torch.arange(begin, end, device=device).expand(len(stream), 1, -1)


def expected_draws(d, opmath):
    """n in the arithmetic of the rule: two roundings to opmath, then integers."""
    scale = torch.tensor(2.0**16, dtype=opmath) / torch.tensor(BOUND, dtype=opmath)
    product = (torch.tensor(abs(d), dtype=opmath) * scale).item()
    return max(1, -int(-product // 1)) if product < 2**16 else 2**16


def assert_theorem(d, updated, opmath):
    """``updated``: the variable after each draw, from 0 with lr 1."""
    n = expected_draws(d, opmath)
    assert all(v == 0 for v in updated[n:])
    assert len(set(updated[:n])) == 1
    moved = -Fraction(updated[0])
    assert moved != 0
    exact, mean = Fraction(d), n * moved / 2**16  # n equal values and 2^16 - n zeros
    # d * (2^16 / n) is rounded twice, and once more where it is subnormal.
    info = torch.finfo(opmath)
    tolerance = abs(exact) * Fraction(info.eps) * Fraction(5, 4) + Fraction(info.tiny * info.eps)
    assert abs(mean - exact) <= tolerance
    variance = n * moved * moved / 2**16 - mean * mean
    if abs(d) >= BOUND:
        assert moved == exact  # applied as it is
        assert variance == 0
    else:
        assert variance <= abs(exact) * (Fraction(BOUND) - abs(exact)) * (1 + 8 * Fraction(info.eps)) + tolerance


@pytest.mark.parametrize("opmath", [torch.float32, torch.float64], ids=str)
def test_compiled_rule_is_unbiased(opmath, rule_hooks):
    for d in directions(opmath):
        got = rule_hooks.update_element(NAMES[opmath], 0.0, d, lipschitz_bound=BOUND, draws=list(ALL_DRAWS))
        assert got.n == expected_draws(d, opmath)
        assert_theorem(d, got.params, opmath)


@pytest.mark.parametrize("opmath", [torch.float32, torch.float64], ids=str)
def test_reference_is_unbiased(opmath, device, monkeypatch):
    """One parameter of 2^16 elements with equal gradients, of which the i-th draws i."""
    monkeypatch.setattr(reference_step, "draws", all_draws)
    for d in directions(opmath):
        param = torch.zeros(2**16, dtype=opmath, device=device, requires_grad=True)
        param.grad = torch.full_like(param, d)
        CSGD([param], lr=1.0, calibration=1.0, lipschitz=BOUND, fused=False).step()
        assert_theorem(d, param.tolist(), opmath)


@pytest.mark.parametrize("opmath", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reference_is_unbiased_for_adamw(weight_decay, opmath, device, monkeypatch):
    """The mean over all draws is the variable after the plain step, which calibration 0 makes.

    From means as training has them, so that |d| goes from far below T to beyond it; with weight decay the variable
    begins at 1, where its new value is rounded once more.
    """
    monkeypatch.setattr(reference_step, "draws", all_draws)
    start = 1.0 if weight_decay else 0.0
    for mean, square in ((0.0, 0.0), (1e-12, 1.0), (1e-5, 1.0), (0.01, 1.0), (-0.1, 0.7), (0.7, 1.0), (-3.0, 1.0)):
        updated = {}
        for calibration in (0.0, 1.0):
            param = torch.full((2**16,), start, dtype=opmath, device=device, requires_grad=True)
            param.grad = torch.full_like(param, 1e-6)
            options = {"lr": 1.0, "lipschitz": BOUND, "calibration": calibration, "weight_decay": weight_decay}
            optimizer = CalibratedAdamW([param], fused=False, **options)
            optimizer.state[param] = {
                "step": torch.tensor(100, device=device),
                "exp_avg": torch.full_like(param, mean, requires_grad=False),
                "exp_avg_sq": torch.full_like(param, square, requires_grad=False),
            }
            optimizer.step()
            updated[calibration] = param.tolist()
        assert len(set(updated[0.0])) == 1
        if start == 0:
            assert_theorem(-updated[0.0][0], updated[1.0], opmath)
            continue
        exact = Fraction(updated[0.0][0])
        average = sum(Fraction(value) * count for value, count in Counter(updated[1.0]).items()) / 2**16
        largest = max(abs(exact), *(abs(Fraction(value)) for value in set(updated[1.0])))
        assert abs(average - exact) <= largest * Fraction(torch.finfo(opmath).eps) * 2
        assert len(set(updated[1.0])) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_means_of_adamw_are_unbiased(dtype, device, monkeypatch):
    """All draws of both means enumerated: the mean of what is stored is the number that was to be stored, exactly."""
    monkeypatch.setattr(reference_step, "draws", all_draws)
    for g in (0.3, -1.7, 0.011):
        param = torch.zeros(2**16, dtype=dtype, device=device, requires_grad=True)
        param.grad = torch.full_like(param, g)
        optimizer = CalibratedAdamW([param], fused=False, betas=(0.875, 0.875))
        optimizer.step()
        g = param.grad[0].float()
        for name, exact in (("exp_avg", g * 0.125), ("exp_avg_sq", g * g * 0.125)):
            stored = Counter(optimizer.state[param][name].tolist())
            assert sum(Fraction(v) * count for v, count in stored.items()) / 2**16 == Fraction(exact.item()), name
        assert len(stored) == 2  # or nothing had to be rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_update_is_unbiased(dtype, rule_hooks):
    """Both draws enumerated: whether the coordinate moves, and how its new value is rounded."""
    name, opmath = NAMES[dtype], opmath_dtype(dtype)
    lr, theta = 0.0625, torch.tensor(1.7).to(dtype).item()
    every = list(ALL_DRAWS)
    for d in directions(dtype):
        n = expected_draws(d, opmath)
        exact_move = -Fraction(lr) * Fraction(d) * Fraction(2**16, n)
        # The new value in opmath; two roundings in the move, one in the difference.
        size = abs(exact_move) + abs(Fraction(theta))
        new = torch.tensor(theta - lr * (d * (2.0**16 / n)), dtype=torch.float32).item()
        stored = sum(Fraction(v) * k for v, k in Counter(rule_hooks.store(name, new, every)).items()) / 2**16
        mean = stored * n / 2**16 + Fraction(theta) * (2**16 - n) / 2**16
        target = Fraction(theta) - Fraction(lr) * Fraction(d)
        assert abs(mean - target) <= 2 * size * Fraction(torch.finfo(torch.float32).eps) * Fraction(n, 2**16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_moves_the_expected_share(dtype, fused, device):
    """Over a million elements the density is mean(n) / 2^16 within 5 standard deviations, and so is the mean."""
    n = 2**20
    d = torch.linspace(-1, 1, n).to(dtype)
    param = torch.zeros(n, dtype=dtype, device=device, requires_grad=True)
    param.grad = d.to(device)
    optimizer = CSGD([param], lr=1.0, calibration=1.0, lipschitz=1.0, fused=fused, seed=3)
    optimizer.step()
    (density,) = optimizer.density().values()
    assert abs(density - d.double().abs().mean()) < 5 * 0.5 / n**0.5
    mean = (param.double().cpu() + d.double()).mean()
    assert abs(mean) < 5 * (1 / 6) ** 0.5 / n**0.5  # Var = |d| (1 - |d|), 1/6 on average


def test_zero_calibration_and_zero_bound_move_everything(rule_hooks):
    for options in ({"calibration": 0.0, "lipschitz_bound": 1.0}, {"lipschitz_bound": 0.0}):
        got = rule_hooks.update_element("float32", 1.0, 0.25, draws=list(ALL_DRAWS), **options)
        assert got.n == 2**16
        assert set(got.params) == {0.75}


@pytest.mark.parametrize("d", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_pass_through(d, rule_hooks):
    got = rule_hooks.update_element("float32", 1.0, d, lipschitz_bound=BOUND, draws=[0, 2**16 - 1])
    assert got.n == 2**16
    assert all(str(v) == str(1.0 - d) for v in got.params)
