# SPDX-License-Identifier: Apache-2.0
"""Error feedback: sent and left make the gradient, over many steps all of it arrives, and checkpoints."""

import io
import itertools

import pytest
import torch

from csgd_cuda.distributed import CalibratedHookState, codes

from ..helpers import assert_same_bits, heavy_tailed
from .launch import Given, exchanged, run, with_hook

SHAPES = [(7,), (40, 21), (1001,)]
NAMES = [f"of.{k}" for k in range(len(SHAPES))]
STEPS = 4
OPTIONS = [{}, {"block": 32}, {"clip": 2.0}, {"clip": 3.0, "block": 7, "compact": True}]


def gradients(rank, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [heavy_tailed(shape, generator).to(dtype) for shape in SHAPES]


def residuals_of(state):
    saved = state.state_dict()["residuals"]
    return [saved["tensors"][name] if saved else torch.zeros(1) for name in NAMES]


def steps_of(rank, dtype, options):
    """For each step: gradients with what was left before it, what is left after it, and what came out."""
    model, state = with_hook(SHAPES, dtype, error_feedback=True, **options)
    out = []
    for step in range(STEPS):
        before, grads = residuals_of(state), gradients(rank, step, dtype)
        total = [g.flatten() + r for g, r in zip(grads, before, strict=True)]
        result = [grad.flatten() for grad in exchanged(model, grads)]
        out.append((total, residuals_of(state), result))
    return out


pytestmark = pytest.mark.xdist_group("hook")


@pytest.fixture(scope="module", params=itertools.product([1, 2, 3], [torch.float32, torch.bfloat16]), ids=str)
def got(request):
    """(world size, dtype, for each of OPTIONS what each rank got)."""
    world_size, dtype = request.param
    return world_size, dtype, [run(world_size, steps_of, dtype, options) for options in OPTIONS]


def test_what_is_sent_and_what_is_left_make_the_gradient(got):
    """The mean of what the ranks sent comes out: exactly, but for clipped coordinates, whose mean is rounded."""
    world_size, dtype, of_options = got
    for options, ranks in zip(OPTIONS, of_options, strict=True):
        for step, k in itertools.product(range(STEPS), range(len(SHAPES))):
            pairs = [(rank[step][0][k].double(), rank[step][1][k].double()) for rank in ranks]
            mean = sum(total - left for total, left in pairs) / world_size
            for rank in ranks:
                result = rank[step][2][k].double()
                if "clip" in options:
                    assert (result - mean).abs().le(torch.finfo(dtype).eps * mean.abs()).all()
                else:
                    assert torch.equal(result, mean), f"step {step}, parameter {k}"
            assert mean.any()


def test_what_is_left_of_a_coordinate_is_no_larger_than_it(got):
    rounded = torch.finfo(got[1]).eps if got[1] != torch.float32 else 0  # codes are of gradients in their own dtype
    for ranks in got[2]:
        for rank, step, k in itertools.product(ranks, range(STEPS), range(len(SHAPES))):
            total, left, _ = (part[k] for part in rank[step])
            assert left.dtype == torch.float32
            assert (left.abs() <= total.abs() * (1 + 2 * rounded)).all()
            assert k == 0 or left.norm() < total.norm()  # a small one may have nothing to send


def test_code_is_the_nearest_one():
    grad = torch.tensor([0.0, 0.37, 0.375, -0.375, -0.374, 0.75, -0.75, torch.nan])
    got = codes.nearest(grad, torch.tensor(0.75, dtype=torch.float64))
    assert got.tolist() == [1, 1, 2, 0, 1, 2, 0, 1]
    assert codes.nearest(grad[:1], torch.tensor(0.0, dtype=torch.float64)).tolist() == [1]


def of_one_gradient(rank, steps):
    model, state = with_hook(SHAPES, error_feedback=True, clip=4.0, block=32)
    totals = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for _ in range(steps):
        for total, grad in zip(totals, exchanged(model, gradients(rank, 0)), strict=True):
            total += grad
    return [total / steps for total in totals], residuals_of(state)


def test_over_many_steps_all_of_the_gradient_arrives():
    ranks = run(2, of_one_gradient, 200)
    for k in range(len(SHAPES)):
        mean = sum(gradients(rank, 0)[k].double() for rank in range(2)) / 2
        left = sum(rank[1][k].view(SHAPES[k]).double() for rank in ranks) / 2
        assert (ranks[0][0][k] + left / 200 - mean).abs().max() < 1e-5
        assert (ranks[0][0][k] - mean).norm() < 0.05 * mean.norm()


def resumed(rank, world_size, whose):
    """Gradients after two steps and a break, with the state that ``whose`` rank saved, by torch.save."""
    model, state = with_hook(SHAPES, error_feedback=True, block=32)
    for step in range(2):
        exchanged(model, gradients(rank, step))
    states = [None] * world_size
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    torch.distributed.all_gather_object(states, file.getvalue())
    expected = exchanged(model, gradients(rank, 2))
    model, other = with_hook(SHAPES)
    other.load_state_dict(torch.load(io.BytesIO(states[rank if whose is None else whose])))
    return expected, exchanged(model, gradients(rank, 2)), residuals_of(state), residuals_of(other)


def test_resumed_with_its_own_state_a_rank_makes_the_same_bits():
    for expected, got, left, left_after in run(2, resumed, 2, None):
        for a, b in zip([*expected, *left], [*got, *left_after], strict=True):
            assert_same_bits(a, b)


def test_a_rank_begins_without_a_residual_from_the_state_of_another():
    """What is left of its gradient then is no larger than that gradient, where a residual was added to it it is."""
    lefts = [answer[3][2] for answer in run(2, resumed, 2, 0)]
    first, second = (left.abs() <= gradients(rank, 2)[2].abs() for rank, left in enumerate(lefts))
    assert not first.all()
    assert second.all()


def with_a_bad_step(rank, fused):
    model, state = with_hook(SHAPES, error_feedback=True, clip=4.0, block=32, fused=fused)
    exchanged(model, gradients(rank, 0))
    before, grads = residuals_of(state), gradients(rank, 1)
    if rank == 1:
        grads[1].view(-1)[3] = torch.nan
    out = exchanged(model, grads)
    return before, residuals_of(state), out, state.bytes_sent / state.bytes_plain


def test_a_gradient_that_is_not_finite_leaves_its_residuals_alone():
    for kernels, reference in zip(run(2, with_a_bad_step, None), run(2, with_a_bad_step, False), strict=True):
        before, after, out, _ = kernels
        assert not out[1].isfinite().any()
        assert_same_bits(before[1], after[1])
        assert not torch.equal(before[2], after[2])
        assert all(residual.isfinite().all() for residual in after)
        for a, b in zip(after, reference[1], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (3, "residuals must be a dict, got 3"),
        ({"rank": 0, "world_size": 2}, "residuals has no entry 'tensors'"),
        ({"rank": "a", "world_size": 2, "tensors": {}}, "residuals: rank must be an integer"),
        ({"rank": 0, "world_size": 2, "tensors": 3}, "residuals: tensors must be a dict"),
        ({"rank": 0, "world_size": 2, "tensors": {"of.1": torch.ones(3)}}, "residuals has 'of.1', which is not"),
        ({"rank": 0, "world_size": 2, "tensors": {"of.0": 3}}, r"shape \(3,\), got a int"),
        ({"rank": 0, "world_size": 2, "tensors": {"of.0": torch.ones(2)}}, r"of.0 must be a float32 .*\(3,\), got"),
        ({"rank": 0, "world_size": 2, "tensors": {"of.0": torch.ones(3).half()}}, "got torch.float16"),
    ],
)
def test_residuals_of_something_else_are_refused(change, message):
    state = CalibratedHookState(Given([(3,)]), error_feedback=True)
    saved = state.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        state.load_state_dict({**saved, "seed": 7, "residuals": change})
    assert state.state_dict() == saved
