# SPDX-License-Identifier: Apache-2.0
"""The communication hook under the options of DistributedDataParallel: what it gives without them, bit for bit."""

import pytest
import torch

from ..helpers import assert_same_bits, heavy_tailed
from .launch import run, with_hook

SHAPES = [(7,), (40, 21), (3, 5), (1001,), (64, 65)]
SMALL_BUCKETS = 0.001  # MB: several for these parameters
STEPS = 4
OPTIONS = {
    "no option": {},
    "static graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused are sought": {"find_unused_parameters": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused are sought, bucket views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}


def gradients(rank, step, part=0):
    """Of one rank and one of the parts of which a step is the sum."""
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + part)
    return [heavy_tailed(shape, generator) for shape in SHAPES]


def trained(rank, of_model, given, accumulated=False):
    """The gradients after each step for those that ``given(rank, step)`` names, and the step the hook has counted.

    ``accumulated``: each step but the first (torch fails there with a static graph, with or without a hook) is that of
    three backward passes, of which only the last one exchanges.
    """
    model, state = with_hook(SHAPES, bucket_cap_mb=SMALL_BUCKETS, of_model=of_model, seed=5)
    out = []
    for step in range(STEPS):
        model.zero_grad()
        if accumulated and step:
            with model.no_sync():
                for part in (0, 1):
                    model(gradients(rank, step, part)).backward()
            model(gradients(rank, step, 2)).backward()
        else:
            model(given(rank, step)).backward()
        out += [None if param.grad is None else param.grad.clone() for param in model.module.of]
    return {"grads": out, "step": state.step}


def sum_of_parts(rank, step):
    parts = [gradients(rank, step, part) for part in (0, 1, 2)]
    return [(a + b) + c for a, b, c in zip(*parts, strict=True)]


def unused(rank, step, instead=None):
    """Not used: parameter 1 by rank 1 in step 1, parameter 3 by all in step 2, all but one by rank 0 in step 3."""
    nothing = [None if instead is None else torch.zeros(shape) for shape in SHAPES]
    grads = gradients(rank, step)
    if (rank, step) == (1, 1):
        grads[1] = nothing[1]
    if step == 2:
        grads[3] = nothing[3]
    if (rank, step) == (0, 3):
        grads = [*nothing[:2], grads[2], *nothing[3:]]
    return grads


def zero_where_unused(rank, step):
    return unused(rank, step, instead=0)


def in_all_ways(rank):
    out = {}
    for name, of_model in OPTIONS.items():
        out[name] = trained(rank, of_model, gradients)
        out[f"{name}, accumulated"] = trained(rank, of_model, sum_of_parts, accumulated=True)
        if "find_unused_parameters" in of_model:
            out[f"{name}, some are not used"] = trained(rank, of_model, unused)
    out["sums"] = trained(rank, {}, sum_of_parts)
    out["zeros"] = trained(rank, {}, zero_where_unused)
    return out


pytestmark = pytest.mark.xdist_group("hook options")


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world_size: f"{world_size} ranks")
def ranks(request):
    return run(request.param, in_all_ways)


def assert_same_gradients(a, b, what):
    assert a["step"] == b["step"] == STEPS, what
    for k, (x, y) in enumerate(zip(a["grads"], b["grads"], strict=True)):
        assert_same_bits(x, y, f"{what}: step {k // len(SHAPES)}, parameter {k % len(SHAPES)}")
        assert x.any() == y.any()


def assert_same_on_all(ranks, name, expected):
    for rank, got in enumerate(ranks):
        assert_same_gradients(got[name], expected, f"{name}, rank {rank}")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_not_change_a_bit(name, ranks):
    assert all(grad.any() for grad in ranks[0]["no option"]["grads"])
    assert_same_on_all(ranks, name, ranks[0]["no option"])


@pytest.mark.parametrize("name", OPTIONS)
def test_accumulated_gradients_are_exchanged_once_as_their_sum(name, ranks):
    assert_same_on_all(ranks, f"{name}, accumulated", ranks[0]["sums"])


@pytest.mark.parametrize("name", [name for name, of_model in OPTIONS.items() if "find_unused_parameters" in of_model])
def test_unused_parameter_counts_as_a_gradient_of_zeros(name, ranks):
    """And stays without one where no rank has used it."""
    expected = dict(ranks[0]["zeros"])
    by_none = 2 * len(SHAPES) + 3
    assert not expected["grads"][by_none].any()
    grads = [rank[f"{name}, some are not used"]["grads"] for rank in ranks]
    for of_rank in grads:
        assert [k for k, grad in enumerate(of_rank) if grad is None] == [by_none]
        of_rank[by_none] = expected["grads"][by_none]
    assert_same_on_all(ranks, f"{name}, some are not used", expected)
